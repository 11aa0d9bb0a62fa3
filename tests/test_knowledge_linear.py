"""The linear classifier: ridge regression in its closed form, what a task asks for, and how it
joins the votes.
"""

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from evomerge.knowledge.chooser import Chooser
from evomerge.knowledge.classification.by_neighbours import CLEAR, LEAST, ROOT
from evomerge.knowledge.classification.linear import ALPHA, SHARP, LinearClassifier, asked
from evomerge.knowledge.records import Example, Knowledge, KnowledgeClass
from evomerge.knowledge.retrieval.interface import BATCH, normal_form

TEXTS = [
    "春の詩を書いて",
    "海の詩を作って",
    "3+5はいくつ",
    "8を2で割ると",
    "次を直して\n「あいうえおかきくけこさしすせそたち」",
]
CLASSES = np.array([0, 0, 1, 1, 2])
WEIGHTS = np.array([1.0, 2.0, 1.0, 0.5, 1.0])


def closed_form(asked_texts):
    """Weighted ridge with an intercept that is not shrunk: centre by weighted means, then (X'WX +
    a) b = X'Wy.
    """

    def vectors(prepare):
        vectorizer = TfidfVectorizer(
            analyzer="char", ngram_range=(1, 3), lowercase=False, sublinear_tf=True
        )
        known = vectorizer.fit_transform([prepare(t) for t in TEXTS]).toarray()
        return known, vectorizer.transform([prepare(t) for t in asked_texts]).toarray()

    both = [vectors(normal_form), vectors(asked)]
    x, new = np.hstack([b[0] for b in both]), np.hstack([b[1] for b in both])
    y = np.array([[1.0 if c == k else -1.0 for k in range(4)] for c in CLASSES])
    x0, y0 = np.average(x, 0, WEIGHTS), np.average(y, 0, WEIGHTS)
    w = np.diag(WEIGHTS)
    b = np.linalg.solve(
        (x - x0).T @ w @ (x - x0) + ALPHA * np.eye(x.shape[1]), (x - x0).T @ w @ (y - y0)
    )
    return (new - x0) @ b + y0


def test_ridge_is_its_closed_form():
    new = ["山の詩を書いて", "9から4を引くと", "ん"]
    powers = np.exp(SHARP * closed_form(new))
    found = LinearClassifier(TEXTS, CLASSES, WEIGHTS, 4)
    assert found.shares(new) == pytest.approx(powers / powers.sum(1, keepdims=True), abs=1e-3)
    assert found.shares(new).argmax(1)[:2].tolist() == [0, 1]
    assert (found.shares(new)[:, 3] < 0.1).all()  # a class without examples


def test_batches_change_nothing():
    found = LinearClassifier(TEXTS, CLASSES, WEIGHTS, 3)
    texts = [f"{i}を足して" for i in range(2 * BATCH + 1)]
    assert found.shares(texts) == pytest.approx(
        np.concatenate([found.shares([t]) for t in texts]), abs=1e-12
    )
    one = LinearClassifier(["あ"], np.array([0]), np.array([1.0]), 1)
    assert one.shares(["い", ""]).tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("直して", "直して"),
        ("直して\n\n本文の一行目\n本文の二行目", "直して 本文の二行目"),
        ("「短い語」の意味", "「短い語」の意味"),
        ("次は？「" + "長" * 20 + "」", "次は?「」"),
        ('Say "' + "a" * 20 + '" again', 'Say "" again'),
        ("一行\n一行", "一行"),
        (" \n", ""),
    ],
)
def test_what_is_asked(text, wanted):
    assert asked(text) == wanted


def base():
    classes = tuple(KnowledgeClass(name, "", "{input}") for name in "PQR")
    return Knowledge(
        classes,
        tuple(Example(i + 2, "PQR"[c], TEXTS[i], "x", WEIGHTS[i]) for i, c in enumerate(CLASSES)),
    )


def test_shares_are_those_of_the_votes_and_the_linear_classifier():
    text = "海の絵を3枚書いて"
    votes = np.array(Chooser(base(), linear=False).classify_all([text])[0].shares)
    product = (
        np.maximum(votes, LEAST) ** ROOT
        * LinearClassifier(TEXTS, CLASSES, WEIGHTS, 3).shares([text])[0]
    )
    verdict = Chooser(base()).classify_all([text])[0]
    assert verdict.shares == pytest.approx(product / product.sum())
    nearest = Chooser(base()).nearest(text, 1)[0][1]
    assert verdict.confidence == pytest.approx(max(verdict.shares) * min(1, nearest / CLEAR))


def test_an_example_never_judges_itself():
    for text in (TEXTS[4], TEXTS[4].replace("\n", "　")):
        assert Chooser(base()).classify_all([text]) == Chooser(base(), linear=False).classify_all(
            [text]
        )
    assert Chooser(base()).classify(TEXTS[4]) != "R"  # its only example is the task
