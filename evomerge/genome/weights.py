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

from collections.abc import Sequence

from evomerge.errors import StudyFileError
from evomerge.genome import references
from evomerge.genome.decoding import vector_to_recipe
from evomerge.genome.model_walk import walk
from evomerge.genome.search_space import Gene, SearchSpace
from evomerge.recipe import Recipe
from evomerge.study import MIXING, Study

__all__ = ["Gene", "Genome", "make_genome", "walk"]

# methods that mergekit-evolve normalises unless told otherwise
NORMALIZED = ("ties", "dare_ties", "linear")


class Genome(SearchSpace):
    """A search space with its recipes, and the vectors that a search is compared with."""

    def decode(self, vector: Sequence[float]) -> Recipe:
        """(d,) numbers -> recipe."""
        return vector_to_recipe(self, vector)

    def parent(self, sibling: int | None) -> tuple[float, ...]:
        """The vector of one sibling alone, or of the base (None): weights 1 and 0, densities 1."""
        return references.parent_vector(self, sibling)

    def uniform(self, weight: float) -> tuple[tuple[float, ...], ...]:
        """The vectors with one weight for all slices and siblings; several for slerp."""
        return references.uniform_vectors(self, weight)

    def is_uniform(self, vector: Sequence[float]) -> bool:
        """Whether all slices and siblings have one weight, whatever the densities."""
        return references.is_uniform(self, vector)

    def references(self, weights: Sequence[float]) -> list[tuple[str, tuple[float, ...]]]:
        """(role, vector) of what a search is compared with: parents and uniform weights."""
        return references.reference_vectors(self, weights)


def make_genome(study: Study, n_layers: int) -> Genome:
    """The study's genome on a model of `n_layers`.

    Raises StudyFileError when the slices do not divide the layers.
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
    method, models, normalize = section.merge_method, section.models, section.normalize
    if method in MIXING and section.base_model not in models:
        models = section.all_models
    if normalize is None:
        normalize = method in NORMALIZED
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
        start=study.search.start,
        density_bounds=study.density_bounds,
        start_density=study.start_density,
    )
