"""The one interface of retrieval: which of the base's texts are nearest to given texts, many at
once.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

BATCH = 128  # texts compared at once: 128 x 5,000 similarities take 5 MB
DIGITS = 9  # similarities that differ by less are equal: the last bits depend on the order of sums

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Nearest:
    """For each of n texts its k nearest, nearest first: `indices` (n, k) into the base's texts,
    `scores` (n, k) from 0 to 1.

    Where a text has fewer than k, because one equals it, the index is -1 and the score 0.
    """

    indices: NDArray[np.int64]
    scores: Matrix


class Retriever(Protocol):
    """Knows the texts of a base. A text of the base that equals the asked one is never found: it
    would hand over the answer.

    Equal scores keep the base's order, so every result is a function of the base and the text
    alone.
    """

    def nearest(self, texts: Sequence[str], k: int) -> Nearest: ...

    def over(self, inputs: Sequence[str]) -> Retriever:
        """One of the same kind for other texts, which finds also what equals the asked one: a
        document hands over no answer.
        """
        ...


class VectorRetriever:
    """The retrievers that compare by a product of vectors; a subclass gives the products.

    `itself`: may a text be found that equals the asked one.
    """

    def __init__(self, inputs: Sequence[str], itself: bool = False) -> None:
        self.inputs = [normal_form(text) for text in inputs]
        self.places: dict[str, list[int]] = {}
        for i, text in enumerate(self.inputs if not itself else ()):
            self.places.setdefault(comparison_key(text), []).append(i)

    def similar(self, texts: Sequence[str]) -> Matrix:
        """Similarities (texts, base), 0 to 1; the texts are normal_form."""
        raise NotImplementedError

    def nearest(self, texts: Sequence[str], k: int) -> Nearest:
        return in_batches(self._batch, [normal_form(text) for text in texts], min(k, len(self.inputs)))

    def _batch(self, texts: Sequence[str], k: int) -> Nearest:
        scores: Matrix = np.clip(self.similar(texts), 0.0, 1.0).round(DIGITS)
        for row, text in zip(scores, texts, strict=True):
            row[self.places.get(comparison_key(text), [])] = -np.inf
        return largest(scores, k)


def in_batches(
    search: Callable[[Sequence[str], int], Nearest], texts: Sequence[str], k: int
) -> Nearest:
    """Search BATCH texts at a time and put the results together."""
    found = [search(texts[i : i + BATCH], k) for i in range(0, len(texts), BATCH)]
    if not found:
        return Nearest(np.empty((0, k), np.int64), np.empty((0, k)))
    return Nearest(
        np.concatenate([f.indices for f in found]), np.concatenate([f.scores for f in found])
    )


def largest(scores: Matrix, k: int) -> Nearest:
    """The k largest of each row, equal ones in order; -inf marks what may not be found."""
    indices = np.full((len(scores), k), -1, np.int64)
    kept = np.zeros((len(scores), k))
    for i, row in enumerate(scores):
        least = np.partition(row, len(row) - k)[len(row) - k] if 0 < k < len(row) else -np.inf
        candidates = np.flatnonzero((row >= least) & (row > -np.inf))
        best = candidates[np.argsort(-row[candidates], kind="stable")][:k]
        indices[i, : len(best)], kept[i, : len(best)] = best, row[best]
    return Nearest(indices, kept)


def comparison_key(text: str) -> str:
    """What two texts have in common that are the same but for spaces and the width of their
    characters.
    """
    return normal_form(text).replace(" ", "")


def normal_form(text: str) -> str:
    """Unicode NFKC, so that full-width and half-width forms are the same, and single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).split())
