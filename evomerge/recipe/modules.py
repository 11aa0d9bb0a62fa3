"""`slices:`, `models:`, or either of them under `modules: {default: …}`, which means the same.

Of a model with several modules, such as a vision tower, the text decoder may be merged in slices
and the other modules be the base's: modules: {text_decoder: {slices: […]}, vision_tower: {models:
[{model: BASE}]}}.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.errors import RecipeError, UnsupportedRecipe
from evomerge.recipe.mergekit_keys import MERGEKIT
from evomerge.recipe.method_traits import METHODS
from evomerge.recipe.unread_keys import UnreadKeys

ONLY_MODULE = "default"  # of a model that is not made of several
TEXT_MODULE = "text_decoder"  # of one that is


@dataclass(frozen=True)
class Listed:
    """What is merged, unchecked: the items of `kind`, and the module's own parameters."""

    kind: str  # slices or models
    items: list[Any]
    parameters: Any
    where: str
    modules: tuple[str, ...] = ()  # of a model with several


def listed(data: Mapping[str, Any], where: str, unread: UnreadKeys) -> Listed:
    """The one list of a configuration.

    Raises RecipeError, UnsupportedRecipe for modules that only mergekit itself merges.
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
    modules, named = data["modules"], ONLY_MODULE
    if _keeps_other_modules(data):
        named = TEXT_MODULE
    elif not isinstance(modules, Mapping) or set(modules) != {ONLY_MODULE}:
        raise UnsupportedRecipe(
            f"`modules` other than `{ONLY_MODULE}` are supported only where all but "
            f"`{TEXT_MODULE}` are the base's",
            where=where,
            found=list(modules) if isinstance(modules, Mapping) else modules,
            remedy=MERGEKIT,
        )
    module, where = modules[named], f"{where}, modules.{named}"
    kinds = []
    if isinstance(module, Mapping):
        kinds = [key for key in ("slices", "models") if module.get(key)]
    if len(kinds) != 1:
        raise RecipeError(
            "needs exactly one of `slices` and `models`",
            where=where,
            found=module,
            remedy=f"Write modules: {{{named}: {{slices: […]}}}}.",
        )
    unread.check(module, ("slices", "models", "parameters"), where)
    items, parameters = _items(module, kinds[0], where), module.get("parameters")
    several = tuple(modules) if named == TEXT_MODULE else ()
    return Listed(kinds[0], items, parameters, where, several)


def _keeps_other_modules(data: Mapping[str, Any]) -> bool:
    """Whether every module but the text decoder is the base's."""
    modules, method = data["modules"], METHODS.get(str(data.get("merge_method")))
    if not isinstance(modules, Mapping) or TEXT_MODULE not in modules:
        return False
    others = [module for name, module in modules.items() if name != TEXT_MODULE]
    base = {"models": [{"model": data.get("base_model")}]}
    return method is not None and method.keeps_a_lone_base and all(one == base for one in others)


def in_modules(data: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """A configuration of slices or models as that of the text decoder, other modules being kept."""
    kind = "slices" if "slices" in data else "models"
    modules = {name: {"models": [{"model": data["base_model"]}]} for name in names}
    modules[TEXT_MODULE] = {kind: data[kind]}
    return {**{key: value for key, value in data.items() if key != kind}, "modules": modules}


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
