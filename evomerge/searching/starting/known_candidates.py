"""Known recipes and vectors as the first candidates of a search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evomerge.errors import StudyFileError
from evomerge.genome.genome import Genome
from evomerge.merging.layout import Layout
from evomerge.recipe import METHODS, Recipe, read_recipe
from evomerge.study import Study

# names like Llama's stand for those of any model: both recipes are laid over the same ones
NOT_IN_LAYERS = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def first_vectors(study: Study, genome: Genome) -> list[tuple[float, ...]]:
    """The vectors of `search.recipes` and `search.vectors`.

    Raises StudyFileError for one that the genome does not contain.
    """
    vectors = [encode(genome, read_recipe(path), path) for path in study.search.recipes]
    for i, vector in enumerate(study.search.vectors):
        if len(vector) != genome.dimensions:
            raise StudyFileError(
                f"the genome has {genome.dimensions} numbers",
                where=f"search.vectors[{i}]",
                found=len(vector),
                remedy="Write one for each.",
            )
        vectors.append(vector)
    for vector in vectors:
        for x, gene in zip(vector, genome.genes, strict=True):
            if not gene.low <= x <= gene.high:
                raise StudyFileError(
                    "a first candidate is outside the bounds",
                    found=x,
                    remedy="Widen search.bounds, or remove it.",
                )
    return vectors


def encode(genome: Genome, recipe: Recipe, where: str) -> tuple[float, ...]:
    """The vector whose merge a recipe is: the inverse of `Genome.decode`.

    The recipe may be written in another way than `decode` would write it. For genomes of slices,
    not smooth, with weights and densities alone. Raises StudyFileError for a recipe that is no
    merge of the genome.
    """
    _check_form(genome, recipe, where)
    n_layers = genome.slices[-1][1]
    layout = Layout(recipe, n_layers)
    kinds = [*genome.filters, "anything"]
    vector: list[float] = []
    for start, _ in genome.slices:
        found = []
        for text in kinds:
            found.append(_settings(layout, _tensor(start, text), genome.models))
        for m in range(len(genome.models)):
            for by_model in found:
                vector += by_model[m][: len(genome.parameters)]
    ours = Layout(genome.decode(vector), n_layers)
    names = list(NOT_IN_LAYERS)
    for layer in range(n_layers):
        names += [_tensor(layer, text) for text in kinds]
    for name in names:
        if _all_settings(layout, name, genome.models) != _all_settings(ours, name, genome.models):
            raise _not_a_merge(where, name)
    if not set(map(_resolved, recipe.siblings)) <= set(map(_resolved, genome.models)):
        raise _not_a_merge(where, "its models")
    return tuple(vector)


def _check_form(genome: Genome, recipe: Recipe, where: str) -> None:
    """Raise StudyFileError for a recipe of another kind than the genome's."""
    walks = METHODS[genome.method].walks
    plain = not walks and set(genome.parameters) <= {"weight", "density"}
    if genome.smooth or genome.shared_parameters or not plain:
        raise StudyFileError(
            f"a smooth genome, or one of {genome.method}'s own numbers, takes vectors",
            where="search.recipes",
            found=where,
            remedy="Use search.vectors.",
        )
    if recipe.merge_method != genome.method:
        raise StudyFileError(
            f"its method is not the genome's {genome.method}",
            where=where,
            found=recipe.merge_method,
            remedy="Remove it.",
        )
    if recipe.tokenizer is not None and genome.tokenizer_source is None:
        raise StudyFileError(
            "it has its own tokenizer, but the genome has none", where=where, remedy="Remove it."
        )
    if recipe.dtype not in (None, genome.dtype):
        raise StudyFileError(
            f"its dtype is not the study's {genome.dtype}",
            where=where,
            found=recipe.dtype,
            remedy="Set search.dtype.",
        )


def _not_a_merge(where: str, found: str) -> StudyFileError:
    return StudyFileError(
        "is not a merge of this genome",
        where=where,
        found=found,
        remedy="Use the genome's slices and models.",
    )


def _tensor(layer: int, text: str) -> str:
    return f"model.layers.{layer}.{text}.weight"


def _settings(layout: Layout, name: str, models: Sequence[str]) -> list[tuple[float, float]]:
    """(weight, density) of each model in a tensor; 0 and 1 for a model that has no part in it."""
    plan = layout.plan(name)
    found: dict[str, tuple[float, float]] = {}
    for i, (ref, _) in enumerate(plan.siblings):
        weight = plan.weights[i] if plan.weights else 1.0
        density = plan.densities[i] if plan.densities else 1.0
        found[_resolved(ref)] = (float(weight), float(density))
    return [found.get(_resolved(ref), (0.0, 1.0)) for ref in models]


def _all_settings(layout: Layout, name: str, models: Sequence[str]) -> tuple[object, ...]:
    plan = layout.plan(name)
    base = None if plan.base is None else _resolved(plan.base[0])
    return (_settings(layout, name, models), base, plan.normalize, plan.scale, plan.rescale)


def _resolved(ref: str) -> str:
    """The location of a model, however it is written."""
    return str(Path(ref).resolve()) if Path(ref).exists() else ref
