"""A task's class, from the examples that are nearest to it, and from what all examples of a class
have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import KnowledgeError
from evomerge.knowledge.classification.linear import LinearClassifier
from evomerge.knowledge.records import Knowledge
from evomerge.knowledge.retrieval.interface import Nearest, Retriever, comparison_key

# Chosen on the development half of tests/labelled_tasks.jsonl (benchmarks/classify.py).
VOTERS = 20  # nearest examples that vote
POWER = 2.0  # a voter's weight is its similarity to this power
DESCRIPTION = 0.5  # weight of a class's description, which counts as an example that is never shown
# vote shares, none below the first, count by this power beside the linear classifier's shares
LEAST, ROOT = 0.01, 0.5
CLEAR = 0.1  # similarity of the nearest voter from which on the confidence is not lowered
THRESHOLD = 0.35  # confidence below which a task gets the default class, where one is named


@dataclass(frozen=True)
class Classification:
    """`confidence`, 0 to 1: the class's share, times similarity / CLEAR where even the nearest
    voter is far.

    `shares`: those of all classes, in the base's order; they sum to 1, or are all 0 where no
    example shares anything.
    """

    class_name: str
    confidence: float
    voters: tuple[int, ...]  # places among the base's texts, nearest first
    shares: tuple[float, ...] = ()


def class_texts(knowledge: Knowledge, descriptions: bool = False) -> list[str]:
    """What a retriever must know for the vote: the inputs of all examples, then the descriptions of
    the classes that have one.
    """
    described = (
        [c.description for c in knowledge.classes if c.description.strip()] if descriptions else []
    )
    return [example.input for example in knowledge.examples] + described


class Classifier:
    """Weighted nearest neighbours: each of the `voters` nearest gives its class weight * similarity
    ** POWER.

    With `linear`, a class's share is that of the votes to the power of ROOT times the linear
    classifier's, normalised; but a task that equals an example has the votes alone, among which
    that example is none, so no example judges itself. `retriever` knows `class_texts(knowledge,
    descriptions)`. A task with a confidence below `threshold` gets the `default` class; where none
    is named, its best guess stands. A task that shares nothing with any example gets the default,
    or the base's first class. Raises KnowledgeError where the default is no class.
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
                "the default class is none of the base's",
                found=default,
                remedy=f"Classes are: {', '.join(self.names)}.",
            )
        self.retriever, self.voters = retriever, voters
        self.threshold = 0.0 if default is None else threshold
        self.default = self.names[0] if default is None else default
        described = (
            [c.name for c in knowledge.classes if c.description.strip()] if descriptions else []
        )
        owners = [example.class_name for example in knowledge.examples] + described
        place = {name: i for i, name in enumerate(self.names)}
        self.classes = np.array([place[name] for name in owners])
        self.weights = np.array(
            [example.weight for example in knowledge.examples] + [DESCRIPTION] * len(described)
        )
        known = class_texts(knowledge, descriptions)
        self.known = {comparison_key(text) for text in known}
        self.linear = (
            LinearClassifier(known, self.classes, self.weights, len(self.names)) if linear else None
        )

    def classify(self, texts: Sequence[str]) -> list[Classification]:
        """A verdict for each text; a tie goes to the class that stands first in the base."""
        return self.classify_near(texts, self.retriever.nearest(texts, self.voters))

    def classify_near(self, texts: Sequence[str], near: Nearest) -> list[Classification]:
        """As `classify`, of neighbours that are already found, at least `voters` for each text."""
        if not texts:
            return []
        rows = zip(near.indices[:, : self.voters], near.scores[:, : self.voters], strict=True)
        learned = (
            self.linear.shares(texts)
            if self.linear is not None
            else np.ones((len(texts), len(self.names)))
        )
        alone = [self.linear is None or comparison_key(text) in self.known for text in texts]
        return [
            self._vote(i, s, None if a else shares)
            for (i, s), a, shares in zip(rows, alone, learned, strict=True)
        ]

    def _vote(
        self,
        indices: NDArray[np.int64],
        scores: NDArray[np.float64],
        learned: NDArray[np.float64] | None,
    ) -> Classification:
        there = (indices >= 0) & (scores > 0)
        indices, scores = indices[there], scores[there]
        votes = np.bincount(
            self.classes[indices], self.weights[indices] * scores**POWER, len(self.names)
        ).round(12)
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
        """The class of the largest share, (classes,), or the default where `nearness` times that
        share is too little.
        """
        best = int(shares.argmax())  # the first of equals
        confidence = float(shares[best]) * nearness
        name = self.names[best] if confidence >= self.threshold else self.default
        return Classification(name, confidence, voters, tuple(map(float, shares)))


def confusion(true: Sequence[str], found: Sequence[str], names: Sequence[str]) -> NDArray[np.int64]:
    """How often each true class (row) got each class (column). Names that `true` alone holds come
    after `names`, sorted.
    """
    rows = [*names, *sorted(set(true) - set(names))]
    table = np.zeros((len(rows), len(names)), np.int64)
    for a, b in zip(true, found, strict=True):
        table[rows.index(a), list(names).index(b)] += 1
    return table
