"""The whole command line, and how errors are reported."""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn, TextIO

from evomerge import __version__
from evomerge.cli.infer import infer_command
from evomerge.cli.judges import judge_commands
from evomerge.cli.knowledge import knowledge_commands
from evomerge.cli.listing import listing_commands
from evomerge.cli.models import demo, merge, model_commands
from evomerge.cli.options import examples
from evomerge.cli.studies import study_commands
from evomerge.console import Console, shown
from evomerge.errors import EvomergeError

DESCRIPTION = (
    "Find the best merge of a base model and its fine-tuned siblings, "
    "and prove it on held-out tasks."
)
# what a user has named wrongly, as opposed to a disk that fails
NAMES_NOTHING = (errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
EXAMPLES = """evomerge demo demo/
evomerge search search_spaces/demo.yaml
evomerge show demo
evomerge export demo --model merged/"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns the exit code: 0 done, 1 failed, 2 wrong usage or input, 3 paused, 130
    interrupted.
    """
    _open_streams()
    try:
        code = _run(argv)
    except SystemExit:  # argparse's help, version and usage
        if _finish_stdout():
            raise
        return 1
    return code if _finish_stdout(told=code != 0) else code or 1


def _run(argv: Sequence[str] | None) -> int:
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
        return 0
    except OSError as error:
        where = error.filename or "stdout"
        Console().say(f"evomerge: {where}: {error.strerror or error}. Check the name and the disk.")
        if error.errno in NAMES_NOTHING:
            return 2
        return 1
    except UnicodeEncodeError:
        Console().say("evomerge: a name is not valid text. Rename the file.")
        return 2


def _open_streams() -> None:
    """Let stdout and stderr take any text, and let closed ones take it without a trace."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    log = logging.getLogger("evomerge")
    if not log.handlers:
        log.addHandler(_ConsoleHandler())


def _finish_stdout(told: bool = False) -> bool:
    """Write what is left; whether it could be written, or nobody reads it any more.

    A failure is reported unless the user was `told` of one.
    """
    error = _flush(sys.stdout)
    written = error is None or isinstance(error, BrokenPipeError)
    if error is not None and not written and not told:
        Console().say(f"evomerge: stdout: {error.strerror}. Free some space, or name a file.")
    _flush(sys.stderr)
    return written


def _flush(stream: TextIO) -> OSError | None:
    """Write what is left; a stream that takes nothing is led to nowhere, and its error returned."""
    try:
        stream.flush()
    except OSError as error:
        with suppress(OSError):  # or Python would try once more, and print a traceback
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None


class _ConsoleHandler(logging.Handler):
    """Shows warnings of the package as other messages."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            Console().say(record.getMessage())


class Parser(argparse.ArgumentParser):
    """Shows what a user typed as other messages."""

    def error(self, message: str) -> NoReturn:
        super().error(shown(message))


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser: argparse.ArgumentParser = Parser(
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
