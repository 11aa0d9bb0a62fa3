"""Chooses what a task's prompt gets from a knowledge base: class, examples and documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from evomerge.errors import InputError
from evomerge.knowledge.classification.by_model import ModelClassifier, both
from evomerge.knowledge.classification.by_neighbours import (
    THRESHOLD,
    VOTERS,
    Classification,
    Classifier,
    class_texts,
)
from evomerge.knowledge.read_base import read_knowledge
from evomerge.knowledge.records import Document, Example, Knowledge, KnowledgeClass
from evomerge.knowledge.retrieval.fusion import FusedRetriever
from evomerge.knowledge.retrieval.interface import BATCH, Nearest
from evomerge.knowledge.retrieval.retrievers import make_retriever

if TYPE_CHECKING:
    from evomerge.study import PromptSection

SHOTS = 3  # examples of the class that its prompt shows, where the class does not say
QUOTES = 3  # documents that {documents} quotes, where the class does not say
WIDE = 64  # neighbours among which they are looked for first
FUSED_VOTERS = 5  # fused scores decrease slowly: more voters would count almost equally

WAYS = ("neighbours", "model", "both")  # of classification

Ranked = list[tuple[Example, float]]  # examples with their similarities, nearest first


@dataclass(frozen=True)
class TaskKnowledge:
    """What a task gets from the base.

    `similarity` is that of the nearest example of the class, 0 to 1, and `confidence` that in the
    class. `examples` are in the order of the prompt, with the nearest last, where it influences a
    model most. `documents` have the nearest first; there are none where the class's template does
    not quote any.
    """

    kind: KnowledgeClass
    similarity: float
    examples: tuple[Example, ...]
    documents: tuple[Document, ...] = ()
    confidence: float = 0.0

    @property
    def class_name(self) -> str:
        """The class's name."""
        return self.kind.name


class Chooser:
    """Chooses classes, examples and documents for tasks, with any retriever.

    `retriever` is a name as in `make_retriever`. `classify` is one of WAYS: by the examples, by the
    model of `by_model`, or by the product of both. `descriptions`: those of the classes count as
    weak examples. `linear`, `threshold`, `default`: see Classifier. `say` gets a line where another
    retriever is used. Raises InputError: an unknown retriever or way, or a way without its model.
    """

    def __init__(
        self,
        knowledge: Knowledge,
        retriever: str = "tfidf",
        *,
        classify: str = "neighbours",
        by_model: ModelClassifier | None = None,
        threshold: float = THRESHOLD,
        default: str | None = None,
        say: Callable[[str], None] | None = None,
        descriptions: bool = False,
        linear: bool = True,
    ) -> None:
        if classify not in WAYS:
            raise InputError(
                "unknown way to classify",
                where="--classify",
                found=classify,
                remedy=f"Use {', '.join(WAYS)}.",
            )
        if classify != "neighbours" and by_model is None:
            raise InputError(
                "this way to classify needs a model",
                where="--classify",
                found=classify,
                remedy="Name one, or use neighbours.",
            )
        self.knowledge = knowledge
        self.way = classify
        self.by_model = by_model
        self.retriever = make_retriever(retriever, class_texts(knowledge, descriptions), say)
        self.classifier = Classifier(
            knowledge,
            self.retriever,
            descriptions=descriptions,
            voters=FUSED_VOTERS if isinstance(self.retriever, FusedRetriever) else VOTERS,
            threshold=threshold,
            default=default,
            linear=linear,
        )
        self.quoting = any(map(_quotes, knowledge.classes))
        self.document_retriever = None
        if knowledge.documents and self.quoting:
            texts = [f"{document.title}\n{document.text}" for document in knowledge.documents]
            self.document_retriever = self.retriever.over(texts)
        self.own = Counter(example.class_name for example in knowledge.examples)

    def nearest(self, text: str, k: int) -> Ranked:
        """The k nearest examples, nearest first, each with its similarity, 0 to 1.

        An example that equals the text is never among them.
        """
        near = self.retriever.nearest([text], k + len(self.knowledge.classes))
        return self._ranked(near)[0][:k]

    def classify(self, text: str) -> str:
        """The name of a task's class."""
        return self.classify_all([text])[0].class_name

    def classify_all(self, texts: Sequence[str]) -> list[Classification]:
        """The classes of many tasks, without examples."""
        return self._classified(texts, self.retriever.nearest(texts, self.classifier.voters))

    def choose(self, text: str) -> TaskKnowledge:
        """Class, examples and documents for one task."""
        return self.choose_all([text])[0]

    def choose_all(self, texts: Sequence[str]) -> list[TaskKnowledge]:
        """Choose for many tasks together, which is far faster."""
        near = self.retriever.nearest(texts, WIDE)
        classified = self._classified(texts, near)
        kinds = [self.knowledge[found.class_name] for found in classified]
        own = [_of_class(kind, r) for kind, r in zip(kinds, self._ranked(near), strict=True)]
        self._complete(texts, kinds, own)
        quoted = self._documents(texts, kinds)
        chosen = []
        for i, kind in enumerate(kinds):
            shown = [example for example, _ in own[i][: _shots(kind)]]
            chosen.append(
                TaskKnowledge(
                    kind=kind,
                    similarity=own[i][0][1] if own[i] else 0.0,
                    examples=tuple(reversed(shown)),
                    documents=quoted[i],
                    confidence=classified[i].confidence,
                )
            )
        return chosen

    def of_each_class(self) -> list[TaskKnowledge]:
        """What some task of each class would get."""
        found = []
        for kind in self.knowledge.classes:
            own = []
            for example in self.knowledge.examples:
                if example.class_name == kind.name:
                    own.append(example)
            shown = tuple(own[: _shots(kind)])
            quoted = self.knowledge.documents[: _quotes(kind)]
            found.append(TaskKnowledge(kind, 0.0, shown, quoted))
        return found

    def _classified(self, texts: Sequence[str], near: Nearest) -> list[Classification]:
        by_votes = self.classifier.classify_near(texts, near)
        if self.way == "neighbours" or self.by_model is None or not texts:
            return by_votes
        shares = self.by_model.shares(texts)
        if self.way == "both":
            shares = both(np.array([found.shares for found in by_votes]), shares)
        decide = self.classifier.decide
        return [decide(row, found.voters) for row, found in zip(shares, by_votes, strict=True)]

    def _ranked(self, near: Nearest) -> list[Ranked]:
        """The nearest examples of each text, without the descriptions, which come after them."""
        examples = self.knowledge.examples
        ranked = []
        for indices, scores in zip(near.indices, near.scores, strict=True):
            pairs = []
            for i, score in zip(indices, scores, strict=True):
                if 0 <= i < len(examples):
                    pairs.append((examples[i], float(score)))
            ranked.append(pairs)
        return ranked

    def _complete(
        self, texts: Sequence[str], kinds: Sequence[KnowledgeClass], own: list[Ranked]
    ) -> None:
        """Search all examples for tasks that found too few of their class among the nearest."""
        thin = [i for i, kind in enumerate(kinds) if len(own[i]) < self._needed(kind)]
        whole = len(self.knowledge.examples) + len(self.knowledge.classes)
        # a few tasks at a time: the similarities of 10,000 tasks take gigabytes
        for start in range(0, len(thin), BATCH):
            some = thin[start : start + BATCH]
            near = self.retriever.nearest([texts[i] for i in some], whole)
            for i, ranked in zip(some, self._ranked(near), strict=True):
                own[i] = _of_class(kinds[i], ranked)

    def _needed(self, kind: KnowledgeClass) -> int:
        """Examples of the class that must be found: those shown, one for the similarity, or all."""
        return min(max(_shots(kind), 1), self.own[kind.name])

    def _documents(
        self, texts: Sequence[str], kinds: Sequence[KnowledgeClass]
    ) -> list[tuple[Document, ...]]:
        """The documents that each task's template quotes, nearest first.

        Those that share nothing with the task keep the base's order.
        """
        counts = list(map(_quotes, kinds))
        found: list[tuple[Document, ...]] = [()] * len(texts)
        quoting = [i for i, count in enumerate(counts) if count]
        if self.document_retriever is None or not quoting:
            return found
        documents = self.knowledge.documents
        near = self.document_retriever.nearest([texts[i] for i in quoting], max(counts))
        for i, indices in zip(quoting, near.indices, strict=True):
            places = [int(at) for at in indices if at >= 0]
            order = list(dict.fromkeys([*places, *range(len(documents))]))
            found[i] = tuple(documents[at] for at in order[: counts[i]])
        return found


def _shots(kind: KnowledgeClass) -> int:
    """How many examples a class's prompt shows."""
    if kind.shots is None:
        return SHOTS
    return kind.shots


def _quotes(kind: KnowledgeClass) -> int:
    """How many documents a class's template quotes."""
    if "{documents}" not in kind.template:
        return 0
    if kind.quotes is None:
        return QUOTES
    return kind.quotes


def _of_class(kind: KnowledgeClass, ranked: Ranked) -> Ranked:
    own = []
    for pair in ranked:
        if pair[0].class_name == kind.name:
            own.append(pair)
    return own


def open_knowledge(
    prompt: PromptSection,
    say: Callable[[str], None],
    classify: str = "neighbours",
    by_model: Callable[[Knowledge], ModelClassifier] | None = None,
) -> Chooser | None:
    """The chooser over the base of a study's `prompt:` section, if it names one.

    `by_model` makes the classifier by a model. Raises KnowledgeError, and InputError for an
    unknown retriever.
    """
    if prompt.knowledge is None:
        return None
    knowledge = read_knowledge(prompt.knowledge)
    return Chooser(
        knowledge,
        prompt.retriever,
        classify=classify,
        by_model=None if by_model is None else by_model(knowledge),
        threshold=prompt.threshold,
        default=prompt.default_class,
        say=say,
    )
