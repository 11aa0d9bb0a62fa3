"""References to models as mergekit's configurations write them: names, paths and mappings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.errors import RecipeError

NAME_IT = "Name a folder or a hub name."
OLD_PREFIX = "model:"  # of `tokenizer_source` in the first versions of mergekit


def model_reference(value: Any, what: str, where: str) -> str:
    """A model as MODEL, MODEL@REVISION or MODEL+ADAPTER.

    It may be that text, or a mapping: mergekit itself writes a path with a blank in it as
    {model: {path, revision}, lora: {path, revision}}. Raises RecipeError, in which it is `what`.
    """
    if isinstance(value, str) and value:
        return value
    if isinstance(value, Mapping):
        model = value if "path" in value else value.get("model")
        found = _path(model)
        adapter = value.get("lora")
        if adapter is not None and found is not None:
            added = _path(adapter)
            found = None if added is None else f"{found}+{added}"
        if found is not None:
            return found
    raise RecipeError(f"{what} is not a name", where=where, found=value, remedy=NAME_IT)


def override_architecture(value: Any) -> str | None:
    """The class that a mapping gives its model in place of the one in config.json."""
    found = None
    if isinstance(value, Mapping):
        found = value.get("override_architecture")
    return found if isinstance(found, str) else None


def _path(value: Any) -> str | None:
    """PATH or PATH@REVISION; None: it is neither a text nor {path, revision}."""
    if isinstance(value, str):
        return value or None
    if not isinstance(value, Mapping) or not isinstance(value.get("path"), str):
        return None
    path, revision = value["path"], value.get("revision")
    if revision is None:
        return str(path)
    return f"{path}@{revision}" if isinstance(revision, str) else None


def tokenizer_of(value: Any, what: str, where: str) -> str:
    """`base`, `union` or a model: whose tokens are taken. Raises RecipeError."""
    source = model_reference(value, what, where)
    if source.startswith(OLD_PREFIX):
        name = source.removeprefix(OLD_PREFIX).strip()
        raise RecipeError(
            f"{what} has a form that mergekit no longer reads",
            where=where,
            found=source,
            remedy=f"Write {name}, without `{OLD_PREFIX}`.",
        )
    return source
