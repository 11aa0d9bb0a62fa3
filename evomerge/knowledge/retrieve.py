"""What a task gets from a knowledge base: its class, the nearest examples of that class, and documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evomerge.errors import InputError
from evomerge.knowledge.bm25 import Bm25Retriever
from evomerge.knowledge.classify import THRESHOLD, VOTERS, Classifier, Verdict, class_texts
from evomerge.knowledge.embeddings import EmbeddingRetriever
from evomerge.knowledge.fusion import FusedRetriever
from evomerge.knowledge.nearest import Nearest
from evomerge.knowledge.nearest import Retriever as NearestRetriever
from evomerge.knowledge.parts import Document, Example, Knowledge, KnowledgeClass
from evomerge.knowledge.tfidf import TfidfRetriever

SHOTS = 3  # examples of the class that its template shows, where the class does not say
WIDE = 64  # neighbours among which they are looked for first
FUSED_VOTERS = 5  # ranks fall off slowly: more voters would all but count heads

RETRIEVERS = "tfidf, bm25, embeddings:MODEL, or several joined by +"


@dataclass(frozen=True)
class Choice:
    """What a task got from the base.

    `similarity` is that of the nearest example of the class, 0 to 1, and `confidence` that in the class; `examples` are in
    the order of the prompt, the nearest last, where a model heeds it most; `documents` have the nearest first.
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
    """Classes and examples for tasks, by any retriever; `retriever` is a name of RETRIEVERS.

    `threshold` and `default`: see Classifier. `say` gets the line that tells of a retriever that another stands in for.
    """

    def __init__(
        self,
        knowledge: Knowledge,
        retriever: str = "tfidf",
        *,
        descriptions: bool = False,
        threshold: float = THRESHOLD,
        default: str | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.knowledge = knowledge
        self.retriever = make_retriever(retriever, class_texts(knowledge, descriptions), say)
        voters = FUSED_VOTERS if isinstance(self.retriever, FusedRetriever) else VOTERS
        self.classifier = Classifier(
            knowledge, self.retriever, descriptions=descriptions, voters=voters, threshold=threshold, default=default
        )

    def nearest(self, text: str, k: int) -> list[tuple[Example, float]]:
        """The k nearest examples, nearest first, each with its similarity, 0 to 1; never one that equals the text."""
        return self._ranked(self.retriever.nearest([text], k + len(self.knowledge.classes)))[0][:k]

    def classify(self, text: str) -> str:
        return self.classifier.classify([text])[0].class_name

    def choose(self, text: str) -> Choice:
        """Class, examples and documents for one task."""
        return self.choose_all([text])[0]

    def choose_all(self, texts: Sequence[str]) -> list[Choice]:
        """As `choose`, for many tasks at once, which is far faster."""
        near = self.retriever.nearest(texts, WIDE)
        verdicts = self.classifier.classify_near(near)
        owns = [self._own(v, ranked) for v, ranked in zip(verdicts, self._ranked(near), strict=True)]
        thin = [i for i, (own, v) in enumerate(zip(owns, verdicts, strict=True)) if len(own) < self._shots(v.class_name)]
        whole = len(self.knowledge.examples) + len(self.knowledge.classes)
        everything = self._ranked(self.retriever.nearest([texts[i] for i in thin], whole))
        for i, ranked in zip(thin, everything, strict=True):
            owns[i] = self._own(verdicts[i], ranked)
        return [self._choice(v, own) for v, own in zip(verdicts, owns, strict=True)]

    def _ranked(self, near: Nearest) -> list[list[tuple[Example, float]]]:
        """The nearest examples of each text; descriptions, which come after the examples, are left out."""
        examples = self.knowledge.examples
        return [
            [(examples[i], float(s)) for i, s in zip(indices, scores, strict=True) if 0 <= i < len(examples)]
            for indices, scores in zip(near.indices, near.scores, strict=True)
        ]

    def _shots(self, class_name: str) -> int:
        shots = self.knowledge[class_name].shots
        return SHOTS if shots is None else shots

    def _own(self, verdict: Verdict, ranked: Sequence[tuple[Example, float]]) -> list[tuple[Example, float]]:
        return [pair for pair in ranked if pair[0].class_name == verdict.class_name][: self._shots(verdict.class_name)]

    def _choice(self, verdict: Verdict, own: Sequence[tuple[Example, float]]) -> Choice:
        return Choice(
            kind=self.knowledge[verdict.class_name],
            similarity=own[0][1] if own else 0.0,
            examples=tuple(example for example, _ in reversed(own)),
            documents=self.knowledge.documents,
            confidence=verdict.confidence,
        )


def make_retriever(name: str, inputs: Sequence[str], say: Callable[[str], None] | None = None) -> NearestRetriever:
    """A retriever over `inputs`: tfidf, bm25, embeddings:MODEL, or several joined by + (reciprocal rank fusion).

    Where fugashi is missing, TF-IDF stands in for BM25, and `say` gets a line about it. Raises InputError: an unknown name, or
    embeddings without sentence-transformers; ModelError: an embedding model that cannot be loaded.
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
    raise InputError("unknown retriever", where="--retriever", found=parts[0], remedy=f"Use {RETRIEVERS}.")
