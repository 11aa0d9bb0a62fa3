"""The genome: which numbers are searched, and the one-to-one map between a vector and a recipe.

A vector is x[group, model, filter set, parameter], flattened: mergekit-evolve's order. A group is a
slice of layers, or with `smooth` a point of each model's line along the layers. The filter sets are
one per filter and the rest; the parameters are the weight, the density, and the method's own. Where
mergekit-evolve folds numbers into range (abs, clamp), here bounds keep them there, so two different
vectors give two different recipes.

Parameters that the models share, such as nearswap's t, come after all others, as x[group, filter
set, parameter]. A parent that no merge of the method gives has a vector outside all ranges.

From here to a tensor: `search_space.py` (the order of the numbers), `decoding.py` (vector to
recipe), `merging/layout.py` (`Layout.position` and `plan`: from a tensor to its slice and sources),
`merging/settings.py` (`evaluate`: filters and gradients).

della's epsilon is a share of what the density leaves it, so that every vector has a recipe; with
density 1 it leaves nothing, and its last bits may be rounded away.

slerp has one number u per slice. It walks along the edges of the complete graph of models: u = edge
+ t, and t goes from the edge's first model to its second. Of two models that is t itself.

Different recipes can still merge to the same bits, and nothing can be done about it: the dtype
rounds two weights to one (`Recipe.digest`, by which answers are kept, sees the rounded weights),
two densities keep equally many numbers, `normalize` takes out a common factor of the weights (of
one sibling: its whole weight), or slerp comes to a model again along another edge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from evomerge.errors import StudyFileError
from evomerge.genome.decoding import vector_to_recipe
from evomerge.genome.model_walk import walk
from evomerge.genome.search_space import Gene, SearchSpace
from evomerge.recipe import METHODS, Recipe
from evomerge.study import Study, mixes_models

Vector = tuple[float, ...]
__all__ = ["Gene", "Genome", "make_genome", "walk"]


class Genome(SearchSpace):
    """A search space with its recipes, and the vectors that a search is compared with."""

    def decode(self, vector: Sequence[float]) -> Recipe:
        """(d,) numbers -> recipe."""
        return vector_to_recipe(self, vector)

    def parent(self, sibling: int | None) -> Vector:
        """The vector of one sibling alone, or of the base (None): weights 1 and 0, densities 1."""
        ref = self.base_model
        if sibling is not None:
            ref = self.siblings[sibling]
        traits = METHODS[self.method]
        if traits.weighs_parents:
            return self._fill(lambda model: float(model == ref), density=1.0)
        if not traits.walks:
            return self.alone(self.all_models.index(str(ref)))
        for edge, (first, _) in enumerate(walk(len(self.models))):
            if self.models[first] == ref:
                return (float(edge),) * self.dimensions
        # of two models, the second is the walk's end
        return tuple(gene.high for gene in self.genes)

    def uniform(self, weight: float) -> tuple[Vector, ...]:
        """The merges with one weight for all slices and siblings.

        There is none, one, or for slerp one for each pair of models. The weight is t for slerp; for
        linear it is what the siblings share, and the base has the rest. Without a base the
        siblings' mean is all there is. Weights that the method does not reach are left out.
        """
        traits = METHODS[self.method]
        if traits.walks:
            if not 0 < weight < 1:  # at the ends are the parents
                return ()
            edges = range(len(walk(len(self.models))))
            return tuple((edge + weight,) * self.dimensions for edge in edges)
        if not traits.weighted:  # the one merge of the parameters' starts
            return (self._fill(lambda _: 0.0),)
        if traits.sets_base_apart and not traits.optional_base:
            return (self._fill(lambda _: weight),)
        if self.base_model is None or traits.optional_base:
            return (self._fill(lambda _: 1 / len(self.models)),)
        if 1 - weight < self.weight_bounds[0]:
            return ()
        shares = dict.fromkeys(self.siblings, weight / len(self.siblings))
        shares[self.base_model] = 1 - weight
        return (self._fill(lambda model: shares[model]),)

    def is_uniform(self, vector: Sequence[float]) -> bool:
        """Whether all slices and siblings have one weight, whatever the densities: a parent can."""
        if METHODS[self.method].walks:
            return len(set(vector)) == 1
        if self.is_alone(vector):
            return False
        if "weight" not in self.parameters:
            return vector == self.uniform(1.0)[0]
        shared: set[float] = set()
        for m, ref in enumerate(self.models):
            weights = set()
            for g in range(len(self.slices)):
                for f in range(len(self.filter_sets)):
                    weights.add(vector[self.index_of(g, m, f, 0)])
            if len(weights) > 1:
                return False
            if ref in self.siblings:
                shared |= weights
        return len(shared) == 1

    def references(self, weights: Sequence[float]) -> list[tuple[str, Vector]]:
        """(role, vector) of what a search is compared with: parents, and each uniform weight."""
        found: list[tuple[str, Vector]] = []
        if self.has_base:
            found.append(("parent", self.parent(None)))
        found += [("parent", self.parent(m)) for m in range(len(self.siblings))]
        if len(self.siblings) > 1:
            weights = (*weights, 1.0)  # of one sibling, weight 1 is the sibling
        for weight in weights:
            found += [("uniform", vector) for vector in self.uniform(weight)]
        return list(dict.fromkeys(found))

    def _fill(self, weight: Callable[[str], float], density: float | None = None) -> Vector:
        """One weight per model in every slice and filter set, one density for all."""
        if density is None:
            density = self.start_density
        searched, numbers = self.searched, []
        for ref in self.models:
            values = {"weight": weight(ref), "density": density}
            entry = []
            for key in self.parameters:
                entry.append(values[key] if key in values else searched[key].start)
            numbers += entry * len(self.filter_sets)
        shared = [searched[key].start for key in self.shared_parameters] * len(self.filter_sets)
        return (*numbers * len(self.slices), *shared * len(self.slices))


def make_genome(study: Study, n_layers: int) -> Genome:
    """The study's genome on a model of `n_layers`.

    Raises StudyFileError when the slices do not divide the layers.
    """
    section = study.genome
    size = n_layers
    if section.layer_granularity > 0:
        size = section.layer_granularity
    if n_layers % size:
        fits = [str(k) for k in range(1, n_layers + 1) if n_layers % k == 0]
        raise StudyFileError(
            f"`genome.layer_granularity` does not divide the model's {n_layers} layers",
            found=size,
            remedy=f"Use one of {', '.join(fits)}.",
        )
    method, models, normalize = section.merge_method, section.models, section.normalize
    if mixes_models(method) and section.base_model not in models:
        models = section.all_models
    if normalize is None:
        normalize = METHODS[method].normalizes_in_search
    return Genome(
        method=method,
        base_model=section.base_model,
        models=models,
        slices=tuple((start, start + size) for start in range(0, n_layers, size)),
        dtype=study.search.dtype,
        normalize=normalize,
        tokenizer_source=section.tokenizer_source,
        smooth=section.smooth,
        filters=section.filters or (),
        weight_bounds=study.bounds,
        start=_start(study, len(models), normalize),
        density_bounds=study.density_bounds,
        start_density=study.start_density,
        parameter_bounds=tuple(study.search.parameter_bounds.items()),
        outside=section.outside,
    )


def _start(study: Study, models: int, normalize: bool) -> float:
    """The first mean of every weight.

    1 is the sibling. Several deltas at full weight are seldom a good merge, so each of several
    models has an equal share, as in mergekit-evolve; normalised weights are shares anyway. Bounds
    that exclude this have their middle instead.
    """
    if study.search.start is not None:
        return study.search.start
    shared = not normalize and not METHODS[study.genome.merge_method].walks
    start = 1 / models if shared else 1.0
    low, high = study.bounds
    return start if low <= start <= high else (low + high) / 2
