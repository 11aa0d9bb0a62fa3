"""Makes a retriever by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from evomerge.errors import InputError
from evomerge.knowledge.retrieval.bm25 import Bm25Retriever
from evomerge.knowledge.retrieval.embeddings import EmbeddingRetriever
from evomerge.knowledge.retrieval.fusion import FusedRetriever
from evomerge.knowledge.retrieval.interface import Retriever
from evomerge.knowledge.retrieval.tfidf import TfidfRetriever

RETRIEVERS = "tfidf, bm25, embeddings:MODEL, or several joined by +"


def make_retriever(
    name: str, inputs: Sequence[str], say: Callable[[str], None] | None = None
) -> Retriever:
    """A retriever over `inputs`: tfidf, bm25, embeddings:MODEL, or several joined by +.

    Several are combined by reciprocal rank fusion. Where fugashi is missing, TF-IDF replaces BM25,
    and `say` gets a line about it. Raises InputError: an unknown name, or embeddings without
    sentence-transformers; ModelError: an embedding model that cannot be loaded.
    """
    parts = list(map(str.strip, name.split("+")))
    if len(parts) > 1:
        return FusedRetriever([make_retriever(part, inputs, say) for part in parts], len(inputs))
    kind, _, model = parts[0].partition(":")
    if kind == "embeddings" and model:
        return EmbeddingRetriever(inputs, model)
    if kind not in ("tfidf", "bm25") or model:
        raise InputError(
            "unknown retriever", where="--retriever", found=parts[0], remedy=f"Use {RETRIEVERS}."
        )
    if kind == "bm25":
        try:
            return Bm25Retriever(inputs)
        except InputError as error:
            if say is not None:
                say(f"{error} TF-IDF is used instead")
    return TfidfRetriever(inputs)
