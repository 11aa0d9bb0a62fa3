"""Where a search starts beside its first mean: known recipes as first candidates, and another
study's distribution.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.errors import StudyFileError
from evomerge.genome.weights import Genome
from evomerge.merging.layout import Layout
from evomerge.recipe import Recipe, read_recipe
from evomerge.searching.ledger import Ledger, sqlite_path
from evomerge.searching.sampler import Distribution, ReplayedCmaEs
from evomerge.study import Study

OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def first_vectors(study: Study, genome: Genome) -> list[tuple[float, ...]]:
    """The vectors of `search.recipes` and `search.vectors`. Raises StudyFileError for one that the
    genome does not hold.
    """
    vectors = [encode(genome, read_recipe(path), path) for path in study.search.recipes]
    for i, vector in enumerate(study.search.vectors):
        where = f"search.vectors[{i}]"
        if len(vector) != genome.dimensions:
            raise StudyFileError(
                f"the genome has {genome.dimensions} numbers",
                where=where,
                found=len(vector),
                remedy="Write one for each.",
            )
        vectors.append(vector)
    bounds = [(gene.low, gene.high) for gene in genome.genes]
    for vector in vectors:
        outside = next(
            (x for x, (low, high) in zip(vector, bounds, strict=True) if not low <= x <= high), None
        )
        if outside is not None:
            raise StudyFileError(
                "a first candidate lies outside the bounds",
                found=outside,
                remedy="Widen search.bounds, or remove it.",
            )
    return vectors


def encode(genome: Genome, recipe: Recipe, where: str) -> tuple[float, ...]:
    """The vector whose merge a recipe is: the inverse of `Genome.decode`, also for recipes that are
    written otherwise.

    For genomes of slices, not smooth and not slerp. Raises StudyFileError for a recipe that is no
    merge of the genome.
    """
    if genome.smooth or genome.method == "slerp":
        raise StudyFileError(
            "a smooth or slerp genome takes vectors",
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
    n_layers = genome.slices[-1][1]
    layout = Layout(recipe, n_layers)
    sets = [*genome.filters, "anything"]
    vector: list[float] = []
    for start, _ in genome.slices:
        found = [
            _settings(layout, f"model.layers.{start}.{text}.weight", genome.models) for text in sets
        ]
        for m in range(len(genome.models)):
            for by_model in found:
                vector += by_model[m][: len(genome.parameters)]
    if recipe.tokenizer is not None and genome.tokenizer_source is None:
        raise StudyFileError(
            "it has a tokenizer of its own, the genome has none", where=where, remedy="Remove it."
        )
    if recipe.dtype not in (None, genome.dtype):
        raise StudyFileError(
            f"its dtype is not the study's {genome.dtype}",
            where=where,
            found=recipe.dtype,
            remedy="Set search.dtype.",
        )
    names = [
        f"model.layers.{layer}.{text}.weight" for layer in range(n_layers) for text in sets
    ] + list(OUTSIDE)
    ours = Layout(genome.decode(vector), n_layers)
    wrong = next(
        (
            n
            for n in names
            if _all_settings(layout, n, genome.models) != _all_settings(ours, n, genome.models)
        ),
        None,
    )
    if wrong is not None or {_place(ref) for ref in recipe.siblings} - {
        _place(ref) for ref in genome.models
    }:
        found_at = wrong or "its models"
        raise StudyFileError(
            "is no merge of this genome",
            where=where,
            found=found_at,
            remedy="Its slices and models must be the genome's.",
        )
    return tuple(vector)


def _settings(layout: Layout, name: str, models: tuple[str, ...]) -> list[tuple[float, float]]:
    """(weight, density) of each model in a tensor; 0 and 1 for a model that has no part in it."""
    how = layout.plan(name)
    weights = how.weights or (1.0,) * len(how.siblings)
    densities = how.densities or (1.0,) * len(how.siblings)
    found: Mapping[str, tuple[float, float]] = {
        _place(ref): (float(w), float(d))
        for (ref, _), w, d in zip(how.siblings, weights, densities, strict=True)
    }
    return [found.get(_place(ref), (0.0, 1.0)) for ref in models]


def _all_settings(layout: Layout, name: str, models: tuple[str, ...]) -> tuple[object, ...]:
    how = layout.plan(name)
    base = None if how.base is None else _place(how.base[0])
    return (_settings(layout, name, models), base, how.normalize, how.scale, how.rescale)


def _place(ref: str) -> str:
    """A model by where it lies, however that is written."""
    return str(Path(ref).resolve()) if Path(ref).exists() else ref


def remember_start(
    sampler: ReplayedCmaEs, start: Distribution, ledger: Ledger, first: bool = False
) -> None:
    """The distribution of the first generation, from elsewhere: used now, and whenever the study
    goes on.

    With `first` its mean is the first candidate too, so that it can be chosen as the winner.
    """
    data = {
        "mean": start.mean.tolist(),
        "sigma": start.sigma,
        "cov": start.cov.tolist(),
        "first": first,
    }
    ledger.remember("start", data)
    restore_start(sampler, {"start": data})


def restore_start(sampler: ReplayedCmaEs, facts: Mapping[str, Any]) -> None:
    """What `remember_start` left in a study's facts, if it did."""
    if "start" in facts:
        start = facts["start"]
        mean = np.clip(np.array(start["mean"], dtype=float), *sampler.bounds.T)
        sampler.start = Distribution(
            mean, float(start["sigma"]), np.array(start["cov"], dtype=float)
        )
        sampler.first_sigma = sampler.start.sigma
        sampler.first = [mean, *sampler.first] if start.get("first") else sampler.first


def source_url(url: str, study: Study) -> str:
    """An SQLite study has a file of its own; the source's lies beside it, unless one file holds
    both.
    """
    path = sqlite_path(url)
    beside = None if path is None else path.with_name(f"{study.search.source_study}.db")
    return f"sqlite:///{beside}" if beside is not None and beside.exists() else url
