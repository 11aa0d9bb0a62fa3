"""`parameters:` of a recipe, a slice or a source: numbers, gradients and filters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.errors import RecipeError
from evomerge.recipe.mergekit_keys import BOOLEANS, COMMON_PARAMETERS, LARGEST, scalar
from evomerge.recipe.method_traits import METHODS, MethodParameter
from evomerge.recipe.unread_keys import UnreadKeys


@dataclass(frozen=True)
class ParameterChecks:
    """Refuses what mergekit would turn into NaN tensors, and notes what it ignores."""

    method: str
    dtype: str | None
    unread: UnreadKeys

    def parameters(self, value: Any, where: str) -> Mapping[str, Any]:
        """The mapping, or an empty one. Raises RecipeError naming the key and its place."""
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise RecipeError(
                "`parameters` is not a mapping",
                where=where,
                found=value,
                remedy="Write parameters: {weight: 1.0}.",
            )
        known = (*COMMON_PARAMETERS, *METHODS[self.method].parameters)
        self._check_names(value, known, where)
        for key, setting in value.items():
            if key in known:
                self._setting(key, setting, f"{where}, {key}")
            elif not _is_setting(setting):
                raise RecipeError(
                    "is not a parameter's value",
                    where=f"{where}, {key}",
                    found=setting,
                    remedy="Remove it: nothing reads it.",
                )
        return dict(value)

    def _check_names(self, value: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
        """Note the parameters that the method does not read; refuse those of an own method."""
        own: set[str] = set()
        for traits in METHODS.values():
            if not traits.built_in:
                own |= traits.parameters.keys()
        for key in value:
            if key in own.difference(known):
                raise RecipeError(
                    f"parameter `{key}` is not supported",
                    where=where,
                    remedy=f"Supported parameters: {', '.join(known)}.",
                )
        self.unread.check(value, known, where)
        for key in value:
            if key in known and key not in METHODS[self.method].reads:
                self.unread.add(key, where)

    def note_shared(self, parameters: Mapping[str, Any], where: str) -> None:
        """Note a source's parameters that are read from slices and the top level only."""
        for key in parameters:
            traits = METHODS[self.method]
            if key not in (*traits.by_source, "int8_mask") and key in traits.reads:
                self.unread.add(key, where)

    def _setting(self, key: str, setting: Any, where: str) -> None:
        """A scalar, a gradient (list of scalars), or one or several {filter, value}."""
        items = _listed(setting)
        filtered = any(isinstance(item, Mapping) for item in items)
        for item in items:
            if filtered:
                self._filtered(key, item, where)
            else:
                self._scalar(key, item, where)

    def _filtered(self, key: str, item: Any, where: str) -> None:
        if (
            not isinstance(item, Mapping)
            or "value" not in item
            or not isinstance(item.get("filter"), str | None)
        ):
            raise RecipeError(
                "is not a {filter, value} mapping",
                where=where,
                found=item,
                remedy="Write - filter: NAME / value: NUMBER.",
            )
        self.unread.check(item, ("filter", "value"), where)
        for value in _listed(item["value"]):
            self._scalar(key, value, where)

    def _scalar(self, key: str, value: Any, where: str) -> None:
        try:
            number = scalar(key, value)
        except (TypeError, ValueError, OverflowError):
            wanted = "true or false" if key in BOOLEANS else "a number"
            raise RecipeError(
                f"is not {wanted}",
                where=where,
                found=value,
                remedy="Write a number, a list of numbers or filters.",
            ) from None
        if not math.isfinite(number):
            raise RecipeError(
                f"`{key}` is not finite",
                where=where,
                found=number,
                remedy="Use a finite one: NaN and infinite weights give NaN tensors.",
            )
        traits = METHODS[self.method]
        if abs(number) > LARGEST[self.dtype if traits.rounds_weights else None]:
            raise RecipeError(
                f"`{key}` is infinite in {self.dtype or 'float32'}",
                where=where,
                found=number,
                remedy="Use a smaller one.",
            )
        if key == "density" and not 0 < number <= 1:
            raise RecipeError(
                "`density` is out of range",
                where=where,
                found=number,
                remedy="Use more than 0 and at most 1: the share that is kept.",
            )
        if key in traits.own:
            check_value(key, number, traits.own[key], where)


def check_value(key: str, number: float, parameter: MethodParameter, where: str) -> None:
    """Raise RecipeError for a number that a method's own parameter cannot have."""
    if parameter.kind == "whole" and number != int(number):
        raise RecipeError(
            f"`{key}` is not a whole number",
            where=where,
            found=number,
            remedy="Use a whole one, and as a gradient one that is whole in every layer.",
        )
    low, high = parameter.low, parameter.high
    if (low is None or number >= low) and (high is None or number <= high):
        return
    limits = []
    if low is not None:
        limits.append(f"at least {low:g}")
    if high is not None:
        limits.append(f"at most {high:g}")
    raise RecipeError(
        f"`{key}` is out of range",
        where=where,
        found=number,
        remedy=f"Use {' and '.join(limits)}.",
    )


def check_within(
    key: str, values: tuple[float, ...], densities: tuple[float, ...], name: str
) -> None:
    """Raise RecipeError where density - value to density + value are no chances, as of della."""
    for value, density in zip(values, densities, strict=True):
        if density < 1 and not (density - value > 0 and density + value < 1):
            raise RecipeError(
                f"`{key}` leaves the range 0 to 1 around the density {density:g}",
                where=name,
                found=value,
                remedy=f"Use less than {min(density, 1 - density):g}.",
            )


def _listed(value: Any) -> list[Any]:
    """The items of a list; an empty list is not a gradient, but a wrong value."""
    return value if isinstance(value, list) and value else [value]


def _is_setting(value: Any) -> bool:
    """Whether mergekit takes this as a value, of a parameter that nothing reads."""
    for item in _listed(value):
        given = item.get("value") if isinstance(item, Mapping) else item
        if not all(isinstance(single, str | int | float) for single in _listed(given)):
            return False
    return True
