"""The default retriever: TF-IDF of character n-grams.

They need no word boundaries, which Japanese does not write.
"""

from __future__ import annotations

from collections.abc import Sequence

from evomerge.knowledge.retrieval.interface import Matrix, VectorRetriever

LENGTHS = (1, 4)  # characters of an n-gram


class TfidfRetriever(VectorRetriever):
    """Cosine of TF-IDF vectors over character 1- to 4-grams (scikit-learn's user guide, 7.2.3.4).

    idf = ln((1 + n) / (1 + df)) + 1; an n-gram that occurs tf times in a text counts 1 + ln tf, so
    that a long passage does not drown the sentence that says what to do with it.
    """

    def __init__(self, inputs: Sequence[str], itself: bool = False) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        super().__init__(inputs, itself)
        self.vectorizer = TfidfVectorizer(
            analyzer="char", ngram_range=LENGTHS, lowercase=False, sublinear_tf=True
        )
        # (n-grams, base), columns of length 1
        self.matrix = self.vectorizer.fit_transform(self.inputs).T.tocsr()

    def over(self, inputs: Sequence[str]) -> TfidfRetriever:
        """A retriever for other texts, which also finds a text equal to the given one."""
        return TfidfRetriever(inputs, itself=True)

    def similar(self, texts: Sequence[str]) -> Matrix:
        """Cosines, (texts, base)."""
        products: Matrix = (self.vectorizer.transform(texts) @ self.matrix).toarray()
        return products
