"""The genome: which numbers are searched, and the one-to-one map between a vector and a recipe.

A vector is x[group, model, filter set, parameter], flattened: mergekit-evolve's order. A group is a
slice of layers, or with `smooth` a point of each model's line along the layers. The filter sets are
one per filter and the rest; the parameters are the weight, and for ties and dare the density. Where
mergekit-evolve folds numbers into range (abs, clamp), here bounds keep them there, so two different
vectors give two different recipes.

slerp has one number u per slice. It walks along the edges of the complete graph of models: u = edge
+ t, and t goes from the edge's first model to its second. Of two models that is t itself.

Different recipes can still merge to the same bits, and nothing can be done about it: the dtype
rounds two weights to one (`Recipe.digest`, by which answers are kept, sees the rounded weights),
two densities keep equally many numbers, `normalize` takes out a common factor of the weights (of
one sibling: its whole weight), or slerp comes to a model again along another edge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from evomerge.errors import StudyFileError
from evomerge.recipe import Recipe, task_arithmetic_recipe
from evomerge.study import DENSE, MIXING, Study

# methods that mergekit-evolve normalises unless told otherwise
NORMALIZED = ("ties", "dare_ties", "linear")


@dataclass(frozen=True)
class Gene:
    """One number of a vector."""

    name: str  # its parameter in the Optuna study
    label: str  # for a table or a chart
    low: float
    high: float
    start: float
    # its range over the weight's: a step size in units of the weight, times this, is one of this
    # number
    scale: float


@dataclass(frozen=True)
class Genome:
    """What is searched and what stays fixed. `models` have numbers of their own; for linear and
    slerp the base may be one.
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

    @property
    def parameters(self) -> tuple[str, ...]:
        """What each model has in each group and filter set."""
        return ("weight", "density") if self.method in DENSE else ("weight",)

    @property
    def siblings(self) -> tuple[str, ...]:
        """The models beside the base."""
        return tuple(model for model in self.models if model != self.base_model)

    @property
    def has_base(self) -> bool:
        """Whether the base alone is one of the genome's merges."""
        return self.base_model is not None

    @property
    def dimensions(self) -> int:
        """Length d of a vector."""
        return len(self.genes)

    @property
    def names(self) -> tuple[str, ...]:
        """One name per number; they stand as parameters in the Optuna study."""
        return tuple(gene.name for gene in self.genes)

    @property
    def genes(self) -> tuple[Gene, ...]:
        """Every number's name and range, in the vector's order."""
        return tuple(self._walking() if self.method == "slerp" else self._mixing())

    def _walking(self) -> Iterator[Gene]:
        """slerp: the walk is as long as it has edges; start and scale take the share of it that
        they are of the weight's range.
        """
        low, high = self.weight_bounds
        length = float(len(walk(len(self.models))))
        for start, end in self.slices:
            middle = length * (self.start - low) / (high - low)
            yield Gene(
                f"layers_{start}_{end - 1}",
                f"{start}–{end - 1}",
                0.0,
                length,
                middle,
                length / (high - low),
            )

    def _mixing(self) -> Iterator[Gene]:
        (low, high), (sparse, dense) = self.weight_bounds, self.density_bounds
        ranges = {
            "weight": (low, high, self.start, 1.0),
            "density": (sparse, dense, self.start_density, (dense - sparse) / (high - low)),
        }
        sets = (
            [(f"_filter_{text}", f" {text}") for text in self.filters] + [("_rest", " rest")]
            if self.filters
            else [("", "")]
        )
        for g, (start, end) in enumerate(self.slices):
            group = (
                (f"point_{g}", f"point {g}")
                if self.smooth
                else (f"layers_{start}_{end - 1}", f"{start}–{end - 1}")
            )
            for m, ref in enumerate(self.models):
                model = (f"_model_{m}", f" {Path(ref).name}") if len(self.models) > 1 else ("", "")
                for filtered in sets:
                    for key in self.parameters:
                        parameter = ("", "") if key == "weight" else (f"_{key}", f" {key}")
                        name, label = map(
                            "".join, zip(group, model, parameter, filtered, strict=True)
                        )
                        yield Gene(name, label, *ranges[key])

    def decode(self, vector: Sequence[float]) -> Recipe:
        """(d,) numbers -> recipe."""
        x = [float(number) for number in vector]
        assert len(x) == self.dimensions
        if self.method == "slerp":
            slices = [
                self._edge(start, end, u) for (start, end), u in zip(self.slices, x, strict=True)
            ]
            # whose tokenizer: the same for every u
            return self._recipe(base_model=self.base_model or self.models[0], slices=slices)
        if (
            self.method == "task_arithmetic"
            and not self.filters
            and not self.smooth
            and self.tokenizer_source is None
        ):
            n = len(self.models)
            rows = [x[s * n : (s + 1) * n] for s in range(len(self.slices))]
            return task_arithmetic_recipe(
                str(self.base_model), self.models, self.slices, rows, self.dtype, self.normalize
            )
        base = [{"model": self.base_model}] if self.base_model not in (None, *self.models) else []
        groups = (
            [range(len(self.slices))]
            if self.smooth
            else [range(g, g + 1) for g in range(len(self.slices))]
        )
        sources = [
            [
                {"model": ref, "parameters": self._settings(x, m, group)}
                for m, ref in enumerate(self.models)
            ]
            for group in groups
        ]
        named = {} if self.base_model is None else {"base_model": self.base_model}
        parameters = {"normalize": float(self.normalize)} | (
            {} if self.method in MIXING else {"int8_mask": 1.0}
        )
        if self.smooth:
            return self._recipe(**named, parameters=parameters, models=sources[0] + base)
        slices = [
            {"sources": [{"layer_range": list(layers), **source} for source in row + base]}
            for layers, row in zip(self.slices, sources, strict=True)
        ]
        return self._recipe(**named, parameters=parameters, slices=slices)

    def _recipe(self, **data: Any) -> Recipe:
        source = (
            {} if self.tokenizer_source is None else {"tokenizer_source": self.tokenizer_source}
        )
        return Recipe.from_dict(
            {"merge_method": self.method, "dtype": self.dtype, **source, **data}
        )

    def _settings(self, x: Sequence[float], m: int, groups: Sequence[int]) -> dict[str, Any]:
        """Model m's parameters in one group, or with several groups as lines through their points."""
        sets, n = len(self.filters) + 1, len(self.parameters)

        def value(f: int, p: int) -> Any:
            points = [x[((g * len(self.models) + m) * sets + f) * n + p] for g in groups]
            return points[0] if len(points) == 1 else points

        if not self.filters:
            return {key: value(0, p) for p, key in enumerate(self.parameters)}
        filters = (*self.filters, None)
        return {
            key: [{"filter": text, "value": value(f, p)} for f, text in enumerate(filters)]
            for p, key in enumerate(self.parameters)
        }

    def _edge(self, start: int, end: int, u: float) -> dict[str, Any]:
        """The slice at u; the walk's very end is the last edge's t = 1."""
        edges = walk(len(self.models))
        assert 0 <= u <= len(edges)
        edge = min(int(u), len(edges) - 1)
        pair = [self.models[i] for i in edges[edge]]
        sources = [{"layer_range": [start, end], "model": model} for model in pair]
        # u - edge is exact: no rounding
        return {"base_model": pair[0], "parameters": {"t": u - edge}, "sources": sources}

    def parent(self, sibling: int | None) -> tuple[float, ...]:
        """The vector of one sibling alone, or of the base (None): weights 1 and 0, densities 1."""
        ref = self.base_model if sibling is None else self.siblings[sibling]
        if self.method == "slerp":
            starts = [
                float(i)
                for i, (first, _) in enumerate(walk(len(self.models)))
                if self.models[first] == ref
            ]
            # of two models, the second is the walk's end
            return tuple(starts[0] if starts else gene.high for gene in self.genes)
        return self._fill(lambda model: float(model == ref), density=1.0)

    def uniform(self, weight: float) -> tuple[tuple[float, ...], ...]:
        """The merges with one weight for all slices and siblings: none, one, or for slerp one for
        each pair of models.

        The weight is t for slerp; for linear it is what the siblings share, and the base has the
        rest. Without a base the siblings' mean is all there is. Weights that the method does not
        reach are left out.
        """
        if self.method == "slerp":
            # at the ends are the parents
            edges = range(len(walk(len(self.models)))) if 0 < weight < 1 else ()
            return tuple((edge + weight,) * self.dimensions for edge in edges)
        if self.method == "linear":
            if self.base_model is None:
                return (self._fill(lambda _: 1 / len(self.models)),)
            if 1 - weight < self.weight_bounds[0]:
                return ()
            return (
                self._fill(
                    lambda model: (
                        1 - weight if model == self.base_model else weight / len(self.siblings)
                    )
                ),
            )
        return (self._fill(lambda _: weight),)

    def is_uniform(self, vector: Sequence[float]) -> bool:
        """Whether all slices and siblings have one weight, whatever the densities: a parent can."""
        if self.method == "slerp":
            return len(set(vector)) == 1
        weights = vector[:: len(self.parameters)]
        n, sets = len(self.models), len(self.filters) + 1
        by_model = [
            {weights[(g * n + m) * sets + f] for g in range(len(self.slices)) for f in range(sets)}
            for m in range(n)
        ]
        shared = set().union(*(by_model[self.models.index(ref)] for ref in self.siblings))
        return len(shared) == 1 and all(len(seen) == 1 for seen in by_model)

    def references(self, weights: Sequence[float]) -> list[tuple[str, tuple[float, ...]]]:
        """(role, vector) of what a search is compared with: the parents, and each of the weights
        for all slices and siblings.
        """
        parents = [self.parent(None)] if self.has_base else []
        parents += [self.parent(m) for m in range(len(self.siblings))]
        ones = (1.0,) if len(self.siblings) > 1 else ()  # of one sibling, that is the sibling
        uniform = [vector for weight in (*weights, *ones) for vector in self.uniform(weight)]
        return list(
            dict.fromkeys([*(("parent", v) for v in parents), *(("uniform", v) for v in uniform)])
        )

    def _fill(
        self, weight: Callable[[str], float], density: float | None = None
    ) -> tuple[float, ...]:
        """One weight per model in every slice and filter set; the densities are the start's unless
        told otherwise.
        """
        dense = self.start_density if density is None else density
        entry = [
            [weight(ref), dense][: len(self.parameters)] * (len(self.filters) + 1)
            for ref in self.models
        ]
        return tuple(number for numbers in entry for number in numbers) * len(self.slices)


def walk(n: int) -> tuple[tuple[int, int], ...]:
    """The complete graph's n (n - 1) / 2 edges, each once, each from where the last one ended.

    An odd number of nodes has such a round (Euler 1736): two nodes p, q join one of the nodes below
    p by 0 p 1 q 2 p … q (p-1) p q 0. An even number has none, so the last node is joined in pairs,
    0 n 1, 2 n 3, …, with a jump
    after each: the fewest that are possible.
    """
    path = [0]
    for p in range(1, n - 1, 2):
        for i in range(p - 1):
            path += [p + i % 2, i + 1]
        path += [p, p + 1, 0]
    edges = list(pairwise(path))
    if n % 2 == 0:
        edges += [(i, n - 1) if i % 2 == 0 else (n - 1, i) for i in range(n - 1)]
    return tuple(edges)


def make_genome(study: Study, n_layers: int) -> Genome:
    """The study's genome on a model of `n_layers`. Raises StudyFileError when the slices do not
    divide the layers.
    """
    section = study.genome
    size = section.layer_granularity if section.layer_granularity > 0 else n_layers
    if n_layers % size:
        fits = [str(k) for k in range(1, n_layers + 1) if n_layers % k == 0]
        raise StudyFileError(
            f"`genome.layer_granularity` does not divide the model's {n_layers} layers",
            found=size,
            remedy=f"Use one of {', '.join(fits)}.",
        )
    method = section.merge_method
    return Genome(
        method=method,
        base_model=section.base_model,
        models=section.models
        if method not in MIXING or section.base_model in section.models
        else section.all_models,
        slices=tuple((start, start + size) for start in range(0, n_layers, size)),
        dtype=study.search.dtype,
        normalize=method in NORMALIZED if section.normalize is None else section.normalize,
        tokenizer_source=section.tokenizer_source,
        smooth=section.smooth,
        filters=section.filters or (),
        weight_bounds=study.bounds,
        start=study.search.start,
        density_bounds=study.density_bounds,
        start_density=study.start_density,
    )
