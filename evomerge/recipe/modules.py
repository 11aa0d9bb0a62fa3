"""`slices:`, `models:`, or either of them under `modules: {default: …}`, which means the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.errors import RecipeError, UnsupportedRecipe
from evomerge.recipe.mergekit_keys import MERGEKIT
from evomerge.recipe.unread_keys import UnreadKeys

ONLY_MODULE = "default"  # of a model that is not made of several


@dataclass(frozen=True)
class Listed:
    """What is merged, unchecked: the items of `kind`, and the module's own parameters."""

    kind: str  # slices or models
    items: list[Any]
    parameters: Any
    where: str


def listed(data: Mapping[str, Any], where: str, unread: UnreadKeys) -> Listed:
    """The one list of a configuration.

    Raises RecipeError, UnsupportedRecipe for several modules, which only mergekit itself merges.
    """
    given = [key for key in ("slices", "models", "modules") if data.get(key)]
    if len(given) != 1:
        raise RecipeError(
            "needs exactly one of `slices`, `models` and `modules`",
            where=where,
            found=given or None,
            remedy="Keep one of them." if given else "Add one of them.",
        )
    if given != ["modules"]:
        return Listed(given[0], _items(data, given[0], where), None, where)
    modules = data["modules"]
    if not isinstance(modules, Mapping) or set(modules) != {ONLY_MODULE}:
        raise UnsupportedRecipe(
            f"`modules` other than `{ONLY_MODULE}` are not supported",
            where=where,
            found=list(modules) if isinstance(modules, Mapping) else modules,
            remedy=MERGEKIT,
        )
    module, where = modules[ONLY_MODULE], f"{where}, modules.{ONLY_MODULE}"
    kinds = []
    if isinstance(module, Mapping):
        kinds = [key for key in ("slices", "models") if module.get(key)]
    if len(kinds) != 1:
        raise RecipeError(
            "needs exactly one of `slices` and `models`",
            where=where,
            found=module,
            remedy="Write modules: {default: {slices: […]}}.",
        )
    unread.check(module, ("slices", "models", "parameters"), where)
    return Listed(kinds[0], _items(module, kinds[0], where), module.get("parameters"), where)


def _items(data: Mapping[str, Any], kind: str, where: str) -> list[Any]:
    items = data[kind]
    if not isinstance(items, list):
        raise RecipeError(
            f"`{kind}` is not a list",
            where=where,
            found=items,
            remedy="Write one item per line, each after a dash.",
        )
    return items


def over(upper: Mapping[str, Any], lower: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of one level that rank above another's, as one level.

    Where none of the upper ones' filters matches, the lower setting decides.
    """
    whole = dict(lower)
    for key, setting in upper.items():
        filters = [setting] if isinstance(setting, Mapping) else setting
        if key in lower and isinstance(filters, list) and isinstance(filters[0], Mapping):
            below = lower[key]
            if isinstance(below, Mapping):
                below = [below]
            if not isinstance(below, list) or not isinstance(below[0], Mapping):
                below = [{"value": below}]
            setting = [*filters, *below]
        whole[key] = setting
    return whole
