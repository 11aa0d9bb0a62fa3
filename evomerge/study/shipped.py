"""The study files that come with evomerge."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def shipped_study(name: str) -> Path:
    """The path of search_spaces/NAME: inside an installed package, or beside it in a clone."""
    installed = PACKAGE / "search_spaces" / name
    if installed.is_file():
        return installed
    return PACKAGE.parent / "search_spaces" / name
