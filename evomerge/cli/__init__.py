"""The command line: parse, call, print. Data goes to stdout, progress and messages to stderr."""

from evomerge.cli.entry import main

__all__ = ["main"]
