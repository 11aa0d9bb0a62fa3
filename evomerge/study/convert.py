"""Between plain lists and dicts, as YAML has them, and frozen dataclasses: each value is checked by
its type hint.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from typing import Any, Literal

from evomerge.errors import StudyFileError


def build(cls: type, data: Any, at: str, where: str) -> Any:
    """The dataclass `cls` from a mapping; `at` is its dotted key in the file `where`. Raises
    StudyFileError for a key or a value.
    """
    if not isinstance(data, dict):
        raise StudyFileError(
            f"`{at}` is not a mapping",
            where=where,
            found=data,
            remedy="Write its keys on indented lines.",
        )
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            remedy = (
                f"Did you mean `{join(at, near[0])}`?"
                if near
                else f"Known keys: {', '.join(known)}."
            )
            raise StudyFileError(f"unknown key `{join(at, str(key))}`", where=where, remedy=remedy)
    missing = [
        n
        for n, f in known.items()
        if n not in data
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise StudyFileError(
            f"`{join(at, missing[0])}` is missing",
            where=where,
            remedy="Add it; see search_spaces/demo.yaml.",
        )
    return cls(
        **{key: _convert(hints[key], value, join(at, key), where) for key, value in data.items()}
    )


def _convert(hint: Any, value: Any, at: str, where: str) -> Any:
    def wrong(wanted: str) -> StudyFileError:
        return StudyFileError(
            f"`{at}` must be {wanted}",
            where=where,
            found=value,
            remedy="Change it, or leave it out for the default.",
        )

    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, at, where)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, at, where)
    if origin is Literal:
        if value not in args:
            raise wrong(" or ".join(map(str, args)))
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise wrong("a list")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise wrong(f"a list of {len(args)} values")
        return tuple(_convert(args[0], item, f"{at}[{i}]", where) for i, item in enumerate(value))
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if (
        hint is float
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    ):
        return float(value)
    if hint is str and isinstance(value, str | int):
        return str(value)
    raise wrong(
        {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}[
            hint
        ]
    )


def join(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def flatten(value: Any, at: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            k: v
            for key, item in value.items()
            for k, v in flatten(item, join(at, str(key))).items()
        }
    return {at: value}
