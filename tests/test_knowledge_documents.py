"""Documents: the nearest to each task, as many as the class says, in every retriever."""

import numpy as np
import pytest
from test_retrieval import RETRIEVERS, Letters

from evomerge.knowledge.chooser import QUOTES, Chooser
from evomerge.knowledge.records import Document, Example, Knowledge, KnowledgeClass
from evomerge.knowledge.retrieval import retrievers
from evomerge.knowledge.retrieval.embeddings import EmbeddingRetriever

TITLES = [("a b", "c d"), ("e e", "f"), ("g", "h a"), ("b", "c b c"), ("ん", "を")]


def base(quotes=None, template="{documents}|{input}", count=5):
    classes = (KnowledgeClass("P", "", template, quotes=quotes), KnowledgeClass("Q", "", "{input}"))
    examples = (Example(2, "P", "a b c e", "x"), Example(3, "Q", "y z", "x"))
    return Knowledge(classes, examples, tuple(Document(i + 2, *TITLES[i]) for i in range(count)))


def rows(knowledge, text="b c"):
    return [document.row for document in Chooser(knowledge).choose(text).documents]


def test_the_nearest_come_first_and_three_without_a_number():
    assert QUOTES == 3
    assert rows(base())[:2] == [5, 2]
    assert len(rows(base())) == 3
    assert [len(rows(base(quotes=n))) for n in (0, 1, 2, 9)] == [0, 1, 2, 5]
    assert rows(base(quotes=1), "e f") == [3]


def test_what_shares_nothing_keeps_the_order_of_the_sheet():
    assert rows(base(quotes=9), "b c")[-1] == 6
    assert rows(base(quotes=9), "a b c 日")[0] in (2, 5)
    knowledge = base(count=1)
    # shares nothing with anything: the first class, and what there is
    chosen = Chooser(knowledge).choose("日本")
    assert (chosen.class_name, chosen.documents) == ("P", knowledge.documents)


def test_a_template_that_does_not_ask_gets_none():
    assert rows(base(template="{input}")) == []
    assert Chooser(base()).choose("y z !").documents == ()  # of class Q


def test_a_document_that_equals_the_task_may_stay():
    assert rows(base(quotes=1), "e e\nf") == [3]
    assert rows(base(quotes=1), "e e　f") == [3]


@pytest.mark.parametrize("name", RETRIEVERS)
def test_every_retriever_goes_over_other_texts(name):
    first = RETRIEVERS[name](["x y", "a b"])
    found = first.over(["a b c d", "b c", "g h"]).nearest(["b c"], 2)
    assert list(found.indices[0]) == [1, 0]
    assert found.scores[0, 0] > found.scores[0, 1]
    # the first still hides what equals the task
    assert first.nearest(["a b"], 2).indices[0, 0] == 0


def test_many_tasks_are_as_one_at_a_time():
    chooser = Chooser(base(quotes=2))
    texts = ["b c", "y z !", "e f", "h"]
    assert chooser.choose_all(texts) == [chooser.choose(text) for text in texts]


def test_an_embedding_model_is_loaded_once(monkeypatch):
    loaded = []

    def open_model(texts, model):
        loaded.append(model)
        return EmbeddingRetriever(texts, Letters())

    monkeypatch.setattr(retrievers, "EmbeddingRetriever", open_model)
    knowledge = base(quotes=2)
    found = Chooser(knowledge, "embeddings:m").choose("b c").documents
    vectors = (
        Letters()
        .encode([f"{d.title}\n{d.text}" for d in knowledge.documents] + ["b c"])
        .astype(float)
    )
    near = [v @ vectors[-1] / max(np.linalg.norm(v), 1e-12) for v in vectors[:-1]]
    assert [d.row - 2 for d in found] == sorted(range(5), key=lambda i: -near[i])[:2]
    assert loaded == ["m"]
