"""Nearest examples of a knowledge base, and from them a task's class, by character n-grams.

Character n-grams need no word boundaries, which Japanese does not write.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from evomerge.knowledge.base import Example, Knowledge, render

VOTERS = 5  # nearest examples that vote on the class
SHOTS = 3  # examples of that class that its template shows


@dataclass(frozen=True)
class Choice:
    """What a task got from the base.

    `similarity` is the cosine, 0 to 1, of the nearest example of the class; `examples` are in the order of the
    prompt, the nearest last, where a model heeds it most.
    """

    class_name: str
    similarity: float
    examples: tuple[Example, ...]
    system: str | None
    text: str


class Retriever:
    """TF-IDF over character 1- to 4-grams of the examples' inputs, compared by cosine.

    Full-width and half-width forms count as the same (Unicode NFKC). Equal similarities keep the sheet's order, so
    every answer is a function of the base and the text alone.
    """

    def __init__(self, knowledge: Knowledge) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.knowledge = knowledge
        self.inputs = [_plain(example.input) for example in knowledge.examples]
        self.vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), lowercase=False)
        self.matrix = self.vectorizer.fit_transform(self.inputs)  # (examples, n-grams), rows of length 1

    def nearest(self, text: str, k: int) -> list[tuple[Example, float]]:
        """The k nearest examples, nearest first, each with its cosine in 0 to 1.

        An example whose input is the text itself is left out: it would hand over the answer.
        """
        return self._ranked(text)[:k]

    def classify(self, text: str) -> str:
        """The class with the largest sum of similarities among the VOTERS nearest examples.

        A tie goes to the class that stands first in the sheet; so does a text that shares nothing with any example.
        """
        return self._vote(self._ranked(text)[:VOTERS])

    def choose(self, text: str) -> Choice:
        """Class, examples and filled template for one task."""
        ranked = self._ranked(text)
        found = self.knowledge[self._vote(ranked[:VOTERS])]
        own = [(example, similarity) for example, similarity in ranked if example.class_name == found.name][:SHOTS]
        examples = tuple(example for example, _ in reversed(own))
        return Choice(
            class_name=found.name,
            similarity=own[0][1] if own else 0.0,
            examples=examples,
            system=found.system if found.system.strip() else None,
            text=render(found.template, text, examples),
        )

    def _ranked(self, text: str) -> list[tuple[Example, float]]:
        plain = _plain(text)
        scores = (self.matrix @ self.vectorizer.transform([plain]).T).toarray()[:, 0]
        pairs = [
            (example, min(1.0, float(score)))
            for example, own, score in zip(self.knowledge.examples, self.inputs, scores, strict=True)
            if own != plain
        ]
        return sorted(pairs, key=lambda pair: -round(pair[1], 9))  # rounded: the last bits are no difference

    def _vote(self, voters: Iterable[tuple[Example, float]]) -> str:
        votes = dict.fromkeys((c.name for c in self.knowledge.classes), 0.0)
        for example, similarity in voters:
            votes[example.class_name] += similarity
        return max(votes, key=lambda name: round(votes[name], 9))  # max keeps the first of equals


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())
