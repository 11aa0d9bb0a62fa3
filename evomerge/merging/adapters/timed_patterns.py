"""Regular expressions that came with a file, which may be written so that matching never ends."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import regex

from evomerge.errors import ModelError

LONGEST = 20_000  # characters of an expression
# seconds that all matches of one adapter may take together; peft's take microseconds each
AT_FIRST, EACH = 1.0, 0.001


def compiles(expression: str) -> bool:
    """Whether it is a regular expression, by Python's rules, as peft would read it."""
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError):
        return False
    return len(expression) <= LONGEST


class TimedPatterns:
    """Matches as `re` does; `regex` is a matcher of the same language that stops in time."""

    def __init__(self, where: Path) -> None:
        """`where` is the file that the expressions came from."""
        self.where = where
        self._left = AT_FIRST
        self._compiled: dict[str, Any] = {}

    def match(self, expression: str, text: str) -> Any:
        """The match from the text's start on, or None.

        Raises ModelError for an expression that is none, or that takes too long.
        """
        began = time.monotonic()
        self._left += EACH
        try:
            if expression not in self._compiled:
                if not compiles(expression):
                    raise self._error("is not a regular expression", expression)
                self._compiled[expression] = regex.compile(expression)
            found = self._compiled[expression].match(text, timeout=max(self._left, EACH))
        except TimeoutError:
            raise self._error(
                f"takes more than {AT_FIRST:g} s to match the names of modules", expression
            ) from None
        except (regex.error, RecursionError, OverflowError):
            raise self._error("is not a regular expression", expression) from None
        self._left -= time.monotonic() - began
        return found

    def _error(self, what: str, expression: str) -> ModelError:
        return ModelError(
            f"a pattern {what}",
            where=self.where,
            found=expression,
            remedy="Simplify it, or name the modules one by one.",
        )
