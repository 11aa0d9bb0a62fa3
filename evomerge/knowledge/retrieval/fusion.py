"""Several retrievers as one, by the ranks that they give; their scores need no common scale."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evomerge.knowledge.retrieval.interface import Matrix, Nearest, Retriever, in_batches, largest

K = 60  # Cormack, Clarke and Büttcher 2009: the constant of reciprocal rank fusion
DEPTH = 100  # ranks of each retriever that count, unless more texts are requested


class FusedRetriever:
    """Reciprocal rank fusion: score(d) = sum over the retrievers of 1 / (60 + rank of d).

    Ranks count from 1. Scores are divided by that of a text that is first everywhere, so they are
    from 0 to 1; `size` is the number of texts.
    """

    def __init__(self, retrievers: Sequence[Retriever], size: int) -> None:
        self.retrievers = tuple(retrievers)
        self.size = size

    def nearest(self, texts: Sequence[str], k: int) -> Nearest:
        """The k nearest of each text."""
        return in_batches(self._batch, texts, min(k, self.size))

    def over(self, inputs: Sequence[str]) -> FusedRetriever:
        """A retriever for other texts, which also finds a text equal to the given one."""
        parts = [retriever.over(inputs) for retriever in self.retrievers]
        return FusedRetriever(parts, len(inputs))

    def _batch(self, texts: Sequence[str], k: int) -> Nearest:
        found = [retriever.nearest(texts, max(k, DEPTH)) for retriever in self.retrievers]
        # the rank of a text that shares nothing with the given one is arbitrary
        rankings = [np.where(f.scores > 0, f.indices, -1) for f in found]
        best = len(self.retrievers) / (K + 1)
        return largest(np.minimum(fuse(rankings, self.size) / best, 1.0), k)


def fuse(rankings: Sequence[np.ndarray], size: int) -> Matrix:
    """Scores (texts, size) of rankings (texts, k); -inf where no ranking names the text."""
    scores = np.zeros((len(rankings[0]), size))
    for ranking in rankings:
        rows, ranks = np.nonzero(ranking >= 0)
        scores[rows, ranking[rows, ranks]] += 1 / (K + 1 + ranks)  # a ranking names no text twice
    return np.where(scores > 0, np.round(scores, 12), -np.inf)
