"""What a task gets from a knowledge base: its class, the nearest examples of that class, and
documents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.errors import InputError
from evomerge.knowledge.classification.by_model import ModelClassifier, both
from evomerge.knowledge.classification.by_neighbours import (
    THRESHOLD,
    VOTERS,
    Classifier,
    Classification,
    class_texts,
)
from evomerge.knowledge.records import Document, Example, Knowledge, KnowledgeClass
from evomerge.knowledge.retrieval.bm25 import Bm25Retriever
from evomerge.knowledge.retrieval.embeddings import EmbeddingRetriever
from evomerge.knowledge.retrieval.fusion import FusedRetriever
from evomerge.knowledge.retrieval.interface import BATCH, Nearest
from evomerge.knowledge.retrieval.interface import Retriever as NearestRetriever
from evomerge.knowledge.retrieval.tfidf import TfidfRetriever

SHOTS = 3  # examples of the class that its prompt shows, where the class does not say
QUOTES = 3  # documents that {documents} quotes, where the class does not say
WIDE = 64  # neighbours among which they are looked for first
FUSED_VOTERS = 5  # ranks fall off slowly: more voters would all but count heads

WAYS = ("neighbours", "model", "both")  # of classification
RETRIEVERS = "tfidf, bm25, embeddings:MODEL, or several joined by +"


@dataclass(frozen=True)
class TaskKnowledge:
    """What a task got from the base.

    `similarity` is that of the nearest example of the class, 0 to 1, and `confidence` that in the
    class; `examples` are in the order of the prompt, the nearest last, where a model heeds it most;
    `documents` have the nearest first, and are empty where the class's template does not ask for
    them.
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
    """Classes, examples and documents for tasks, by any retriever; `retriever` is a name of
    RETRIEVERS.

    `classify`, one of WAYS: by the examples, by the model that `by_model` asks, or by the product
    of both. `descriptions`: those of the classes count as weak examples; `linear`: see Classifier.
    `threshold` and `default`: see Classifier. `say` gets the line that tells of a retriever that
    another stands in for.
    Raises InputError: an unknown retriever or way, or a way that needs a model and has none.
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
                "this way to classify asks a model",
                where="--classify",
                found=classify,
                remedy="Name one, or use neighbours.",
            )
        self.knowledge, self.way, self.by_model = knowledge, classify, by_model
        self.retriever = make_retriever(retriever, class_texts(knowledge, descriptions), say)
        voters = FUSED_VOTERS if isinstance(self.retriever, FusedRetriever) else VOTERS
        self.classifier = Classifier(
            knowledge,
            self.retriever,
            descriptions=descriptions,
            voters=voters,
            threshold=threshold,
            default=default,
            linear=linear,
        )

        self.quoting = any(
            "{documents}" in c.template and _many(c.quotes, QUOTES) for c in knowledge.classes
        )
        documents = [f"{document.title}\n{document.text}" for document in knowledge.documents]
        self.document_retriever = (
            self.retriever.over(documents) if documents and self.quoting else None
        )
        self.own = Counter(example.class_name for example in knowledge.examples)

    def nearest(self, text: str, k: int) -> list[tuple[Example, float]]:
        """The k nearest examples, nearest first, each with its similarity, 0 to 1; never one that
        equals the text.
        """
        return self._ranked(self.retriever.nearest([text], k + len(self.knowledge.classes)))[0][:k]

    def classify(self, text: str) -> str:
        return self.verdicts([text])[0].class_name

    def verdicts(self, texts: Sequence[str]) -> list[Classification]:
        """The classes of many tasks, without examples."""
        return self._verdicts(texts, self.retriever.nearest(texts, self.classifier.voters))

    def choose(self, text: str) -> TaskKnowledge:
        """Class, examples and documents for one task."""
        return self.choose_all([text])[0]

    def choose_all(self, texts: Sequence[str]) -> list[TaskKnowledge]:
        """As `choose`, for many tasks at once, which is far faster."""
        near = self.retriever.nearest(texts, WIDE)
        verdicts = self._verdicts(texts, near)
        owns = [
            _of_class(v, ranked) for v, ranked in zip(verdicts, self._ranked(near), strict=True)
        ]
        thin = [
            i
            for i, (own, v) in enumerate(zip(owns, verdicts, strict=True))
            if len(own) < self._wanted(v.class_name)
        ]
        whole = len(self.knowledge.examples) + len(self.knowledge.classes)
        # all examples of some tasks at a time: those of 10,000 take gigabytes
        for at in range(0, len(thin), BATCH):
            some = thin[at : at + BATCH]
            for i, ranked in zip(
                some,
                self._ranked(self.retriever.nearest([texts[i] for i in some], whole)),
                strict=True,
            ):
                owns[i] = _of_class(verdicts[i], ranked)
        quoted = self._documents(texts, verdicts)
        return [
            self._choice(v, own, documents)
            for v, own, documents in zip(verdicts, owns, quoted, strict=True)
        ]

    def _verdicts(self, texts: Sequence[str], near: Nearest) -> list[Classification]:
        verdicts = self.classifier.classify_near(texts, near)
        if self.way == "neighbours" or self.by_model is None or not texts:
            return verdicts
        shares = self.by_model.shares(texts)
        if self.way == "both":
            shares = both(np.array([v.shares for v in verdicts]), shares)
        return [
            self.classifier.decide(row, v.voters) for row, v in zip(shares, verdicts, strict=True)
        ]

    def _ranked(self, near: Nearest) -> list[list[tuple[Example, float]]]:
        """The nearest examples of each text; descriptions, which come after the examples, are left
        out.
        """
        examples = self.knowledge.examples
        return [
            [
                (examples[i], float(s))
                for i, s in zip(indices, scores, strict=True)
                if 0 <= i < len(examples)
            ]
            for indices, scores in zip(near.indices, near.scores, strict=True)
        ]

    def _wanted(self, class_name: str) -> int:
        """Examples of the class that must be found: those shown, and one for the similarity; or all
        that there are.
        """
        return min(max(_many(self.knowledge[class_name].shots, SHOTS), 1), self.own[class_name])

    def _documents(
        self, texts: Sequence[str], verdicts: Sequence[Classification]
    ) -> list[tuple[Document, ...]]:
        """For each task the documents that its template quotes, nearest first; those that share
        nothing keep the base's order.
        """
        kinds = [self.knowledge[v.class_name] for v in verdicts]
        counts = [
            _many(kind.quotes, QUOTES) if "{documents}" in kind.template else 0 for kind in kinds
        ]
        found: list[tuple[Document, ...]] = [()] * len(texts)
        asking = [i for i, count in enumerate(counts) if count]
        if self.document_retriever is None or not asking:
            return found
        near = self.document_retriever.nearest([texts[i] for i in asking], max(counts))
        every = range(len(self.knowledge.documents))
        for i, indices in zip(asking, near.indices, strict=True):
            order = dict.fromkeys([*(int(at) for at in indices if at >= 0), *every])
            found[i] = tuple(self.knowledge.documents[at] for at in list(order)[: counts[i]])
        return found

    def _choice(
        self,
        verdict: Classification,
        own: Sequence[tuple[Example, float]],
        documents: tuple[Document, ...],
    ) -> TaskKnowledge:
        kind = self.knowledge[verdict.class_name]
        shown = own[: _many(kind.shots, SHOTS)]
        return TaskKnowledge(
            kind=kind,
            similarity=own[0][1] if own else 0.0,
            examples=tuple(example for example, _ in reversed(shown)),
            documents=documents,
            confidence=verdict.confidence,
        )


def _many(number: int | None, default: int) -> int:
    return default if number is None else number


def _of_class(
    verdict: Classification, ranked: Sequence[tuple[Example, float]]
) -> list[tuple[Example, float]]:
    return [pair for pair in ranked if pair[0].class_name == verdict.class_name]


def make_retriever(
    name: str, inputs: Sequence[str], say: Callable[[str], None] | None = None
) -> NearestRetriever:
    """A retriever over `inputs`: tfidf, bm25, embeddings:MODEL, or several joined by + (reciprocal
    rank fusion).

    Where fugashi is missing, TF-IDF stands in for BM25, and `say` gets a line about it. Raises
    InputError: an unknown name, or embeddings without sentence-transformers; ModelError: an
    embedding model that cannot be loaded.
    """
    parts = [part.strip() for part in name.split("+")]
    if len(parts) > 1:
        return FusedRetriever([make_retriever(part, inputs, say) for part in parts], len(inputs))
    kind, _, model = parts[0].partition(":")
    if kind == "tfidf" and not model:
        return TfidfRetriever(inputs)
    if kind == "bm25" and not model:
        try:
            return Bm25Retriever(inputs)
        except InputError as error:
            if say is not None:
                say(f"{error} TF-IDF stands in for it")
            return TfidfRetriever(inputs)
    if kind == "embeddings" and model:
        return EmbeddingRetriever(inputs, model)
    raise InputError(
        "unknown retriever", where="--retriever", found=parts[0], remedy=f"Use {RETRIEVERS}."
    )
