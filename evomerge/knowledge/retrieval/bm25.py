"""BM25 over the words that fugashi (MeCab) finds; needs `evomerge[bm25]`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from evomerge.errors import InputError
from evomerge.knowledge.retrieval.interface import Matrix, VectorRetriever

K1, B = 1.2, 0.75  # Robertson and Zaragoza 2009, section 3.5: the usual values

Tokenizer = Callable[[str], list[str]]


class Bm25Retriever(VectorRetriever):
    """Okapi BM25 (Robertson and Zaragoza 2009, equation 3.15), divided by what no text can exceed.

    score(q, d) = sum over the words w of q of idf(w) * tf * (K1 + 1) / (tf + K1 * (1 - B + B * |d|
    / average)), with idf = ln(1 + (n - df + 0.5) / (df + 0.5)), which is never negative. The bound
    is the sum of idf(w) * (K1 + 1), in which a word that the base lacks has df = 0. Raises
    InputError where fugashi or its dictionary is missing.
    """

    def __init__(
        self, inputs: Sequence[str], tokenize: Tokenizer | None = None, itself: bool = False
    ) -> None:
        from scipy.sparse import csr_matrix

        super().__init__(inputs, itself)
        self.tokenize = tokenize or fugashi_tokens()
        words = list(map(self.tokenize, self.inputs))
        self.vocabulary: dict[str, int] = {}
        for text in words:
            for word in text:
                self.vocabulary.setdefault(word, len(self.vocabulary))
        counts = self._counts(words)
        frequency = np.bincount(counts.indices, minlength=len(self.vocabulary))
        self.idf = np.log1p((len(words) - frequency + 0.5) / (frequency + 0.5))
        self.unknown = float(np.log1p((len(words) + 0.5) / 0.5))
        lengths = np.array(list(map(len, words)), float)
        norm = K1 * (1 - B + B * lengths / max(lengths.mean(), 1.0))
        tf = counts.data
        norms = np.repeat(norm, np.diff(counts.indptr))
        weights = self.idf[counts.indices] * tf * (K1 + 1) / (tf + norms)
        # (words, base)
        self.matrix = csr_matrix((weights, counts.indices, counts.indptr), counts.shape).T.tocsr()

    def over(self, inputs: Sequence[str]) -> Bm25Retriever:
        """A retriever for other texts, which also finds a text equal to the given one."""
        return Bm25Retriever(inputs, self.tokenize, itself=True)

    def raw(self, texts: Sequence[str]) -> Matrix:
        """The scores of the formula, (texts, base)."""
        words = list(map(self.tokenize, texts))
        scores: Matrix = (self._counts(words) @ self.matrix).toarray()
        return scores

    def similar(self, texts: Sequence[str]) -> Matrix:
        """The scores over their bounds, (texts, base)."""
        words = list(map(self.tokenize, texts))
        idf = [sum(map(self._idf_of, text)) for text in words]
        bound = np.maximum(np.array(idf, float), 1e-12) * (K1 + 1)
        scores: Matrix = (self._counts(words) @ self.matrix).toarray() / bound[:, None]
        return scores

    def _idf_of(self, word: str) -> float:
        place = self.vocabulary.get(word)
        if place is None:
            return self.unknown
        return float(self.idf[place])

    def _counts(self, texts: Sequence[list[str]]) -> Any:
        """How often each known word is in each text, sparse (texts, words)."""
        from scipy.sparse import csr_matrix

        rows: list[int] = []
        columns: list[int] = []
        for i, text in enumerate(texts):
            known = []
            for word in text:
                if word in self.vocabulary:
                    known.append(self.vocabulary[word])
            rows += [i] * len(known)
            columns += known
        at = (np.array(rows, np.int64), np.array(columns, np.int64))
        return csr_matrix((np.ones(len(rows)), at), (len(texts), len(self.vocabulary)))


def fugashi_tokens() -> Tokenizer:
    """Surface forms in the order of the text. Raises InputError."""
    try:
        import fugashi

        tagger = fugashi.Tagger()
    except (ImportError, RuntimeError) as error:  # RuntimeError: no dictionary
        raise InputError(
            "BM25 needs fugashi and a dictionary",
            where="retriever bm25",
            remedy='Install them: pip install "evomerge[bm25]".',
        ) from error
    return lambda text: [word.surface for word in tagger(text)]
