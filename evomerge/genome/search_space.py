"""Which numbers are searched, in which order, with which names, bounds and starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evomerge.genome.model_walk import walk
from evomerge.recipe import METHODS, MethodParameter


@dataclass(frozen=True)
class Gene:
    """One number of a vector."""

    name: str  # its parameter in the Optuna study, such as "layers 0-1 · instruct"
    label: str  # for a table or a chart
    low: float
    high: float
    start: float
    # its range over the weight's: a step size in units of the weight, times this, is one of this
    # number
    scale: float


@dataclass(frozen=True)
class SearchSpace:
    """What is searched and what stays fixed.

    `models` have numbers of their own; for linear and slerp the base may be one of them.
    """

    method: str
    base_model: str | None
    models: tuple[str, ...]
    slices: tuple[tuple[int, int], ...]  # [start, end) of layers
    dtype: str
    normalize: bool = False
    tokenizer_source: str | None = None
    smooth: bool = False
    filters: tuple[str, ...] = ()
    weight_bounds: tuple[float, float] = (0.0, 2.0)
    start: float = 1.0
    density_bounds: tuple[float, float] = (0.1, 1.0)
    start_density: float = 0.8
    parameter_bounds: tuple[tuple[str, tuple[float, float]], ...] = ()  # of the method's own
    outside: str = "base"  # what tensors outside the text path are: the base's, or "first"

    @property
    def parameters(self) -> tuple[str, ...]:
        """What each model has in each group and filter set."""
        traits, keys = METHODS[self.method], []
        if traits.weighted or traits.walks:
            keys.append("weight")
        if traits.has_densities:
            keys.append("density")
        keys += [key for key, own in traits.searched.items() if own.per_model]
        return tuple(keys)

    @property
    def searched(self) -> Mapping[str, MethodParameter]:
        """The method's own parameters that have genes, with the ranges of this search."""
        own = dict(METHODS[self.method].searched)
        for key, bounds in self.parameter_bounds:
            own[key] = replace(own[key], search=bounds)
        return own

    @property
    def shared_parameters(self) -> tuple[str, ...]:
        """What each group and filter set has once, for all models."""
        searched = METHODS[self.method].searched
        return tuple(key for key, own in searched.items() if not own.per_model)

    @property
    def filter_sets(self) -> tuple[str | None, ...]:
        """The filters and None for the rest; without filters, the rest is everything."""
        return (*self.filters, None)

    @property
    def siblings(self) -> tuple[str, ...]:
        """The models other than the base."""
        return tuple(model for model in self.models if model != self.base_model)

    @property
    def all_models(self) -> tuple[str, ...]:
        """Every model, the base first."""
        first = () if self.base_model is None else (self.base_model,)
        return (*first, *self.siblings)

    def alone(self, model: int) -> tuple[float, ...]:
        """The vector of one of `all_models` alone, where no merge is that: outside all ranges."""
        return (-1.0 - model,) * self.dimensions

    def is_alone(self, vector: Sequence[float]) -> bool:
        """Whether it is a vector of `alone`."""
        traits = METHODS[self.method]
        if traits.weighs_parents or traits.walks:
            return False
        return tuple(vector) in [self.alone(model) for model in range(len(self.all_models))]

    @property
    def has_base(self) -> bool:
        """Whether the base alone is one of the genome's merges."""
        return self.base_model is not None

    @property
    def genes(self) -> tuple[Gene, ...]:
        """Every number's name and range, in the vector's order."""
        if METHODS[self.method].walks:
            return tuple(_walk_genes(self))
        return (*_model_genes(self), *_shared_genes(self))

    @property
    def dimensions(self) -> int:
        """Length d of a vector."""
        return len(self.genes)

    @property
    def names(self) -> tuple[str, ...]:
        """One name per number, as the Optuna study's parameters have them."""
        return tuple(gene.name for gene in self.genes)

    @property
    def shape(self) -> tuple[object, ...]:
        """What each number stands for, whatever the models are called."""
        sets: tuple[object, ...] = (len(self.models), self.filter_sets, self.parameters)
        if self.shared_parameters:
            sets += (self.method, self.shared_parameters)
        return (METHODS[self.method].walks, self.smooth, self.slices, *sets)

    def index_of(self, group: int, model: int, filter_set: int, parameter: int) -> int:
        """The index of x[group, model, filter set, parameter] in the flattened vector."""
        place = group * len(self.models) + model
        place = place * len(self.filter_sets) + filter_set
        return place * len(self.parameters) + parameter

    def shared_index_of(self, group: int, filter_set: int, parameter: int) -> int:
        """The index of a number that the models share; they come after all others."""
        first = self.index_of(len(self.slices), 0, 0, 0)
        place = group * len(self.filter_sets) + filter_set
        return first + place * len(self.shared_parameters) + parameter


def _walk_genes(space: SearchSpace) -> Iterator[Gene]:
    """One number per slice, from 0 to the walk's number of edges.

    Start and scale take the share of it that they are of the weight's range.
    """
    low, high = space.weight_bounds
    length = float(len(walk(len(space.models))))
    middle = length * (space.start - low) / (high - low)
    for g in range(len(space.slices)):
        name, label = _group(space, g)
        yield Gene(name, label, 0.0, length, middle, length / (high - low))


def model_names(refs: Sequence[str]) -> tuple[str, ...]:
    """What each model is called beside the others: its folder's name, with a number where shared.

    The adapter's name for `model+adapter`.
    """
    stems = [Path(ref).name or ref for ref in refs]
    numbered = [f"{stem}-{i}" for i, stem in enumerate(stems)]
    names = []
    for stem, other in zip(stems, numbered, strict=True):
        names.append(stem if stems.count(stem) == 1 else other)
    return tuple(names if len(set(names)) == len(names) else numbered)


def _model_genes(space: SearchSpace) -> Iterator[Gene]:
    names = model_names(space.models)
    for g in range(len(space.slices)):
        group, group_label = _group(space, g)
        for model in names:
            shown = f" {model}" if len(names) > 1 else ""
            for text in space.filter_sets:
                part, part_label = _filter(space, text)
                for key in space.parameters:
                    name, label = f"{group} · {model}", group_label + shown
                    if key != "weight":
                        name, label = f"{name} · {key}", f"{label} {key}"
                    yield _gene(space, key, name + part, label + part_label)


def _shared_genes(space: SearchSpace) -> Iterator[Gene]:
    for g in range(len(space.slices)):
        group, group_label = _group(space, g)
        for text in space.filter_sets:
            part, part_label = _filter(space, text)
            for key in space.shared_parameters:
                name, label = f"{group} · {key}{part}", f"{group_label} {key}{part_label}"
                yield _gene(space, key, name, label)


def _gene(space: SearchSpace, key: str, name: str, label: str) -> Gene:
    """The number of a parameter, with its range and its start."""
    low, high = space.weight_bounds
    if key == "weight":
        return Gene(name, label, low, high, space.start, 1.0)
    if key == "density":
        bounds, start = space.density_bounds, space.start_density
    else:
        own = space.searched[key]
        assert own.search is not None
        bounds, start = own.search, own.start
    return Gene(name, label, *bounds, start, (bounds[1] - bounds[0]) / (high - low))


def _group(space: SearchSpace, g: int) -> tuple[str, str]:
    """Name and label of a slice, or of a point of the lines."""
    if space.smooth:
        return f"point {g}", f"point {g}"
    start, end = space.slices[g]
    return f"layers {start}-{end - 1}", f"{start}–{end - 1}"


def _filter(space: SearchSpace, text: str | None) -> tuple[str, str]:
    """Name and label of a filter set."""
    if text is not None:
        return f" · {text}", f" {text}"
    if space.filters:
        return " · rest", " rest"
    return "", ""
