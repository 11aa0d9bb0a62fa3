"""What the sections of the study file share: strictness, value types, and how a rule is stated.

YAML values are not converted: no text becomes a number, `true` is not 1, and numbers are finite.
Three conversions are allowed: a whole number where a number or a text is expected, and a list where
a tuple is expected.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationInfo
from pydantic_core import PydanticCustomError

from evomerge.errors import RecipeError
from evomerge.recipe.model_references import model_reference


class Section(BaseModel):
    """A frozen group of keys; a key that it does not have is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def replace(self, **changes: Any) -> Self:
        """A copy with these keys changed, validated again. Raises pydantic's ValidationError."""
        return type(self)(**(dict(self) | changes))


@dataclass(frozen=True)
class Remedy:
    """An annotation of a key's type: what to write, where its limits alone do not say it well."""

    text: str


def require(holds: object, key: str, what: str, found: object, remedy: str) -> None:
    """State one rule of a validator: unless it `holds`, the `key` of this section `what`.

    An empty `key` is the field or section that the validator belongs to.
    """
    if not holds:
        raise PydanticCustomError(
            "study_rule",
            "`{key}` {what}. {remedy}",
            {"key": key, "what": what, "found": found, "remedy": remedy},
        )


def join(at: str, key: str) -> str:
    """The dotted path of `key` below `at`."""
    return f"{at}.{key}" if at else key


def as_tuple(value: object) -> object:
    """A YAML list as the tuple that a frozen section holds; anything else is left for the type."""
    return tuple(value) if isinstance(value, list) else value


def _as_text(value: object) -> object:
    return str(value) if isinstance(value, int) else value


def _reference(value: object) -> object:
    """mergekit's mappings as MODEL, MODEL@REVISION or MODEL+ADAPTER."""
    if not isinstance(value, Mapping):
        return _as_text(value)
    try:
        return model_reference(value, "the model", "")
    except RecipeError:
        return value


def _name(value: str) -> str:
    require(
        re.fullmatch(r"[\w.-]+", value),
        "",
        "is not a study's name",
        value,
        "Use letters, digits, dots, underscores and dashes.",
    )
    return value


def _absolute(path: str, info: ValidationInfo) -> str:
    folder: Path | None = info.context
    if folder is None:
        return path
    return str((folder / Path(path).expanduser()).resolve())


def folder_or_name(ref: str, info: ValidationInfo) -> str:
    """A local folder as an absolute path; a name on the hub is left unchanged."""
    folder: Path | None = info.context
    if folder is None:
        return ref
    # a revision changes nothing about a folder
    named = [name for name in (ref, ref.rpartition("@")[0]) if name and (folder / name).exists()]
    if ref.startswith((".", "/", "~")) or named:
        return _absolute(named[0] if named else ref, info)
    return ref


def model_path(ref: str, info: ValidationInfo) -> str:
    """MODEL or MODEL+ADAPTER with absolute folders; names on the hub stay as they are."""
    folder: Path | None = info.context
    if folder is None or (folder / ref).exists():
        return folder_or_name(ref, info)
    return "+".join(folder_or_name(part, info) for part in ref.split("+"))


# The context of a validation is the folder that paths are relative to; without one they are left
# unchanged.
Text = Annotated[str, BeforeValidator(_as_text)]
StudyName = Annotated[Text, AfterValidator(_name)]
PathText = Annotated[Text, AfterValidator(_absolute)]
ModelRef = Annotated[
    str,
    BeforeValidator(_reference, json_schema_input_type=str | dict[str, Any]),
    AfterValidator(model_path),
]
Texts = Annotated[tuple[Text, ...], BeforeValidator(as_tuple)]
Paths = Annotated[tuple[PathText, ...], BeforeValidator(as_tuple)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(as_tuple)]
Pair = Annotated[tuple[float, float], BeforeValidator(as_tuple)]
