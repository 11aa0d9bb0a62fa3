"""The assignment of a recipe's parameters and tensors to merged tensors, by mergekit's rules.

`genome/search_space.py` and `genome/decoding.py` make the recipe from a vector; `settings.py` has
the filters and gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from evomerge.errors import ModelError, RecipeError
from evomerge.merging.architecture.architecture import LIKE_LLAMA, Architecture
from evomerge.merging.architecture.roles import Role
from evomerge.merging.checkpoints.model_folder import ModelFolder
from evomerge.merging.checkpoints.stored_layers import layers_of
from evomerge.merging.methods.registry import MergeMethod, get_method
from evomerge.merging.settings import evaluate, filters_of, is_filtered, is_gradient
from evomerge.merging.tensor_plan import TensorPlan, kept
from evomerge.recipe import MethodParameter, Recipe, Slice, Source
from evomerge.recipe.parameter_checks import check_value, check_within


@dataclass(frozen=True)
class LayerPosition:
    """The place that a tensor's parameters come from."""

    piece: Slice
    layer: int | None  # within the slice; None outside the layers
    t: float  # 0 to 1 along the slice's layers, for gradients


class Layout:
    """A recipe laid over models of `n_layers` layers."""

    def __init__(
        self,
        recipe: Recipe,
        n_layers: int,
        architecture: Architecture = LIKE_LLAMA,
        depths: Mapping[str, int] | None = None,
    ) -> None:
        """`architecture` is the donor's; `depths` are the layers of models of another depth.

        Raises RecipeError for a slice past the end.
        """
        self.recipe, self.architecture = recipe, architecture
        self.method: MergeMethod = get_method(recipe.merge_method)
        self._layers: list[LayerPosition] = []
        for i, piece in enumerate(recipe.slices):
            _check_ranges(piece, n_layers, depths or {}, f"slices[{i}]")
            self._layers += _positions(piece, n_layers)
        self.restacked = self._is_restacked(n_layers)  # some layer leaves its place

    def _is_restacked(self, n_layers: int) -> bool:
        for i, position in enumerate(self._layers):
            if any(_input_layer(source, position) != i for source in position.piece.sources):
                return True
        return len(self._layers) != n_layers

    @cached_property
    def filtered(self) -> bool:
        """Whether some parameter has filters, so that tensors of one layer may differ."""
        return any(is_filtered(setting) for setting in self._settings())

    @cached_property
    def _has_gradients(self) -> bool:
        return any(is_gradient(setting) for setting in self._settings())

    def _settings(self) -> Iterator[Any]:
        """Every parameter's setting."""
        yield from self.recipe.parameters.values()
        for piece in self.recipe.slices:
            yield from piece.parameters.values()
            for source in piece.sources:
                yield from source.parameters.values()

    @property
    def n_layers(self) -> int:
        """Layers of the merged model."""
        return len(self._layers)

    @property
    def lenders(self) -> list[tuple[str, int]]:
        """(model, layer) whose names and settings each merged layer has: the donor's if it can."""
        lenders = []
        for position in self._layers:
            source = position.piece.sources[0]
            for candidate in position.piece.sources:
                if candidate.model == self.recipe.donor:
                    source = candidate
            lenders.append((source.model, _input_layer(source, position)))
        return lenders

    def names(self, models: Mapping[str, ModelFolder]) -> list[str]:
        """The merged model's tensors, sorted: the order in which mergekit merges.

        The donor lends its names; a head is merged when it or any model of the head's slice stores
        one. Raises ModelError when tensors are missing.
        """
        donor_ref, head = self.recipe.donor, self.architecture.head
        donor = models[donor_ref]
        plain = set()
        for name in donor.keys:
            if name != head and self.architecture.split(name) is None:
                plain.add(name)
        if any(models[ref].head in models[ref].keys for ref in (donor_ref, *self.head_givers)):
            plain.add(head)
        lent = {donor_ref: layers_of(donor)}
        for i, (ref, layer) in enumerate(self.lenders):
            if ref not in lent:
                lent[ref] = layers_of(models[ref])
            plain |= {f"{before}{i}{after}" for before, after in lent[ref][layer]}
        return sorted(plain)

    @property
    def head_givers(self) -> list[str]:
        """The models that a merged head is made of."""
        return [ref for ref, _ in self.inputs(self.architecture.head)]

    def inputs(self, name: str) -> list[tuple[str, str]]:
        """(model, name) of every tensor that may go into an output tensor, the lender's first."""
        position = self.position(name)
        inputs = [self._input(name, source, position) for source in position.piece.sources]
        donor = self.recipe.donor
        return sorted(inputs, key=lambda place: place[0] != donor)

    def position(self, name: str) -> LayerPosition:
        """A layer's own slice; outside the layers the first or the last, by the tensor's role.

        t is 0 outside the layers. Raises ModelError for a layer that is too many.
        """
        parts = self.architecture.split(name)
        if parts is None:
            in_last = self.architecture.role(name) == Role.LAST
            return LayerPosition(self.recipe.slices[-1 if in_last else 0], None, 0.0)
        if parts[1] >= self.n_layers:
            raise ModelError(
                f"tensor {name} is beyond the configuration's {self.n_layers} layers",
                remedy="Correct config.json.",
            )
        return self._layers[parts[1]]

    def stays(self, name: str) -> bool:
        """Whether the tensor is the donor's own: outside the text path, in a recipe of slices.

        So are gradients along the layers. A recipe of whole models with single numbers, or a filter
        that names the tensor, merges it like the first slice.
        """
        if self.architecture.role(name) != Role.OUTSIDE or self.architecture.split(name):
            return False
        if self.recipe.modules:
            return True
        piece = self.recipe.slices[0]
        whole = all(source.layers is None for source in piece.sources)
        if whole and not self._has_gradients:
            return False
        levels = [piece.parameters, self.recipe.parameters]
        levels += [source.parameters for source in piece.sources]
        for level in levels:
            for setting in level.values():
                for text in filters_of(setting):
                    if self.architecture.names_outside(text, name):
                        return False
        return True

    def plan(self, name: str) -> TensorPlan:
        """How a tensor is merged. Raises RecipeError when the method lacks a parameter."""
        if self.stays(name):
            return kept(self.recipe.donor, name)
        method, position = self.method, self.position(name)
        piece = position.piece
        base, sources = None, piece.sources
        if method.sets_base_apart:
            sources = piece.siblings
            for source in piece.sources:
                if source.model == piece.base_model:
                    base = self._input(name, source, position)
        densities: tuple[float, ...] = ()
        if method.has_densities:
            densities = self._each("density", name, sources, 1.0)
        weights: tuple[float, ...] = ()
        normalize, scale, rescale = False, 1.0, False
        if method.weighted:
            weights = self._each("weight", name, sources)
        if method.weighted and method.normalizes:
            normalize = bool(self.parameter("normalize", name, default=method.normalize))
        if method.takes_deltas and method.scales:
            scale = float(self.parameter("lambda", name, default=1.0))
            rescale = bool(self.parameter("rescale", name, default=method.rescale))
        parameters, by_sibling = {}, {}
        for key, own in method.own.items():
            if own.per_model:
                by_sibling[key] = self._each(key, name, sources, own.default)
                if own.within_density:
                    check_within(key, by_sibling[key], densities, name)
            else:
                parameters[key] = self._method_parameter(key, name, own)
        drawing = 0
        if method.draws:
            drawing = sum(density < 1 for density in densities)
        return TensorPlan(
            self.recipe.merge_method,
            base,
            tuple(self._input(name, source, position) for source in sources),
            weights,
            densities,
            normalize,
            scale,
            rescale,
            drawing,
            parameters,
            by_sibling,
            method.samples,
        )

    def parameter(
        self, key: str, name: str, source: Source | None = None, default: Any = None
    ) -> Any:
        """A parameter's value for a tensor: the source's before the slice's before the recipe's."""
        position = self.position(name)
        levels = [position.piece.parameters, self.recipe.parameters]
        filtered = name
        if source is not None:
            levels.insert(0, source.parameters)
            filtered = self._input(name, source, position)[1]
        for level in levels:
            if key in level:
                value = evaluate(key, level[key], filtered, position.t)
                if value is not None:
                    return value
        return default

    def _method_parameter(self, key: str, name: str, own: MethodParameter) -> float:
        """A parameter of the method itself, such as slerp's t."""
        value = self.parameter(key, name, default=own.default)
        if value is None:
            raise RecipeError(
                f"`{key}` is not set for {name}",
                remedy=f"Add parameters: {{{key}: …}} to the slice or the recipe.",
            )
        check_value(key, float(value), own, name)  # a gradient may lie between whole numbers
        return float(value)

    def _input(self, name: str, source: Source, position: LayerPosition) -> tuple[str, str]:
        """(model, name) of the tensor that a source gives to an output tensor."""
        parts = self.architecture.split(name)
        if parts is not None:
            before, _, after = parts
            name = f"{before}{_input_layer(source, position)}{after}"
        return source.model, name

    def _each(
        self, key: str, name: str, sources: tuple[Source, ...], default: float | None = None
    ) -> tuple[float, ...]:
        """A parameter's value for each source."""
        values = []
        for source in sources:
            value = self.parameter(key, name, source, default)
            if value is None:
                raise RecipeError(
                    f"`{key}` is not set for {name}",
                    where=source.model,
                    remedy=f"Add parameters: {{{key}: …}} to the source.",
                )
            values.append(float(value))
        return tuple(values)


def _positions(piece: Slice, n_layers: int) -> list[LayerPosition]:
    start, end = piece.sources[0].layers or (0, n_layers)
    count = end - start
    if count == 1:
        return [LayerPosition(piece, 0, 1.0)]
    return [LayerPosition(piece, layer, layer / (count - 1)) for layer in range(count)]


def _check_ranges(piece: Slice, n_layers: int, depths: Mapping[str, int], where: str) -> None:
    for source in piece.sources:
        depth = depths.get(source.model, n_layers)
        if source.layers is not None and source.layers[1] > depth:
            raise RecipeError(
                f"`layer_range` ends beyond the model's {depth} layers",
                where=where,
                found=list(source.layers),
                remedy="Lower its end.",
            )


def _input_layer(source: Source, position: LayerPosition) -> int:
    start = source.layers[0] if source.layers else 0
    return start + (position.layer or 0)
