"""What several commands share: options, where a study lies, and what is said at the end."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from evomerge.console import Console, byte_progress

if TYPE_CHECKING:
    from evomerge.searching.finished import Finished

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_command(
    commands: Commands, name: str, run: Callable[..., object], does: str, example: str
) -> argparse.ArgumentParser:
    p: argparse.ArgumentParser = commands.add_parser(
        name,
        help=does,
        description=f"{does[0].upper()}{does[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(command=run)
    return p


def study_option(p: argparse.ArgumentParser) -> None:
    p.add_argument("study", metavar="STUDY", help="the study's name")
    storage_option(p)


def storage_option(p: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    p.add_argument(
        "--storage",
        metavar="URL",
        default=os.environ.get("EVOMERGE_STORAGE"),
        help="any Optuna storage (default: $EVOMERGE_STORAGE, or sqlite:///storage/NAME.db)",
    )


def results_option(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        default=os.environ.get("EVOMERGE_RESULTS"),
        help="default: $EVOMERGE_RESULTS, or results/; NAME is added",
    )


def set_option(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the study file; may be repeated",
    )


def shard_option(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--out-shard-size",
        default="5GB",
        metavar="SIZE",
        help="largest weight file: 5GB, 200M, 5B as in mergekit (default: 5GB)",
    )


def seed(text: str) -> int:
    """What numpy takes as a seed, and so mergekit."""
    number = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(
            f"no seed: {text!r}; write a whole number from 0 to {2**32 - 1}"
        )
    return number


def storage_url(storage: str | None, name: str) -> str:
    return storage or f"sqlite:///storage/{name}.db"


def results_folder(results: Path | str | None, name: str) -> Path:
    return Path(results or "results") / name


def load(args: argparse.Namespace) -> Finished:
    from evomerge.searching.finished import load_finished

    return load_finished(storage_url(args.storage, args.study), args.study)


def build(recipe: object, out: Path, shard_size: str, text: str, random_seed: int) -> None:
    """Build the recipe's model folder with a progress bar; `text` is kept in it as the
    configuration. Raises as build_model.
    """
    from evomerge.merging.build import build_model
    from evomerge.recipe import Recipe
    from evomerge.reporting.card import model_card

    assert isinstance(recipe, Recipe)
    console = Console()
    build_model(
        recipe,
        out,
        write_card=model_card,
        recipe_text=text,
        shard_size=shard_size,
        random_seed=random_seed,
        progress=byte_progress(console, "merging"),
    )
    say_written(console, [out])


def say_written(console: Console, paths: Sequence[Path]) -> None:
    console.say("wrote " + ", ".join(map(str, paths)))
