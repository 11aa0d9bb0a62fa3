"""pydantic's errors as one line: which key of which file, the value found, and the remedy."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from evomerge.errors import StudyFileError
from evomerge.study.section import Remedy, Section, join

S = TypeVar("S", bound=Section)
UNKNOWN = ("extra_forbidden", "invalid_key")
# pydantic's names of the types that a value may fail to have
WANTED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a finite number",
    "finite_number": "a finite number",
    "string_type": "text",
    "tuple_type": "a list",
    "missing": "a list of 2 numbers",
    "too_long": "a list of 2 numbers",
}
LIMITS = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
EMPTY = ("too_short", "string_too_short")
OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def validated(
    section: type[S],
    data: Mapping[str, Any],
    where: str,
    at: str = "",
    folder: Path | object | None = None,
) -> S:
    """The section from plain lists and dicts; relative paths are resolved against `folder`.

    STORED in its place leaves names and seeds of older studies alone.
    `at` is the section's dotted key in the file `where`. Raises StudyFileError for the first error,
    unknown keys before all others: a misspelled key is often the reason why another is missing.
    """
    try:
        return section.model_validate(data, context=folder)
    except ValidationError as error:
        details = error.errors(include_url=False)
        unknown = [detail for detail in details if detail["type"] in UNKNOWN]
        raise _explained(section, [*unknown, *details][0], where, at) from error


def _explained(
    section: type[Section], detail: Mapping[str, Any], where: str, at: str
) -> StudyFileError:
    loc, kind, found = detail["loc"], detail["type"], detail["input"]
    key = _dotted(at, loc)
    if kind in UNKNOWN:
        return _unknown_key(_section_at(section, loc[:-1]), _dotted(at, loc[:-1]), loc[-1], where)
    if kind == "study_rule":
        rule = detail["ctx"]
        if rule["key"]:
            key = join(key, rule["key"])
        return _error(f"`{key}` {rule['what']}", where, rule["found"], rule["remedy"])
    if kind == "missing" and isinstance(loc[-1], str):
        remedy = "Add it; search_spaces/demo.yaml shows how."
        return _error(f"`{key}` is missing", where, None, remedy)
    if kind == "model_type":
        return _error(
            f"`{key}` is not a mapping", where, found, "Write its keys on indented lines."
        )
    field = _field_at(section, loc)
    if kind in EMPTY:
        return _error(f"`{key}` is empty", where, found, _remedy(field, "Fill it in, or remove it"))
    if kind in OUT_OF_RANGE:
        return _error(f"`{key}` is out of range", where, found, _remedy(field, _limits(field)))
    wanted = WANTED.get(kind, detail["msg"])
    if kind == "literal_error":
        wanted = " or ".join(_choices(field.annotation))
    if kind == "missing":  # a list that is too short is reported at the item that it lacks
        key = _dotted(at, loc[:-1])
    remedy = "Change it, or leave it out for the default."
    if field.is_required():
        remedy = "Change it."
    return _error(f"`{key}` must be {wanted}", where, found, remedy)


def _unknown_key(section: type[Section], at: str, key: object, where: str) -> StudyFileError:
    known = list(section.model_fields)
    near = difflib.get_close_matches(str(key), known, n=1)
    remedy = f"Known keys: {', '.join(known)}."
    if near:
        remedy = f"Did you mean `{join(at, near[0])}`?"
    return _error(f"unknown key `{join(at, str(key))}`", where, None, remedy)


def _error(what: str, where: str, found: object, remedy: str) -> StudyFileError:
    if isinstance(found, tuple):
        found = list(found)  # as written, not as converted
    return StudyFileError(what, where=where, found=found, remedy=remedy)


def _dotted(at: str, loc: Sequence[str | int]) -> str:
    for part in loc:
        at = f"{at}[{part}]" if isinstance(part, int) else join(at, part)
    return at


def _field_at(section: type[Section], loc: Sequence[str | int]) -> FieldInfo:
    *parents, last = [part for part in loc if isinstance(part, str)]
    return _section_at(section, parents).model_fields[last]


def _section_at(section: type[Section], loc: Sequence[str | int]) -> type[Section]:
    for part in loc:
        if isinstance(part, str):
            types_inside = _inside(section.model_fields[part].annotation)
            section = next(t for t in types_inside if _is_section(t))
    return section


def _inside(annotation: object) -> Iterator[Any]:
    """The annotation and every type within its unions and tuples."""
    yield annotation
    for argument in typing.get_args(annotation):
        yield from _inside(argument)


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _choices(annotation: object) -> list[str]:
    kinds = (types.UnionType, typing.Union)
    if typing.get_origin(annotation) in kinds:
        annotation = next(t for t in typing.get_args(annotation) if t is not type(None))
    return [str(choice) for choice in typing.get_args(annotation)]


def _remedy(field: FieldInfo, default: str) -> str:
    for entry in field.metadata:
        if isinstance(entry, Remedy):
            return entry.text
    return f"{default}."


def _limits(field: FieldInfo) -> str:
    """Its limits in words: "Use more than 0 and less than 1, such as 0.05"."""
    limits = []
    for name, words in LIMITS.items():
        for entry in field.metadata:
            if hasattr(entry, name):
                limits.append(f"{words} {getattr(entry, name)}")
    text = f"Use {' and '.join(limits)}"
    if field.examples:
        text += f", such as {field.examples[0]}"
    if not field.is_required() and field.default is None:
        text += ", or leave it out"
    return text
