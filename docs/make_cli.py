"""Write docs/CLI.md, the help of every command: `make docs`."""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from evomerge.cli.entry import make_parser

PYTHON = (3, 11)  # argparse lays its help out differently from version to version
HEAD = """\
# Command line

The help of every command. `make docs` writes this file; a test compares it with the program.
"""


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its commands, in the order of its help."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from parsers(command)


def cli_page() -> str:
    """The text of docs/CLI.md, for a terminal of 80 columns."""
    width = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "80"
    try:
        pages = [(parser.prog, parser.format_help()) for parser in parsers(make_parser())]
    finally:
        os.environ.pop("COLUMNS")
        if width is not None:
            os.environ["COLUMNS"] = width
    sections = [f"## {name}\n\n```text\n{text.rstrip()}\n```\n" for name, text in pages]
    return "\n".join([HEAD, *sections])


if __name__ == "__main__":
    if sys.version_info[:2] != PYTHON:
        sys.exit("docs/CLI.md is written with Python {}.{}".format(*PYTHON))
    Path(__file__).with_name("CLI.md").write_text(cli_page(), encoding="utf-8")
