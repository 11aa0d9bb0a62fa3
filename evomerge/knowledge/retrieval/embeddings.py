"""Sentence embeddings of any sentence-transformers model; needs `evomerge[embeddings]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evomerge.errors import InputError, ModelError
from evomerge.knowledge.retrieval.interface import Matrix, VectorRetriever


class EmbeddingRetriever(VectorRetriever):
    """Cosine of embeddings; a negative one counts as 0.

    `model` is a folder or a hub id, or anything with sentence-transformers' `encode`. Raises
    InputError where the library is missing, ModelError where the model cannot be loaded.
    """

    def __init__(self, inputs: Sequence[str], model: Any, itself: bool = False) -> None:
        super().__init__(inputs, itself)
        self.model = _load(model) if isinstance(model, str) else model
        self.matrix = self._embed(self.inputs)  # (base, dimensions), rows of length 1

    def over(self, inputs: Sequence[str]) -> EmbeddingRetriever:
        """A retriever for other texts, which also finds a text equal to the given one."""
        return EmbeddingRetriever(inputs, self.model, itself=True)

    def similar(self, texts: Sequence[str]) -> Matrix:
        """Cosines, (texts, base)."""
        return self._embed(texts) @ self.matrix.T

    def _embed(self, texts: Sequence[str]) -> Matrix:
        vectors = np.asarray(self.model.encode(list(texts), show_progress_bar=False), np.float64)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit: Matrix = vectors / np.maximum(lengths, 1e-12)
        return unit


def _load(name: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise InputError(
            "embeddings need sentence-transformers",
            where=f"retriever embeddings:{name}",
            remedy='Install it: pip install "evomerge[embeddings]".',
        ) from error
    try:
        # the default attention: a config.json may name a kernel on the hub, which would be run
        return SentenceTransformer(name, model_kwargs={"attn_implementation": None})
    except Exception as error:  # the library passes on the hub's, torch's and its own errors
        lines = str(error).splitlines() or [type(error).__name__]
        raise ModelError(
            f"cannot be loaded: {lines[0]}",
            where=f"retriever embeddings:{name}",
            remedy="Name a folder or a hub id.",
        ) from error
