"""Classes by a model's likelihoods: the formula by hand, a real tiny model by its logits, and what
is combined.
"""

import math

import pytest
import torch
from conftest import make_model, make_tokenizer

from evomerge.answering.hf.likelihood import loglikelihood
from evomerge.errors import InputError, ModelError
from evomerge.knowledge.chooser import Chooser
from evomerge.knowledge.classification.by_model import LEAST, LONGEST, TOGETHER, ModelClassifier
from evomerge.knowledge.records import Example, Knowledge, KnowledgeClass

NAMES = ("かさ", "くつ", "け")


def base(about=("あめ", "", "")):
    classes = tuple(
        KnowledgeClass(name, "", "{input}", text) for name, text in zip(NAMES, about, strict=True)
    )
    inputs = (("かさ", "あいう"), ("くつ", "あいえ"), ("くつ", "おきこ"))
    return Knowledge(
        classes, tuple(Example(i + 2, name, text, "x") for i, (name, text) in enumerate(inputs))
    )


class Table:
    """Likelihoods from a table: what a name has anyway, and what it has where a letter stands in
    the task.
    """

    def __init__(self, anyway=(-1.0, -5.0, -2.5), letters=None):
        self.anyway, self.letters, self.asked = (
            dict(zip(NAMES, anyway, strict=True)),
            letters or {},
            [],
        )

    def __call__(self, pairs):
        self.asked.append(len(pairs))
        return [
            self.anyway[name]
            + self.letters.get((prompt.rpartition("\n")[2].strip("<>"), name), 0.0)
            for prompt, name in pairs
        ]


def plain_shares(likelihoods, free):
    """The paper's affine transformation with W = diag(p_free)^-1 and b = 0, in plain floats."""
    p = [math.exp(x) / sum(map(math.exp, likelihoods)) for x in likelihoods]
    q = [a / b for a, b in zip(p, free, strict=True)]
    return [x / sum(q) for x in q]


def render(text):
    return f"<{text}>"


def test_the_formula_by_hand():
    table = Table(
        letters={("雨", "かさ"): 1.0, ("道", "くつ"): 2.0, ("道", "け"): 0.5, ("[MASK]", "け"): 3.0}
    )
    found = ModelClassifier(base(), table, render).shares(["雨", "道", "空"])
    anyway = [[-1.0, -5.0, -2.5], [-1.0, -5.0, 0.5], [-1.0, -5.0, -2.5]]
    each = [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in anyway]
    free = [sum(row[i] for row in each) / 3 for i in range(3)]
    for row, likelihoods in zip(
        found, ([0.0, -5.0, -2.5], [-1.0, -3.0, -2.0], [-1.0, -5.0, -2.5]), strict=True
    ):
        assert list(row) == pytest.approx(plain_shares(likelihoods, free))
        assert row.sum() == pytest.approx(1)


def test_what_a_model_likes_anyway_gains_nothing():
    shares = ModelClassifier(base(), Table(anyway=(-0.01, -30.0, -7.0)), render).shares(["空"])
    assert list(shares[0]) == pytest.approx([1 / 3] * 3)


def test_the_question_names_all_classes_and_braces_stay_text():
    asked = ModelClassifier(base(about=("あめ{task}", "", "")), Table(), render).question(
        "{classes}?"
    )
    assert "\n- かさ: あめ{task}\n- くつ\n- け\n" in asked
    assert asked.endswith("\n{classes}?")
    plain = Knowledge(
        (KnowledgeClass("sum", "", "{input}", "adds"),), (Example(2, "sum", "1+1", "2"),)
    )
    assert ModelClassifier(plain, Table(), render).question("x").startswith("Which of these")
    long = ModelClassifier(base(), Table(), render).question("あ" * LONGEST + "い" * LONGEST)
    assert long.endswith("あ…" + "い" * (LONGEST // 2))


def test_many_tasks_are_asked_in_parts_and_the_rest_once():
    table = Table(letters={("道", "くつ"): 2.0})
    model = ModelClassifier(base(), table, render)
    texts = ["道", *["空"] * TOGETHER]
    found = model.shares(texts)
    assert table.asked == [9, 3 * TOGETHER, 3]  # without content, and two parts
    assert found[0] == pytest.approx(model.shares(["道"])[0])
    assert model.shares([]).shape == (0, 3)
    assert table.asked[3:] == [3]


@pytest.mark.parametrize("wrong", [math.nan, -math.inf])
def test_likelihoods_that_are_no_numbers(wrong):
    with pytest.raises(ModelError, match="not numbers") as caught:
        ModelClassifier(base(), Table(anyway=(0.0, wrong, 0.0)), render).shares(["x"])
    assert "\n" not in str(caught.value)


def test_a_real_model_by_its_logits():
    model, tokenizer = make_model(3).float(), make_tokenizer()
    knowledge = base()
    found = ModelClassifier(
        knowledge, lambda pairs: loglikelihood(model, tokenizer, pairs, batch_size=4), render
    )

    def likelihoods(text):
        values = []
        for name in NAMES:
            prompt = tokenizer(render(found.question(text)), add_special_tokens=False)["input_ids"]
            tokens = tokenizer(name, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
            values.append(
                sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(tokens))
            )
        return values

    each = [
        [math.exp(x) / sum(map(math.exp, row)) for x in row]
        for row in map(likelihoods, ("N/A", "[MASK]", ""))
    ]
    free = [sum(row[i] for row in each) / 3 for i in range(3)]
    texts = ["あいお", "かきくけこ", "う"]
    for row, text in zip(found.shares(texts), texts, strict=True):
        assert list(row) == pytest.approx(plain_shares(likelihoods(text), free), abs=1e-4)
    choices = Chooser(knowledge, classify="model", by_model=found).choose_all(texts)
    assert [c.confidence for c in choices] == pytest.approx(
        list(found.shares(texts).max(1)), abs=1e-5
    )
    assert [c.class_name for c in choices] == [NAMES[i] for i in found.shares(texts).argmax(1)]


def test_both_is_the_product_of_the_shares():
    table = Table(letters={("あい", "かさ"): 1.0, ("あい", "け"): 2.0})
    model = ModelClassifier(base(), table, render)
    votes = Chooser(base(), linear=False).classify_all(["あい"])[0].shares
    assert votes[2] == 0
    assert votes[0] == pytest.approx(votes[1])
    shares = model.shares(["あい"])[0]
    product = [max(v, LEAST) * s for v, s in zip(votes, shares, strict=True)]
    found = Chooser(base(), classify="both", by_model=model, linear=False).choose("あい")
    assert (found.class_name, found.confidence) == (
        "かさ",
        pytest.approx(product[0] / sum(product)),
    )
    assert [e.row for e in found.examples] == [2]
    assert Chooser(base(), classify="model", by_model=model).classify("あい") == "け"
    assert (
        Chooser(base(), classify="neighbours", by_model=model, linear=False).classify("あい")
        == "かさ"
    )


def test_without_neighbours_the_model_decides_and_too_little_gives_the_default():
    model = ModelClassifier(base(), Table(letters={("日", "くつ"): 3.0}), render)
    chooser = Chooser(base(), classify="both", by_model=model)
    assert chooser.classify("日") == "くつ"
    assert chooser.choose("日").confidence == pytest.approx(float(model.shares(["日"])[0].max()))
    unsure = Chooser(base(), classify="model", by_model=model, threshold=0.5, default="け")
    assert [v.class_name for v in unsure.classify_all(["日", "月"])] == ["くつ", "け"]
    assert unsure.choose_all([]) == []


def test_bad_ways_are_said():
    with pytest.raises(InputError, match="unknown way to classify"):
        Chooser(base(), classify="votes")
    for way in ("model", "both"):
        with pytest.raises(InputError, match="needs a model"):
            Chooser(base(), classify=way)
