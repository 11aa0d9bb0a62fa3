"""`slices:` and `models:` of a recipe, checked and in one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.errors import RecipeError
from evomerge.recipe.layers import Slice, Source
from evomerge.recipe.method_traits import METHODS, MethodTraits
from evomerge.recipe.model_references import model_reference
from evomerge.recipe.parameter_checks import ParameterChecks
from evomerge.recipe.unread_keys import misspelled


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
                remedy=_meant(item, "sources")
                or "Write sources: [{model, layer_range, parameters}].",
            )
        self.values.unread.check(item, ("sources", "parameters", "base_model"), where)
        base = self.base_model
        if item.get("base_model"):
            base = model_reference(item["base_model"], "`base_model`", where)
        sources, lengths = [], set()
        for i, entry in enumerate(item["sources"]):
            place = f"{where}.sources[{i}]"
            start, end = self._layers(entry, place)
            sources.append(self._source(entry, base, (start, end), place))
            lengths.add(end - start)
        if len(lengths) != 1:
            raise RecipeError(
                "the sources' layer ranges differ in length",
                where=where,
                found=sorted(lengths),
                remedy="Use the same number of layers from each.",
            )
        self._check_models(sources, base, where)
        parameters = self.values.parameters(item.get("parameters"), where)
        return Slice(tuple(sources), parameters, base)

    def models(self, items: Sequence[Any], where: str) -> Slice:
        """The list under `models:`, as one slice over all layers.

        A base that is not in it is added, as mergekit does.
        """
        sources = []
        for i, item in enumerate(items):
            sources.append(self._source(item, self.base_model, None, f"{where}, models[{i}]"))
        names = [source.model for source in sources]
        if self.base_model is not None and self.base_model not in names:
            sources.append(Source(self.base_model, None, {}))
        self._check_models(sources, self.base_model, f"{where}, models")
        return Slice(tuple(sources), {}, self.base_model)

    def _source(
        self, item: Any, base: str | None, layers: tuple[int, int] | None, where: str
    ) -> Source:
        """One model with its parameters; the layers are those of a slice."""
        model = _model(item, where)
        known = ["model", "parameters"]
        if layers is not None:
            known.append("layer_range")
        self.values.unread.check(item, known, where)
        parameters = self.values.parameters(item.get("parameters"), where)
        traits = METHODS[self.method]
        if parameters and model == base and (traits.takes_deltas or traits.optional_base):
            self.values.unread.add("parameters", f"{where} (the base)")
        else:
            self.values.note_shared(parameters, where)
        return Source(model, layers, parameters)

    def _layers(self, item: Any, where: str) -> tuple[int, int]:
        _model(item, where)
        given = item.get("layer_range")
        pair: list[int | None] = []
        if isinstance(given, list | tuple):
            pair = list(map(_whole, given))
        if len(pair) != 2 or pair[0] is None or pair[1] is None or not 0 <= pair[0] < pair[1]:
            raise RecipeError(
                "`layer_range` is not a pair of layers",
                where=where,
                found=given,
                remedy=_meant(item, "layer_range") or "Write [first, last + 1].",
            )
        return pair[0], pair[1]

    def _check_models(self, sources: Sequence[Source], base: str | None, where: str) -> None:
        """Refuse what mergekit refuses: no base, a model twice, too few or too many."""
        names, traits = [source.model for source in sources], METHODS[self.method]
        needs_base = traits.needs_base or (traits.optional_base and base is not None)
        if needs_base and base not in names:
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
        least, most = traits.siblings
        apart = base in names and traits.sets_base_apart
        found = len(names) - apart
        if found < least or (most is not None and found > most):
            raise RecipeError(
                f"{self.method} merges {number_of_models(traits)}",
                where=where,
                found=names,
                remedy="Add another." if found < least else "Remove the others.",
            )


def number_of_models(traits: MethodTraits) -> str:
    """How many sources a method takes, in words."""
    least, most = traits.siblings
    number = ("one model", "two models", "three models")[least + traits.needs_base - 1]
    text = f"at least {number}"
    if most == least:
        text = f"exactly {number}"
    if traits.needs_base:
        text += ", the base among them"
    return text + (" besides a base" if traits.optional_base else "")


def _model(item: Any, where: str) -> str:
    """The model that a source names."""
    if not isinstance(item, Mapping) or item.get("model") is None:
        remedy = _meant(item, "model") or "Name a folder or a hub name."
        raise RecipeError("has no `model`", where=where, found=item, remedy=remedy)
    return model_reference(item["model"], "`model`", where)


def _meant(item: Any, wanted: str) -> str | None:
    """The remedy for a key that is missing, where a misspelled one stands in its place."""
    for key in item if isinstance(item, Mapping) else ():
        if misspelled(str(key), (wanted,)):
            return f"Did you mean `{wanted}` by `{key}`?"
    return None


def _whole(value: Any) -> int | None:
    """A layer's number, which mergekit takes from 4, 4.0 and "4"; None: it is none."""
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1:
        return int(value)
    return None
