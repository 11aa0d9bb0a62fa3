"""A recipe's parameter as a number for one tensor: mergekit's gradients and filters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.recipe import BOOLEANS, scalar


def evaluate(key: str, setting: Any, name: str, t: float) -> float | bool | None:
    """The value for the tensor `name` at t in 0 to 1 along its slice; None where no filter matches.

    `setting` is a number, a gradient (numbers spread evenly over t), or filters, of which the first
    that matches the name decides.
    """
    items = [setting] if isinstance(setting, Mapping) else setting
    if not isinstance(items, list):
        return scalar(key, items)
    if not isinstance(items[0], Mapping):
        return _interpolate(key, items, t)
    for item in items:
        if item.get("filter") in (None, "*") or item["filter"] in name:
            return evaluate(key, item["value"], name, t)
    return None


def filters_of(setting: Any) -> list[str]:
    """A setting's filters, without those that stand for the rest."""
    if not is_filtered(setting):
        return []
    items = [setting] if isinstance(setting, Mapping) else setting
    filters = []
    for item in items:
        if item.get("filter") not in (None, "*"):
            filters.append(item["filter"])
    return filters


def is_filtered(setting: Any) -> bool:
    """Whether a setting is one or several filters, and not a number or a gradient."""
    items = [setting] if isinstance(setting, Mapping) else setting
    return isinstance(items, list) and isinstance(items[0], Mapping)


def is_gradient(setting: Any) -> bool:
    """Whether a setting, or one of its filters, has several numbers along the layers."""
    if is_filtered(setting):
        items = [setting] if isinstance(setting, Mapping) else setting
        return any(is_gradient(item["value"]) for item in items)
    return isinstance(setting, list) and len(setting) > 1


def _interpolate(key: str, setting: list[Any], t: float) -> float | bool:
    """Linear between the two nearest values; booleans take the one before t."""
    values = [scalar(key, item) for item in setting]
    scaled = t * (len(values) - 1)
    low = int(scaled)
    if key in BOOLEANS:
        return values[low]
    share, high = scaled - low, min(len(values) - 1, low + 1)
    return (1 - share) * values[low] + share * values[high]
