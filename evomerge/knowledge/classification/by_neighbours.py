"""A task's class by a vote of its nearest examples, combined with the linear classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import KnowledgeError
from evomerge.knowledge.classification.linear import LinearClassifier
from evomerge.knowledge.records import Knowledge, KnowledgeClass
from evomerge.knowledge.retrieval.interface import Nearest, Retriever, comparison_key

# Chosen on the development half of tests/labelled_tasks.jsonl (benchmarks/classify.py).
VOTERS = 20  # nearest examples that vote
POWER = 2.0  # a voter's weight is its similarity to this power
DESCRIPTION = 0.5  # weight of a class's description, which counts as an example that is never shown
# shares of votes, at least the first, to this power are multiplied by the linear classifier's
LEAST, ROOT = 0.01, 0.5
CLEAR = 0.1  # similarity of the nearest voter below which the confidence is lowered
THRESHOLD = 0.35  # confidence below which a task gets the default class, where one is named


@dataclass(frozen=True)
class Classification:
    """The class of a task.

    `confidence`, 0 to 1, is the class's share, times similarity / CLEAR where even the nearest
    voter is far. `shares` are those of all classes, in the base's order; they sum to 1, or are all
    0 where no example shares anything with the task.
    """

    class_name: str
    confidence: float
    voters: tuple[int, ...]  # places among the base's texts, nearest first
    shares: tuple[float, ...] = ()


def class_texts(knowledge: Knowledge, descriptions: bool = False) -> list[str]:
    """The texts that a retriever needs for the vote: all examples' inputs, then descriptions."""
    texts = [example.input for example in knowledge.examples]
    if descriptions:
        texts += [c.description for c in _described(knowledge)]
    return texts


def _described(knowledge: Knowledge) -> list[KnowledgeClass]:
    return [c for c in knowledge.classes if c.description.strip()]


class Classifier:
    """Weighted nearest neighbours: each of the `voters` nearest adds weight * similarity ** POWER.

    With `linear`, a class's share is its share of the votes to the power of ROOT times the linear
    classifier's share, normalised; but a task that equals an example gets the votes alone, which
    that example does not take part in, so no example judges itself. `retriever` knows
    `class_texts(knowledge, descriptions)`. A task with a confidence below `threshold` gets the
    `default` class; where none is named, its best guess stays. A task that shares nothing with any
    example gets the default, or the base's first class. Raises KnowledgeError for a default that is
    not a class.
    """

    def __init__(
        self,
        knowledge: Knowledge,
        retriever: Retriever,
        *,
        descriptions: bool = False,
        voters: int = VOTERS,
        threshold: float = THRESHOLD,
        default: str | None = None,
        linear: bool = False,
    ) -> None:
        self.names = [c.name for c in knowledge.classes]
        if default is not None and default not in self.names:
            raise KnowledgeError(
                "the default class is not a class of the knowledge base",
                found=default,
                remedy=f"Use one of: {', '.join(self.names)}.",
            )
        self.retriever = retriever
        self.voters = voters
        self.threshold, self.default = 0.0, self.names[0]
        if default is not None:
            self.threshold, self.default = threshold, default
        owners = [example.class_name for example in knowledge.examples]
        weights = [example.weight for example in knowledge.examples]
        if descriptions:
            described = _described(knowledge)
            owners += [c.name for c in described]
            weights += [DESCRIPTION] * len(described)
        place = {name: i for i, name in enumerate(self.names)}
        self.classes = np.array([place[name] for name in owners])
        self.weights = np.array(weights)
        known = class_texts(knowledge, descriptions)
        self.known = set(map(comparison_key, known))
        self.linear: LinearClassifier | None = None
        if linear:
            self.linear = LinearClassifier(known, self.classes, self.weights, len(self.names))

    def classify(self, texts: Sequence[str]) -> list[Classification]:
        """The class of each text; a tie goes to the class that comes first in the base."""
        return self.classify_near(texts, self.retriever.nearest(texts, self.voters))

    def classify_near(self, texts: Sequence[str], near: Nearest) -> list[Classification]:
        """Classify with neighbours already found, at least `voters` for each text."""
        if not texts:
            return []
        learned = None
        if self.linear is not None:
            learned = self.linear.shares(texts)
        found = []
        for i, text in enumerate(texts):
            indices = near.indices[i, : self.voters]
            scores = near.scores[i, : self.voters]
            shares = None
            if learned is not None and comparison_key(text) not in self.known:
                shares = learned[i]
            found.append(self._vote(indices, scores, shares))
        return found

    def _vote(
        self,
        indices: NDArray[np.int64],
        scores: NDArray[np.float64],
        learned: NDArray[np.float64] | None,
    ) -> Classification:
        there = (indices >= 0) & (scores > 0)
        indices = indices[there]
        scores = scores[there]
        weights = self.weights[indices] * scores**POWER
        votes = np.bincount(self.classes[indices], weights, len(self.names)).round(12)
        voters = tuple(map(int, indices))
        if not votes.any():
            return Classification(self.default, 0.0, voters, (0.0,) * len(self.names))
        shares = votes / votes.sum()
        if learned is not None:
            shares = np.maximum(shares, LEAST) ** ROOT * learned
            shares /= shares.sum()
        return self.decide(shares, voters, min(1.0, float(scores[0]) / CLEAR))

    def decide(
        self, shares: NDArray[np.float64], voters: tuple[int, ...], nearness: float = 1.0
    ) -> Classification:
        """The class of the largest share, (classes,), or the default.

        The default is for a confidence, `nearness` times that share, below the threshold.
        """
        best = int(shares.argmax())  # the first of equals
        confidence = float(shares[best]) * nearness
        name = self.names[best] if confidence >= self.threshold else self.default
        return Classification(name, confidence, voters, tuple(map(float, shares)))


def confusion(true: Sequence[str], found: Sequence[str], names: Sequence[str]) -> NDArray[np.int64]:
    """How often each true class (row) was found as each class (column).

    Names that only `true` holds come after `names`, sorted.
    """
    rows = [*names, *sorted(set(true) - set(names))]
    columns = list(names)
    table = np.zeros((len(rows), len(names)), np.int64)
    for a, b in zip(true, found, strict=True):
        table[rows.index(a), columns.index(b)] += 1
    return table
