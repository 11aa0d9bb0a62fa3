"""A section that is stored and shown as its file was written, with `${NAME}` not filled in."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypeAlias

from pydantic import PrivateAttr

from evomerge.study.environment import Place, expanded, find, texts_with_variables
from evomerge.study.section import Section

# place, the text to store there, and the value that it stands for
Written: TypeAlias = tuple[tuple[Place, str, str], ...]
# free texts in form only: their values are names, and are checked when a stored study is read
CHECKED = (
    ("study",),
    ("search", "source_study"),
    ("search", "time_limit"),
    ("genome", "merge_method"),
)


class AsWritten(Section):
    """The texts with `${NAME}` beside the values that they have become."""

    _written: Written = PrivateAttr(default=())

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dicts, every default written out, as the study is stored and shown."""
        data = self.filled()
        for at, text, value in self._written:
            if find(data, at) == value:  # else the key has been changed since
                find(data, at[:-1])[at[-1]] = text
        return data

    def filled(self) -> dict[str, Any]:
        """`to_dict` with each `${NAME}` filled in: to run by, not to store."""
        return self.model_dump(mode="json")

    def replace(self, **changes: Any) -> Self:
        """A copy with these keys changed, validated again. Raises pydantic's ValidationError."""
        return super().replace(**changes).with_variables_of(self)

    def with_variables_of(self, other: AsWritten) -> Self:
        """The same section, which stores what it shares with another one as that one does."""
        self._written = other._written
        return self

    def with_variables(
        self,
        texts: Mapping[Place, str],
        environ: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> Self:
        """The same section, which stores these texts of its file as they are written.

        A path that is relative to the file's `folder` is stored below it.
        """
        data, written = self.filled(), []
        for at, text in texts.items():
            leaf = _leaf(data, at)
            value = find(data, leaf)
            if not isinstance(value, str) or not _is_free_text(type(self), leaf):
                continue
            filled = expanded(text, environ)
            if value != filled:  # it has become an absolute path
                if Path(filled).expanduser().is_absolute():
                    text = str(Path(text).expanduser())
                elif folder is not None and "+" not in text:
                    text = str(folder / text)
                else:
                    continue
            written.append((leaf, text, value))
        self._written = tuple(written)
        return self

    def with_stored_variables(self, stored: Mapping[str, Any]) -> Self:
        """The same section, read from what `to_dict` has given."""
        return self.with_variables(dict(texts_with_variables(stored)))


def _leaf(data: Any, at: Place) -> Place:
    """Where a text of the file is in the section, which has a mapping or list for some texts."""
    found = find(data, at)
    if isinstance(found, Mapping) and "name" in found:
        return (*at, "name")
    if isinstance(found, list) and len(found) == 1:
        return (*at, 0)
    return at


def _is_free_text(section: type[Section], at: Place) -> bool:
    """Whether the text at a place may be any: not one of a few choices, and not a name."""
    if at in CHECKED:
        return False
    annotation: Any = section
    for part in at:
        if isinstance(part, str):
            sections = [t for t in _inside(annotation) if _is_section(t)]
            if not sections:  # within a mapping of the user's own
                return True
            annotation = sections[0].model_fields[part].annotation
    return str in _inside(annotation)


def _inside(annotation: Any) -> list[Any]:
    """The annotation and every type within its unions and tuples."""
    found = [annotation]
    for argument in typing.get_args(annotation):
        found += _inside(argument)
    return found


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)
