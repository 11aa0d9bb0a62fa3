"""Vectors that a search is compared with: the parents, and one weight for all slices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from evomerge.genome.model_walk import walk
from evomerge.genome.search_space import SearchSpace

Vector = tuple[float, ...]


def parent_vector(space: SearchSpace, sibling: int | None) -> Vector:
    """One sibling alone, or the base (None): weights 1 and 0, densities 1."""
    ref = space.base_model if sibling is None else space.siblings[sibling]
    if space.method != "slerp":
        return _fill(space, lambda model: float(model == ref), density=1.0)
    for edge, (first, _) in enumerate(walk(len(space.models))):
        if space.models[first] == ref:
            return (float(edge),) * space.dimensions
    # of two models, the second is the walk's end
    return tuple(gene.high for gene in space.genes)


def uniform_vectors(space: SearchSpace, weight: float) -> tuple[Vector, ...]:
    """The merges with one weight for all slices and siblings.

    There is none, one, or for slerp one for each pair of models. The weight is t for slerp; for
    linear it is what the siblings share, and the base has the rest. Without a base the siblings'
    mean is all there is. Weights that the method does not reach are left out.
    """
    if space.method == "slerp":
        if not 0 < weight < 1:  # at the ends are the parents
            return ()
        edges = range(len(walk(len(space.models))))
        return tuple((edge + weight,) * space.dimensions for edge in edges)
    if space.method != "linear":
        return (_fill(space, lambda _: weight),)
    if space.base_model is None:
        return (_fill(space, lambda _: 1 / len(space.models)),)
    if 1 - weight < space.weight_bounds[0]:
        return ()
    share = weight / len(space.siblings)
    return (_fill(space, lambda model: 1 - weight if model == space.base_model else share),)


def is_uniform(space: SearchSpace, vector: Sequence[float]) -> bool:
    """Whether all slices and siblings have one weight, whatever the densities: a parent can."""
    if space.method == "slerp":
        return len(set(vector)) == 1
    shared: set[float] = set()
    for m, ref in enumerate(space.models):
        weights = set()
        for g in range(len(space.slices)):
            for f in range(len(space.filter_sets)):
                weights.add(vector[space.position(g, m, f, 0)])
        if len(weights) > 1:
            return False
        if ref in space.siblings:
            shared |= weights
    return len(shared) == 1


def reference_vectors(space: SearchSpace, weights: Sequence[float]) -> list[tuple[str, Vector]]:
    """(role, vector) of the parents, and of each of the weights for all slices and siblings."""
    found: list[tuple[str, Vector]] = []
    if space.has_base:
        found.append(("parent", parent_vector(space, None)))
    for m in range(len(space.siblings)):
        found.append(("parent", parent_vector(space, m)))
    # of one sibling, weight 1 is the sibling
    ones = (1.0,) if len(space.siblings) > 1 else ()
    for weight in (*weights, *ones):
        found += [("uniform", vector) for vector in uniform_vectors(space, weight)]
    return list(dict.fromkeys(found))


def _fill(
    space: SearchSpace, weight: Callable[[str], float], density: float | None = None
) -> Vector:
    """One weight per model in every slice and filter set; densities: the start's unless given."""
    dense = space.start_density if density is None else density
    entry: list[float] = []
    for ref in space.models:
        numbers = [weight(ref), dense][: len(space.parameters)]
        entry += numbers * len(space.filter_sets)
    return tuple(entry) * len(space.slices)
