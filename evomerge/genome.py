"""The genome: which numbers are searched, and the one-to-one map between a vector and a recipe.

A vector has one weight per slice and sibling, slice by slice: x[s * n_siblings + m]. Two different vectors give two
different recipes. Where bf16 rounds two weights to one, the recipes differ but the merged bits do not; `Recipe.digest`
sees the rounded weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evomerge.errors import StudyFileError
from evomerge.recipe import Recipe, task_arithmetic_recipe
from evomerge.study import Study


@dataclass(frozen=True)
class Genome:
    """Slices of layers, siblings, and what stays fixed."""

    base_model: str
    siblings: tuple[str, ...]
    slices: tuple[tuple[int, int], ...]  # [start, end) of layers
    dtype: str
    normalize: bool
    low: float
    high: float

    @property
    def dimensions(self) -> int:
        """Length d of a vector."""
        return len(self.slices) * len(self.siblings)

    @property
    def names(self) -> tuple[str, ...]:
        """One name per number; they stand as parameters in the Optuna study."""
        several = len(self.siblings) > 1
        return tuple(
            f"layers_{start}_{end - 1}" + (f"_model_{m}" if several else "")
            for start, end in self.slices
            for m in range(len(self.siblings))
        )

    def uniform(self, weight: float) -> tuple[float, ...]:
        """One weight for every slice and sibling."""
        return (weight,) * self.dimensions

    def parent(self, sibling: int | None) -> tuple[float, ...]:
        """The base (None), or one sibling alone with weight 1."""
        return tuple(float(sibling is not None and i % len(self.siblings) == sibling) for i in range(self.dimensions))

    def decode(self, vector: Sequence[float]) -> Recipe:
        """(d,) numbers -> recipe."""
        n = len(self.siblings)
        assert len(vector) == self.dimensions
        rows = [[float(w) for w in vector[s * n : (s + 1) * n]] for s in range(len(self.slices))]
        return task_arithmetic_recipe(self.base_model, self.siblings, self.slices, rows, dtype=self.dtype, normalize=self.normalize)


def make_genome(study: Study, n_layers: int) -> Genome:
    """The study's genome on a model of `n_layers`. Raises StudyFileError when the slices do not divide the layers."""
    size = study.genome.layer_granularity
    size = n_layers if size == -1 else size
    if n_layers % size:
        fits = [str(k) for k in range(1, n_layers + 1) if n_layers % k == 0]
        raise StudyFileError(
            f"`genome.layer_granularity` does not divide the model's {n_layers} layers", found=size, remedy=f"Use one of {', '.join(fits)}."
        )
    low, high = study.bounds
    return Genome(
        base_model=study.genome.base_model,
        siblings=study.genome.models,
        slices=tuple((start, start + size) for start in range(0, n_layers, size)),
        dtype=study.search.dtype,
        normalize=bool(study.genome.normalize),
        low=low,
        high=high,
    )
