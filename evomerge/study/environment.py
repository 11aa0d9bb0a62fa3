"""`${NAME}` in a study file: filled in from the environment to run, kept as written to store."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from typing import Any, TypeAlias

from evomerge.errors import StudyFileError
from evomerge.masking import hide

Place: TypeAlias = tuple[str | int, ...]  # keys and indices, from the top
VARIABLE = re.compile(r"\$\{(\w+)\}")
DIGITS = 4  # hex digits of a value that are stored: enough to notice a change, no more to guess by


def texts_with_variables(data: Any, at: Place = ()) -> Iterator[tuple[Place, str]]:
    """Every text that contains `${NAME}`, and where it is."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from texts_with_variables(value, (*at, str(key)))
    elif isinstance(data, list | tuple):
        for i, value in enumerate(data):
            yield from texts_with_variables(value, (*at, i))
    elif isinstance(data, str) and VARIABLE.search(data):
        yield at, data


def filled_in(data: Any, fill: Callable[[Place, str], str], at: Place = ()) -> Any:
    """A copy whose texts are what `fill` makes of each place and text."""
    if isinstance(data, Mapping):
        return {key: filled_in(value, fill, (*at, str(key))) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [filled_in(value, fill, (*at, i)) for i, value in enumerate(data)]
    if isinstance(data, str):
        return fill(at, data)
    return data


def expanded(data: Any, environ: Mapping[str, str] | None = None, where: str | None = None) -> Any:
    """A copy with each `${NAME}` from the environment.

    A variable that is not set raises StudyFileError, which names the file `where`; without a
    `where` its text stays as it is.
    """
    variables = os.environ if environ is None else environ

    def fill(at: Place, text: str) -> str:
        """One text of the study, at its place, with its variables."""

        def lookup(match: re.Match[str]) -> str:
            if match[1] in variables:
                hide(match[1], variables[match[1]])
                return variables[match[1]]
            if where is None:
                return match[0]
            raise StudyFileError(
                f"`{dotted(at)}` uses ${{{match[1]}}}, which is not set",
                where=where,
                remedy=f"Set the environment variable {match[1]}.",
            )

        return VARIABLE.sub(lookup, text)

    return filled_in(data, fill)


def value_prints(data: Any, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """NAME -> a few digits of a hash of its value, for every variable in the texts of `data`."""
    variables = os.environ if environ is None else environ
    names = set()
    for _, text in texts_with_variables(data):
        names.update(VARIABLE.findall(text))
    prints = {}
    for name in sorted(names & variables.keys()):
        value = f"{name}={variables[name]}".encode(errors="surrogatepass")
        prints[name] = sha256(value).hexdigest()[:DIGITS]
    return prints


def dotted(at: Place) -> str:
    """A place as messages name it: tasks[0].file."""
    text = ""
    for part in at:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def find(data: Any, at: Place) -> Any:
    """What is at a place; None where there is no such place."""
    for part in at:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data
