"""`slices:` and `models:` of a recipe, checked and in one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.errors import RecipeError
from evomerge.recipe.layers import Slice, Source
from evomerge.recipe.mergekit_keys import METHODS, check_keys
from evomerge.recipe.parameter_checks import ParameterChecks


@dataclass(frozen=True)
class SourceChecks:
    """The checked forms of slices and sources; every method raises RecipeError naming the place."""

    method: str
    base_model: str | None
    values: ParameterChecks

    def slice(self, item: Any, where: str) -> Slice:
        """One item of `slices:`."""
        if (
            not isinstance(item, Mapping)
            or not isinstance(item.get("sources"), list)
            or not item["sources"]
        ):
            raise RecipeError(
                "has no list of `sources`",
                where=where,
                found=item,
                remedy="Write sources: [{model, layer_range, parameters}].",
            )
        check_keys(item, ("sources", "parameters", "base_model"), where)
        sources, lengths = [], set()
        for i, entry in enumerate(item["sources"]):
            place = f"{where}.sources[{i}]"
            start, end = self._layers(entry, place)
            sources.append(self._source(entry, (start, end), place))
            lengths.add(end - start)
        if len(lengths) != 1:
            raise RecipeError(
                "the sources' layer ranges differ in length",
                where=where,
                found=sorted(lengths),
                remedy="Use the same number of layers from each.",
            )
        base = item.get("base_model") or self.base_model
        self._check_models(sources, base, where)
        parameters = self.values.parameters(item.get("parameters"), where)
        return Slice(tuple(sources), parameters, base)

    def models(self, items: Sequence[Any], where: str) -> Slice:
        """The list under `models:`, as one slice over all layers.

        A base that is not in it is added, as mergekit does.
        """
        sources = []
        for i, item in enumerate(items):
            place = f"{where}, models[{i}]"
            source = self._source(item, None, place)
            if item.get("layer_range") is not None:
                raise RecipeError(
                    "`layer_range` has no effect under `models`",
                    where=place,
                    remedy="Remove it, or write `slices`.",
                )
            sources.append(source)
        names = [source.model for source in sources]
        if self.base_model is not None and self.base_model not in names:
            sources.append(Source(self.base_model, None, {}))
        self._check_models(sources, self.base_model, f"{where}, models")
        return Slice(tuple(sources), {}, self.base_model)

    def _source(self, item: Any, layers: tuple[int, int] | None, where: str) -> Source:
        """One model with its parameters."""
        _check_source(item, where)
        parameters = self.values.parameters(item.get("parameters"), where)
        return Source(item["model"], layers, parameters)

    def _layers(self, item: Any, where: str) -> tuple[int, int]:
        _check_source(item, where)
        given = item.get("layer_range")
        if (
            not isinstance(given, list | tuple)
            or [type(n) for n in given] != [int, int]
            or not 0 <= given[0] < given[1]
        ):
            raise RecipeError(
                "`layer_range` is not a pair of layers",
                where=where,
                found=given,
                remedy="Write [first, last + 1].",
            )
        return given[0], given[1]

    def _check_models(self, sources: Sequence[Source], base: str | None, where: str) -> None:
        """Refuse what mergekit refuses: no base, a model twice, slerp of not exactly two."""
        names = [source.model for source in sources]
        if METHODS[self.method].needs_base and base not in names:
            raise RecipeError(
                "the base is not among the `sources`",
                where=where,
                remedy=f"Add {{model: {base}, layer_range}}.",
            )
        for name in names:
            if names.count(name) > 1:
                raise RecipeError(
                    "a model is listed twice",
                    where=where,
                    found=name,
                    remedy="Keep one, with the sum of the weights.",
                )
        if self.method == "slerp" and len(names) != 2:
            raise RecipeError(
                "slerp merges exactly two models",
                where=where,
                found=names,
                remedy="Keep the base and one other.",
            )


def _check_source(item: Any, where: str) -> None:
    if not isinstance(item, Mapping) or not isinstance(item.get("model"), str):
        raise RecipeError(
            "has no `model`", where=where, found=item, remedy="Name a folder or a hub name."
        )
    check_keys(item, ("model", "parameters", "layer_range"), where)
