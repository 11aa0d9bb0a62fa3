"""What the sections of the study file share: strictness, value types, and how a rule is stated.

YAML values are not converted: no text becomes a number, `true` is not 1, and numbers are finite.
Three conversions are allowed: a whole number where a number or a text is expected, and a list where
a tuple is expected.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import PydanticCustomError

from evomerge.errors import RecipeError
from evomerge.files import is_there
from evomerge.recipe.model_references import model_reference

STORED = object()  # see the end of this file
LONGEST_NAME = 150  # bytes; a file system takes 255, and names of files add to it


class Section(BaseModel):
    """A frozen group of keys; a key that it does not have is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _check_sizes(cls, value: object, info: ValidationInfo) -> object:
        """No number is so large or so near 0 that sums and products with it mean nothing."""
        fine = info.context is STORED or all(map(_is_moderate, _numbers_in(value)))
        require(fine, "", "is out of range", value, "Use 0, or a size from 1e-9 to 1e15.")
        return value

    def replace(self, **changes: Any) -> Self:
        """A copy with these keys changed, validated again. Raises pydantic's ValidationError."""
        return self.model_validate(dict(self) | changes, context=STORED)


@dataclass(frozen=True)
class Remedy:
    """An annotation of a key's type: what to write, where its limits alone do not say it well."""

    text: str


def require(holds: object, key: str, what: str, found: object, remedy: str) -> None:
    """State one rule of a validator: unless it `holds`, the `key` of this section `what`.

    An empty `key` is the field or section that the validator belongs to.
    """
    if isinstance(found, int) and found.bit_length() > 10_000:
        found = "a number of thousands of digits"  # which Python refuses to write out
    if not holds:
        raise PydanticCustomError(
            "study_rule",
            "`{key}` {what}. {remedy}",
            {"key": key, "what": what, "found": found, "remedy": remedy},
        )


def _numbers_in(value: object) -> Iterator[float]:
    if isinstance(value, tuple):
        for part in value:
            yield from _numbers_in(part)
    elif isinstance(value, int | float):
        yield value


def _is_moderate(number: float) -> bool:
    return number == 0 or 1e-9 <= abs(number) <= 1e15


def join(at: str, key: str) -> str:
    """The dotted path of `key` below `at`."""
    if at:
        return f"{at}.{key}"
    return key


def as_tuple(value: object) -> object:
    """A YAML list as the tuple that a frozen section holds; anything else is left for the type."""
    if isinstance(value, list):
        return tuple(value)
    return value


def _as_text(value: object) -> object:
    if isinstance(value, int):
        return str(value)
    return value


def _reference(value: object) -> object:
    """mergekit's mappings as MODEL, MODEL@REVISION or MODEL+ADAPTER."""
    if not isinstance(value, Mapping):
        return _as_text(value)
    try:
        return model_reference(value, "the model", "")
    except RecipeError:
        return value


def is_study_name(name: str) -> bool:
    """Whether a new study may have this name: it becomes part of the names of files."""
    return re.fullmatch(r"[^\W_][\w.-]*", name) is not None and len(name.encode()) <= LONGEST_NAME


def _name(value: str, info: ValidationInfo) -> str:
    require(
        info.context is STORED or is_study_name(value),
        "",
        "is not a study's name",
        value,
        f"Use letters, digits, dots, underscores and dashes, a letter or digit first, at most "
        f"{LONGEST_NAME} bytes.",
    )
    return value


def _seed(value: int, info: ValidationInfo) -> int:
    require(
        info.context is STORED or 0 <= value < 2**32,
        "",
        "is out of range",
        value,
        f"Use a whole number from 0 to {2**32 - 1}.",
    )
    return value


def _weight(value: float) -> float:
    require(
        value == 0 or 1e-6 <= abs(value) <= 10**6,
        "",
        "is out of range",
        value,
        "Use 0, or a weight whose size is from 0.000001 to 1000000.",
    )
    return value


def _absolute(path: str, info: ValidationInfo) -> str:
    folder = info.context
    if not isinstance(folder, Path):
        return path
    try:
        return str((folder / Path(path).expanduser()).resolve())
    except (OSError, ValueError, RuntimeError) as error:  # ~nobody, a loop of links, a NUL
        remedy = "Write another path."
        require(False, "", f"is not a path: {error}", path, remedy)
        raise


def folder_or_name(ref: str, info: ValidationInfo) -> str:
    """A local folder as an absolute path; a name on the hub is left unchanged."""
    folder = info.context
    if not isinstance(folder, Path):
        return ref
    # a revision changes nothing about a folder
    named = []
    for name in (ref, ref.rpartition("@")[0]):
        if name and is_there(folder / name):
            named.append(name)
    if ref.startswith((".", "/", "~")) or named:
        return _absolute(named[0] if named else ref, info)
    return ref


def model_path(ref: str, info: ValidationInfo) -> str:
    """MODEL or MODEL+ADAPTER with absolute folders; names on the hub stay as they are."""
    folder = info.context
    if not isinstance(folder, Path) or is_there(folder / ref):
        return folder_or_name(ref, info)
    return "+".join(folder_or_name(part, info) for part in ref.split("+"))


# The context of a validation is the folder that paths are relative to; without one they are left
# unchanged. STORED is the context of a study that is in a storage already.
Text = Annotated[str, BeforeValidator(_as_text)]
StudyName = Annotated[Text, AfterValidator(_name)]
Seed = Annotated[
    int,
    AfterValidator(_seed),
    WithJsonSchema({"type": "integer", "minimum": 0, "maximum": 2**32 - 1}),
]
PathText = Annotated[Text, AfterValidator(_absolute)]
ModelRef = Annotated[
    str,
    BeforeValidator(_reference, json_schema_input_type=str | dict[str, Any]),
    AfterValidator(model_path),
]
Weight = Annotated[float, AfterValidator(_weight)]  # in a sum of scores
Texts = Annotated[tuple[Text, ...], BeforeValidator(as_tuple)]
Paths = Annotated[tuple[PathText, ...], BeforeValidator(as_tuple)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(as_tuple)]
Pair = Annotated[tuple[float, float], BeforeValidator(as_tuple)]
