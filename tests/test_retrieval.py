"""Retrievers against their formulas, fusion by hand, the vote, and the shipped base on the labelled
set.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from evomerge.errors import InputError, KnowledgeError, ModelError
from evomerge.knowledge.chooser import Chooser
from evomerge.knowledge.classification.by_neighbours import Classifier, class_texts, confusion
from evomerge.knowledge.read_base import read_knowledge
from evomerge.knowledge.records import Example, Knowledge, KnowledgeClass
from evomerge.knowledge.retrieval.bm25 import Bm25Retriever
from evomerge.knowledge.retrieval.embeddings import EmbeddingRetriever
from evomerge.knowledge.retrieval.fusion import FusedRetriever, fuse
from evomerge.knowledge.retrieval.interface import BATCH, Nearest, normal_form
from evomerge.knowledge.retrieval.retrievers import make_retriever
from evomerge.knowledge.retrieval.tfidf import TfidfRetriever

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "evomerge" / "knowledge" / "examples_ja.yaml"
LABELLED, SECOND = (
    [json.loads(line) for line in (ROOT / "tests" / name).read_text(encoding="utf-8").splitlines()]
    for name in ("labelled_tasks.jsonl", "labelled_tasks_2.jsonl")
)
TEXTS = ["a b b c", "b c d", "e e e f", "a a b e g h"]


class Letters:
    """A stand-in for a sentence-transformers model: how often each letter of `alphabet` stands in a
    text.
    """

    def __init__(self, alphabet="abcdefgh"):
        self.alphabet = alphabet

    def encode(self, texts, **_):
        return np.array(
            [[text.count(letter) for letter in self.alphabet] for text in texts], np.float32
        )


RETRIEVERS = {
    "tfidf": TfidfRetriever,
    "bm25": lambda texts: Bm25Retriever(texts, str.split),
    "embeddings": lambda texts: EmbeddingRetriever(texts, Letters()),
    "fused": lambda texts: FusedRetriever(
        [TfidfRetriever(texts), Bm25Retriever(texts, str.split)], len(texts)
    ),
}


@pytest.fixture(params=RETRIEVERS)
def make(request):
    return RETRIEVERS[request.param]


def test_every_retriever_keeps_the_contract(make):
    found = make(TEXTS).nearest(["b c", "e f", "h"], 3)
    assert found.indices.shape == found.scores.shape == (3, 3)
    assert found.indices[1, 0] == 2
    assert found.indices[2, 0] == 3
    assert ((found.scores >= 0) & (found.scores <= 1)).all()
    assert (np.diff(found.scores, axis=1) <= 0).all()


def test_what_shares_nothing_scores_nothing(make):
    assert (make(TEXTS).nearest(["ん"], 4).scores == 0).all()


def test_a_text_is_never_its_own_neighbour(make):
    # full-width, as NFKC reads them the same
    found = make([*TEXTS, "b c d"]).nearest(["b　c  ｄ\n"], 10)
    assert set(found.indices[0]) <= {-1, 0, 2, 3}
    assert found.indices[0, 0] == 0
    assert (found.scores[0, 3:] == 0).all()


def test_batches_change_nothing(make):
    retriever = make(TEXTS)
    texts = [TEXTS[i % 4] + " c" * (i % 3) for i in range(2 * BATCH + 3)]
    together = retriever.nearest(texts, 3)
    for i in (0, BATCH - 1, BATCH, 2 * BATCH + 2):
        alone = retriever.nearest([texts[i]], 3)
        assert (alone.indices[0] == together.indices[i]).all()
        assert (alone.scores[0] == together.scores[i]).all()
    assert retriever.nearest([], 3).indices.shape == (0, 3)


def test_equal_texts_keep_their_order(make):
    assert list(make(["x y", "a b", "a b", "a b", "x z"]).nearest(["a b c"], 2).indices[0]) == [
        1,
        2,
    ]


def test_tfidf_is_the_formula():
    texts, asked = ["ああい", "いう"], "あい"

    def grams(text):
        parts = [text[a : a + n] for n in range(1, 5) for a in range(len(text) - n + 1)]
        return {g: 1 + math.log(parts.count(g)) for g in parts}

    bags = [grams(text) for text in texts]
    idf = {g: math.log(3 / (1 + sum(g in bag for bag in bags))) + 1 for bag in bags for g in bag}
    vectors = [
        {g: tf * idf[g] for g, tf in bag.items() if g in idf} for bag in (*bags, grams(asked))
    ]
    unit = [
        {g: x / math.sqrt(sum(y * y for y in v.values())) for g, x in v.items()} for v in vectors
    ]
    wanted = [sum(x * unit[2].get(g, 0) for g, x in v.items()) for v in unit[:2]]
    found = TfidfRetriever(texts).nearest([asked], 2)
    assert list(found.indices[0]) == [0, 1]
    assert found.scores[0] == pytest.approx(wanted, abs=1e-8)


def test_bm25_is_the_formula():
    words = [text.split() for text in TEXTS]
    average = sum(map(len, words)) / len(words)

    def idf(word):
        frequency = sum(word in text for text in words)
        return math.log(1 + (len(words) - frequency + 0.5) / (frequency + 0.5))

    def score(query, text):
        norm = 1.2 * (1 - 0.75 + 0.75 * len(text) / average)
        return sum(idf(w) * text.count(w) * 2.2 / (text.count(w) + norm) for w in query)

    query = ["b", "e", "b", "new"]
    wanted = [score(query, text) for text in words]
    retriever = Bm25Retriever(TEXTS, str.split)
    assert retriever.raw([" ".join(query)])[0] == pytest.approx(wanted)
    bound = sum(idf(w) * 2.2 for w in query)
    assert retriever.similar([" ".join(query)])[0] == pytest.approx([s / bound for s in wanted])


def test_embeddings_are_compared_by_cosine():
    model = Letters()
    found = EmbeddingRetriever(TEXTS, model).nearest(["a e"], 4)
    vectors = model.encode([*TEXTS, "a e"]).astype(float)
    wanted = [v @ vectors[4] / np.linalg.norm(v) / np.linalg.norm(vectors[4]) for v in vectors[:4]]
    order = sorted(range(4), key=lambda i: -round(wanted[i], 9))
    assert list(found.indices[0]) == order
    assert found.scores[0] == pytest.approx([wanted[i] for i in order])


def test_fusion_by_hand():
    rankings = [np.array([[2, 0, 1]]), np.array([[0, 3, -1]])]
    wanted = [1 / 62 + 1 / 61, 1 / 63, 1 / 61, 1 / 62, -math.inf]
    assert list(fuse(rankings, 5)[0]) == pytest.approx(wanted)

    class Fixed:
        def __init__(self, ranking):
            self.ranking = ranking

        def nearest(self, texts, k):
            return Nearest(self.ranking[:, :k], np.ones(self.ranking[:, :k].shape))

    found = FusedRetriever([Fixed(r) for r in rankings], 5).nearest(["x"], 5)
    assert list(found.indices[0]) == [0, 2, 3, 1, -1]
    assert found.scores[0] == pytest.approx(
        [(1 / 62 + 1 / 61) * 61 / 2, 1 / 2, 61 / 62 / 2, 61 / 63 / 2, 0]
    )


def small(weights=(1.0, 1.0, 1.0), descriptions=("", "")):
    classes = tuple(
        KnowledgeClass(name, "", "{input}", about)
        for name, about in zip("PQ", descriptions, strict=True)
    )
    inputs = ("a b", "b c", "c d")
    return Knowledge(
        classes, tuple(Example(i + 2, "PQQ"[i], inputs[i], "x", weights[i]) for i in range(3))
    )


class Given:
    """A retriever that knows the answer: scores of three texts."""

    def __init__(self, *scores):
        self.scores = np.array([scores])

    def nearest(self, texts, k):
        order = np.argsort(-self.scores, axis=1, kind="stable")[:, :k]
        return Nearest(
            np.repeat(order, len(texts), 0),
            np.repeat(np.take_along_axis(self.scores, order, 1), len(texts), 0),
        )


def test_the_vote_by_hand():
    found = Classifier(small(), Given(0.8, 0.6, 0.4)).classify(["x"])[0]
    assert (found.class_name, found.voters) == ("P", (0, 1, 2))
    assert found.confidence == pytest.approx(0.64 / (0.64 + 0.36 + 0.16))
    heavy = Classifier(small(weights=(1.0, 2.0, 1.0)), Given(0.8, 0.6, 0.4)).classify(["x"])[0]
    assert (heavy.class_name, heavy.confidence) == (
        "Q",
        pytest.approx((0.72 + 0.16) / (0.64 + 0.72 + 0.16)),
    )


def test_little_confidence_gives_the_default_class():
    far = Classifier(small(), Given(0.05, 0.0, 0.0)).classify(["x"])[0]
    # all votes, but from half as near as is clear
    assert (far.class_name, far.confidence) == ("P", pytest.approx(0.5))
    assert (
        Classifier(small(), Given(0.05, 0.0, 0.0), default="Q", threshold=0.6)
        .classify(["x"])[0]
        .class_name
        == "Q"
    )
    assert (
        Classifier(small(), Given(0.05, 0.0, 0.0), default="Q", threshold=0.4)
        .classify(["x"])[0]
        .class_name
        == "P"
    )
    nothing = Classifier(small(), Given(0.0, 0.0, 0.0), default="Q").classify(["x"])[0]
    assert (nothing.class_name, nothing.confidence, nothing.voters) == ("Q", 0.0, ())
    with pytest.raises(KnowledgeError, match="not a class of the knowledge base"):
        Classifier(small(), Given(0.0, 0.0, 0.0), default="R")


def test_descriptions_vote_and_are_never_shown():
    knowledge = small(descriptions=("x y z", ""))
    assert class_texts(knowledge, True) == ["a b", "b c", "c d", "x y z"]
    assert Chooser(knowledge).choose("xyz").confidence == 0
    choice = Chooser(knowledge, descriptions=True).choose("x y z !")
    assert (choice.class_name, [e.row for e in choice.examples]) == ("P", [2])
    assert choice.confidence > 0.9


def test_many_choices_are_those_of_one_at_a_time():
    chooser = Chooser(read_knowledge(BASE))
    texts = [row["input"] for row in LABELLED[::16]]
    assert chooser.choose_all(texts) == [chooser.choose(text) for text in texts]


def test_confusion_counts():
    assert confusion(["P", "P", "R", "Q"], ["P", "Q", "Q", "Q"], ["P", "Q"]).tolist() == [
        [1, 1],
        [0, 1],
        [0, 1],
    ]


@pytest.mark.parametrize("name", ["tf", "tfidf:x", "bm25:x", "embeddings", "tfidf+", ""])
def test_unknown_retrievers_are_named(name):
    with pytest.raises(InputError, match="unknown retriever"):
        make_retriever(name, TEXTS)


def test_missing_libraries_are_said_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "fugashi", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    lines = []
    assert isinstance(make_retriever("bm25", TEXTS, lines.append), TfidfRetriever)
    assert len(lines) == 1
    assert 'pip install "evomerge[bm25]"' in lines[0]
    with pytest.raises(InputError, match=r'pip install "evomerge\[embeddings\]"'):
        make_retriever("tfidf+embeddings:x", TEXTS)


def test_a_model_that_cannot_be_loaded(tmp_path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ModelError):
        make_retriever(f"embeddings:{tmp_path / 'none'}", TEXTS)


def test_a_real_sentence_transformers_folder(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *"abcdefgh"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(tmp_path / "bert")
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 32,
    }
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path / "bert")
    model = library.SentenceTransformer(str(tmp_path / "bert"), device="cpu")  # adds mean pooling
    model.save(str(tmp_path / "st"))
    found = make_retriever(f"embeddings:{tmp_path / 'st'}", TEXTS).nearest(["b c"], 4)
    vectors = np.asarray(model.encode([*TEXTS, "b c"]), float)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    wanted = np.clip(unit[:4] @ unit[4], 0, 1)
    assert found.scores[0] == pytest.approx(sorted(wanted, reverse=True), abs=1e-5)


def test_fugashi_finds_words():
    pytest.importorskip("fugashi")
    found = make_retriever("bm25", ["海の詩を書いてください", "山の高さを求めなさい"]).nearest(
        ["川の詩を読みたい"], 2
    )
    assert found.indices[0, 0] == 0


def test_the_labelled_sets_are_not_in_the_base():
    texts = {normal_form(row["input"]) for row in LABELLED + SECOND}
    assert (len(LABELLED), len(SECOND), len(texts)) == (160, 160, 320)
    shipped = {normal_form(example.input) for example in read_knowledge(BASE).examples}
    assert not shipped & texts


@pytest.fixture(scope="module")
def shipped():
    knowledge = read_knowledge(BASE)
    assert (
        min(sum(e.class_name == c.name for e in knowledge.examples) for c in knowledge.classes)
        >= 50
    )
    return Chooser(knowledge)


@pytest.mark.parametrize(
    ("rows", "least"),
    [
        ([row for row in LABELLED if row["part"] == "development"], 0.95),
        ([row for row in LABELLED if row["part"] == "test"], 0.92),
        (SECOND, 0.9),
    ],
)
def test_the_shipped_base_classifies_the_labelled_sets(shipped, rows, least):
    found = shipped.classify_all([row["input"] for row in rows])
    assert sum(
        v.class_name == row["kind"] for v, row in zip(found, rows, strict=True)
    ) >= least * len(rows)


def test_an_example_that_differs_in_spaces_and_widths_alone_is_the_task():
    kinds = (KnowledgeClass("計算", "", "{input}"),)
    base = Knowledge(
        kinds,
        (Example(2, "計算", "1 + 1 は いくつ？", "2"), Example(3, "計算", "1+2はいくつ?", "3")),
    )
    assert [e.row for e in Chooser(base).choose("１+１はいくつ?").examples] == [3]
