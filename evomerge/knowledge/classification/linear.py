"""A linear classifier of tasks, by what a class's examples have in common.

It learns from all of them, because for an unusual task the nearest ones say little.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.knowledge.retrieval.interface import BATCH, Matrix, normal_form

# Chosen by leaving out a tenth of the shipped base at a time, tests/labelled_tasks.jsonl in view;
# docs/INFERENCE.md.
LENGTHS = (1, 3)  # characters of an n-gram
ALPHA = 0.3  # strength of the ridge
SHARP = 4.0  # shares are the softmax of this times the scores, which are near -1 and 1
# a passage to work on, rather than a word
QUOTED = re.compile('「[^「」]{16,}」|『[^『』]{16,}』|“[^“”]{16,}”|"[^"]{16,}"')


class LinearClassifier:
    """Ridge regression of the classes on TF-IDF vectors: (n, n-grams) to (n, classes).

    The target is 1 for a text's own class and -1 for the others. A text counts twice: whole, and as
    its request, which is its first and its last paragraph without long quotations. `classes`
    are the places of the texts' classes among `number`, `weights` how much each text counts.
    """

    def __init__(
        self, texts: Sequence[str], classes: NDArray[np.int64], weights: Matrix, number: int
    ) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import Ridge
        from sklearn.pipeline import FeatureUnion

        settings = {
            "analyzer": "char",
            "ngram_range": LENGTHS,
            "lowercase": False,
            "sublinear_tf": True,
        }
        self.vectors = FeatureUnion(
            [
                ("whole", TfidfVectorizer(preprocessor=normal_form, **settings)),
                ("asked", TfidfVectorizer(preprocessor=asked, **settings)),
            ]
        )
        wanted = 2.0 * (classes[:, None] == np.arange(number)) - 1
        self.ridge = Ridge(alpha=ALPHA, solver="sparse_cg").fit(
            self.vectors.fit_transform(texts), wanted, sample_weight=weights
        )

    def shares(self, texts: Sequence[str]) -> Matrix:
        """(texts, classes), rows that sum to 1."""
        scores = [self._scores(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
        powers = np.exp(SHARP * np.concatenate(scores))
        shares: Matrix = powers / powers.sum(1, keepdims=True)
        return shares

    def _scores(self, texts: Sequence[str]) -> Matrix:
        scores = np.asarray(self.ridge.predict(self.vectors.transform(texts)), float)
        return scores.reshape(len(texts), -1)


def asked(text: str) -> str:
    """The first and the last paragraph in normal form, with long quotations emptied."""
    text = unicodedata.normalize("NFKC", text)
    text = QUOTED.sub(lambda match: match[0][0] + match[0][-1], text)
    lines = [line for line in text.split("\n") if line.strip()]
    return normal_form("\n".join(dict.fromkeys([*lines[:1], *lines[-1:]])))
