"""The interface of all retrievers: which texts of a base are nearest to given texts."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

BATCH = 128  # texts compared per batch: 128 x 5,000 similarities take 5 MB
DIGITS = 9  # similarities that differ by less are equal: the last bits depend on the order of sums

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Nearest:
    """The k nearest of each of n texts, nearest first.

    `indices` (n, k) are places among the base's texts, `scores` (n, k) similarities from 0 to 1.
    Where a text has fewer than k, because one equals it, the index is -1 and the score 0.
    """

    indices: NDArray[np.int64]
    scores: Matrix


class Retriever(Protocol):
    """Knows the texts of a base.

    A text of the base that equals the given one is never found: it would give away the answer.
    Equal scores keep the base's order, so every result is a function of the base and the text.
    """

    def nearest(self, texts: Sequence[str], k: int) -> Nearest: ...

    def over(self, inputs: Sequence[str]) -> Retriever:
        """A retriever for other texts, which also finds a text equal to the given one.

        It is for documents, which do not give away an answer.
        """
        ...


class VectorRetriever:
    """The base of the retrievers that compare by a product of vectors, which subclasses compute.

    `itself`: a text that equals the given one may be found.
    """

    def __init__(self, inputs: Sequence[str], itself: bool = False) -> None:
        self.inputs = list(map(normal_form, inputs))
        self.places: dict[str, list[int]] = {}
        if not itself:
            for i, text in enumerate(self.inputs):
                self.places.setdefault(comparison_key(text), []).append(i)

    def similar(self, texts: Sequence[str]) -> Matrix:
        """Similarities (texts, base), 0 to 1, of texts in normal form."""
        raise NotImplementedError

    def nearest(self, texts: Sequence[str], k: int) -> Nearest:
        """The k nearest of each text."""
        k = min(k, len(self.inputs))
        return in_batches(self._batch, list(map(normal_form, texts)), k)

    def _batch(self, texts: Sequence[str], k: int) -> Nearest:
        scores: Matrix = np.clip(self.similar(texts), 0.0, 1.0).round(DIGITS)
        for row, text in zip(scores, texts, strict=True):
            row[self.places.get(comparison_key(text), [])] = -np.inf
        return largest(scores, k)


def in_batches(
    search: Callable[[Sequence[str], int], Nearest], texts: Sequence[str], k: int
) -> Nearest:
    """Search BATCH texts at a time and concatenate the results."""
    found = [search(texts[i : i + BATCH], k) for i in range(0, len(texts), BATCH)]
    if not found:
        return Nearest(np.empty((0, k), np.int64), np.empty((0, k)))
    indices = np.concatenate([part.indices for part in found])
    scores = np.concatenate([part.scores for part in found])
    return Nearest(indices, scores)


def largest(scores: Matrix, k: int) -> Nearest:
    """The k largest of each row, equal ones in order; -inf marks what must not be found."""
    indices = np.full((len(scores), k), -1, np.int64)
    kept = np.zeros((len(scores), k))
    for i, row in enumerate(scores):
        least = -np.inf
        if 0 < k < len(row):
            least = np.partition(row, len(row) - k)[len(row) - k]
        candidates = np.flatnonzero((row >= least) & (row > -np.inf))
        best = candidates[np.argsort(-row[candidates], kind="stable")][:k]
        indices[i, : len(best)] = best
        kept[i, : len(best)] = row[best]
    return Nearest(indices, kept)


def comparison_key(text: str) -> str:
    """Equal for texts that differ only in spaces and in the width of their characters."""
    return normal_form(text).replace(" ", "")


def normal_form(text: str) -> str:
    """Unicode NFKC, so that full-width and half-width forms are the same, and single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).split())
