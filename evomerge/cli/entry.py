"""The whole command line, and what becomes of an error."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

from evomerge import __version__
from evomerge.cli.infer import infer_command
from evomerge.cli.judges import judge_commands
from evomerge.cli.knowledge import knowledge_commands
from evomerge.cli.models import demo, merge, model_commands
from evomerge.cli.studies import study_commands
from evomerge.console import Console
from evomerge.errors import EvomergeError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 done, 1 failed, 2 wrong usage or input, 130 interrupted."""
    args = make_parser().parse_args(argv)
    # it warns at import of kernels that nobody asked for
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # the hub's retries would stand above our one line
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    try:
        command: Callable[[argparse.Namespace], int | None] = args.command
        return command(args) or 0
    except EvomergeError as error:
        Console().say(f"evomerge: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        kept = (
            "nothing was written"
            if args.command in (merge, demo)
            else "everything finished is kept, and the same command goes on"
        )
        Console().say(f"evomerge: interrupted; {kept}")
        return 130
    except BrokenPipeError:  # `evomerge show demo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="evomerge",
        description="Find the best merge of a base model and its fine-tuned siblings, and prove it on held-out tasks.",
    )
    parser.add_argument("--version", action="version", version=f"evomerge {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    study_commands(commands)
    model_commands(commands)
    infer_command(commands)
    judge_commands(commands)
    knowledge_commands(commands)
    return parser
