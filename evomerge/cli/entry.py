"""The whole command line, and how errors are reported."""

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
from evomerge.cli.listing import listing_commands
from evomerge.cli.models import demo, merge, model_commands
from evomerge.cli.options import examples
from evomerge.cli.studies import study_commands
from evomerge.console import Console
from evomerge.errors import EvomergeError

DESCRIPTION = (
    "Find the best merge of a base model and its fine-tuned siblings, "
    "and prove it on held-out tasks."
)
EXAMPLES = """evomerge demo demo/
evomerge search search_spaces/demo.yaml
evomerge show demo
evomerge export demo --model merged/"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns the exit code: 0 done, 1 failed, 2 wrong usage or input, 3 paused, 130
    interrupted.
    """
    args = make_parser().parse_args(argv)
    # its import warns about kernels that are not used here
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # the hub client's retries would be printed above our one line
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    command: Callable[[argparse.Namespace], int | None] = args.command
    try:
        return command(args) or 0
    except EvomergeError as error:
        Console().say(f"evomerge: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        kept = "everything finished is kept; run the same command again to resume"
        if command in (merge, demo):
            kept = "nothing was written"
        Console().say(f"evomerge: interrupted; {kept}")
        return 130
    except BrokenPipeError:  # `evomerge show demo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="evomerge",
        description=DESCRIPTION,
        epilog=examples(EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"evomerge {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    study_commands(commands)
    listing_commands(commands)
    model_commands(commands)
    infer_command(commands)
    judge_commands(commands)
    knowledge_commands(commands)
    return parser
