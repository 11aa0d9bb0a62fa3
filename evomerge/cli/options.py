"""What several commands share: options, their types, and the closing lines."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from evomerge.console import Console

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Options: TypeAlias = "argparse.ArgumentParser | argparse._ArgumentGroup"


def add_command(
    commands: Commands, name: str, run: Callable[..., object], does: str, example: str
) -> argparse.ArgumentParser:
    """Add a command that calls `run` with its options; `example` has a command per line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=does,
        description=sentence(does),
        epilog=examples(example),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=run)
    return parser


def add_group(commands: Commands, name: str, does: str, example: str) -> Commands:
    """Add a command with subcommands."""
    parser = commands.add_parser(
        name,
        help=does,
        description=sentence(does),
        epilog=examples(example),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser.add_subparsers(title="commands", metavar="COMMAND", required=True)


def sentence(does: str) -> str:
    """What a command does, as a sentence."""
    return f"{does[0].upper()}{does[1:]}."


def examples(lines: str) -> str:
    """The end of a help text."""
    head, *rest = lines.splitlines()
    title = "example:"
    if rest:
        title = "examples:"
    return "\n  ".join([title, head.strip(), *map(str.strip, rest)])


def study_option(p: argparse.ArgumentParser) -> None:
    """STUDY and --storage."""
    p.add_argument("study", metavar="STUDY", help="the study's name")
    storage_option(p)


def storage_option(
    p: Options,
    does: str = "any Optuna storage (default: $EVOMERGE_STORAGE, or sqlite:///storage/NAME.db)",
) -> None:
    """--storage."""
    p.add_argument("--storage", metavar="URL", help=does)


def results_option(p: argparse.ArgumentParser) -> None:
    """--results."""
    p.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="where the folder NAME/ goes (default: $EVOMERGE_RESULTS, or results/)",
    )


def set_option(p: argparse.ArgumentParser) -> None:
    """--set."""
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the study file; may be repeated",
    )


def shard_option(p: argparse.ArgumentParser) -> None:
    """--out-shard-size."""
    p.add_argument(
        "--out-shard-size",
        default="5GB",
        metavar="SIZE",
        help="largest weight file: 5GB, 200M, 5B as in mergekit (default: 5GB)",
    )


def seed(text: str) -> int:
    """A seed as numpy and mergekit accept it."""
    number = -1
    if text.isascii() and text.isdigit():
        number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(
            f"not a seed: {text!r}; write a whole number from 0 to {2**32 - 1}"
        )
    return number


def say_written(console: Console, paths: Sequence[Path]) -> None:
    """Report which files were written."""
    console.say("wrote " + ", ".join(map(str, paths)))
