"""The Excel base: what is read, what is refused, and what is near."""

import importlib.util
import math
from collections import Counter
from pathlib import Path

import openpyxl
import pytest

from evomerge.errors import KnowledgeError
from evomerge.knowledge.chooser import SHOTS, Chooser
from evomerge.knowledge.read_base import read_knowledge
from evomerge.knowledge.records import Example, render

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "evomerge" / "knowledge"
CLASSES = [
    ("class", "system", "template"),
    ("計算", "先生", "{examples}\n問:{input}"),
    ("創作", None, "{input}"),
]
EXAMPLES = [
    ("class", "input", "output"),
    ("計算", "3+5はいくつですか", "8"),
    ("計算", "12×3はいくつですか", "36"),
    ("創作", "春の詩を書いてください", "花の雨"),
    ("創作", "海の物語を書いてください", "昔、海に"),
]


def write(path, classes=CLASSES, examples=EXAMPLES, titles=("classes", "examples")):
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in zip(titles, (classes, examples), strict=False):
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


@pytest.fixture
def knowledge(tmp_path):
    return read_knowledge(write(tmp_path / "base.xlsx"))


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location(
        "make_knowledge", ROOT / "benchmarks" / "make_knowledge.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def filled(choice, text):
    return render(choice.kind.template, text, choice.examples, choice.documents)


def test_reads_both_sheets(knowledge):
    assert [(c.name, c.system) for c in knowledge.classes] == [("計算", "先生"), ("創作", "")]
    assert knowledge.examples[1] == Example(3, "計算", "12×3はいくつですか", "36")


def test_numbers_empty_rows_and_column_order(tmp_path):
    examples = [
        ("note", "output", " Input ", "Class"),
        ("x", 8, "3+5", "計算 "),
        (None, None, None, None),
        ("y", 2.5, 5.0, "計算"),
    ]
    read = read_knowledge(
        write(tmp_path / "b.xlsx", CLASSES[:2], examples, titles=("Classes", "examples"))
    )
    assert read.examples == (Example(2, "計算", "3+5", "8"), Example(4, "計算", "5", "2.5"))


BAD = {
    "no sheet": ({"titles": ("classes", "other")}, ["no sheet examples", "other"]),
    "no column": (
        {"classes": [("class", "system"), ("計算", "x")]},
        ["sheet classes, row 1", "no column template"],
    ),
    "column twice": (
        {"classes": [("class", "class", "system", "template")]},
        ["row 1", "more than one column class"],
    ),
    "no template": (
        {"classes": [*CLASSES[:2], ("創作", "x", None)]},
        ["sheet classes, row 3, column template", "empty"],
    ),
    "no input": (
        {"classes": [*CLASSES[:2], ("創作", "x", "書け:{imput}")]},
        ["sheet classes, row 3, column template", "{input}"],
    ),
    "twice": (
        {"classes": [*CLASSES, ("計算", "", "{input}")]},
        ["sheet classes, row 4, column class", "計算"],
    ),
    "no name": (
        {"classes": [*CLASSES, (None, "", "{input}")]},
        ["sheet classes, row 4, column class", "empty"],
    ),
    "unknown class": (
        {"examples": [*EXAMPLES, ("分析", "a", "b")]},
        ["sheet examples, row 6, column class", "分析", "計算, 創作"],
    ),
    "no output": (
        {"examples": [*EXAMPLES, ("創作", "a", None)]},
        ["sheet examples, row 6, column output", "empty"],
    ),
    "no examples": ({"examples": EXAMPLES[:1]}, ["sheet examples", "no rows"]),
    "no classes": (
        {"classes": CLASSES[:1], "examples": EXAMPLES[:1]},
        ["sheet classes", "no rows"],
    ),
    "empty sheet": ({"classes": []}, ["sheet classes, row 1", "no column class"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bases_name_the_place(tmp_path, name):
    changes, parts = BAD[name]
    path = write(tmp_path / "bad.xlsx", **changes)
    with pytest.raises(KnowledgeError) as caught:
        read_knowledge(path)
    line = str(caught.value)
    assert all(part in line for part in [str(path), *parts]), line
    assert "\n" not in line
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("content", [b"", b"class,input\n", b"PK\x03\x04 not really a zip"])
def test_no_excel_file(tmp_path, content):
    (tmp_path / "b.xlsx").write_bytes(content)
    with pytest.raises(KnowledgeError, match="not a readable Excel file"):
        read_knowledge(tmp_path / "b.xlsx")


def test_missing_file(tmp_path):
    with pytest.raises(KnowledgeError, match="no such knowledge base"):
        read_knowledge(tmp_path / "none.xlsx")


def reference_cosine(inputs, i, text):
    """Smoothed TF-IDF cosine from its definition: tf = 1 + ln count, idf = ln((1 + n) / (1 + df)) +
    1 (scikit-learn's guide, 7.2.3.4).
    """
    grams = [
        Counter(t[a : a + n] for n in range(1, 5) for a in range(len(t) - n + 1)) for t in inputs
    ]
    idf = {
        g: math.log((1 + len(inputs)) / (1 + sum(g in c for c in grams))) + 1
        for c in grams
        for g in c
    }
    query = Counter(text[a : a + n] for n in range(1, 5) for a in range(len(text) - n + 1))
    vectors = [
        {g: (1 + math.log(count)) * idf[g] for g, count in c.items() if g in idf}
        for c in (grams[i], query)
    ]
    lengths = [math.sqrt(sum(x * x for x in v.values())) for v in vectors]
    return sum(x * vectors[1].get(g, 0) for g, x in vectors[0].items()) / (lengths[0] * lengths[1])


def test_similarity_is_the_tf_idf_cosine(knowledge):
    text = "海の詩を書いてください"
    inputs = [e.input for e in knowledge.examples]
    found = {e.input: s for e, s in Chooser(knowledge).nearest(text, 4)}
    for i, given in enumerate(inputs):
        assert found[given] == pytest.approx(reference_cosine(inputs, i, text), abs=1e-9)
    assert list(found.values()) == sorted(found.values(), reverse=True)


@pytest.mark.parametrize(
    "text", ["春の詩を書いてください", " 春の詩を書いてください\n", "3+5はいくつですか"]
)
def test_an_example_never_answers_itself(knowledge, text):
    retriever = Chooser(knowledge)
    near = retriever.nearest(text, 10)
    assert len(near) == 3
    assert all(example.input != text.strip() for example, _ in near)
    assert all(
        example.input not in ("春の詩を書いてください", "3+5はいくつですか")
        for example in retriever.choose(text).examples
    )


def test_the_only_example_of_a_class_may_be_the_task(tmp_path):
    base = read_knowledge(write(tmp_path / "b.xlsx", CLASSES[:2], EXAMPLES[:2]))
    choice = Chooser(base).choose("3+5はいくつですか")
    assert (choice.class_name, choice.similarity, choice.examples) == ("計算", 0.0, ())
    assert filled(choice, "3+5はいくつですか") == "\n問:3+5はいくつですか"


def test_classify_votes_and_falls_back_to_the_first_class(knowledge):
    retriever = Chooser(knowledge)
    assert retriever.classify("7×8はいくつですか") == "計算"
    assert retriever.classify("山の詩を書いてください") == "創作"
    assert retriever.classify("xyz") == "計算"


def test_equal_similarities_keep_the_sheets_order(tmp_path):
    rows = [
        EXAMPLES[0],
        *[("創作", "同じ文", f"答え{i}") for i in range(4)],
        ("計算", "同じ文", "別"),
    ]
    near = Chooser(read_knowledge(write(tmp_path / "b.xlsx", examples=rows))).nearest("同じ文だ", 5)
    assert [example.row for example, _ in near] == [2, 3, 4, 5, 6]


def test_choice_shows_the_nearest_example_last(knowledge):
    choice = Chooser(knowledge).choose("12×4はいくつですか")
    assert [example.row for example in choice.examples] == [2, 3]
    assert choice.kind.system == "先生"
    assert filled(choice, "12×4はいくつですか") == (
        "指示: 3+5はいくつですか\n回答: 8\n\n指示: 12×3はいくつですか\n回答: 36\n"
        "問:12×4はいくつですか"
    )
    assert Chooser(knowledge).choose("山の詩を書いてください").kind.system == ""


def test_braces_are_text():
    examples = [Example(2, "c", "{input} {0}", "{examples}")]
    assert render("{examples}|{input}|{other}|{input}", "{examples}{input}{", examples) == (
        "指示: {input} {0}\n回答: {examples}|{examples}{input}{|{other}|{examples}{input}{"
    )


def test_the_demo_base_is_what_the_script_writes(generator):
    assert read_knowledge(SHIPPED / "demo.xlsx") == generator.demo()


def test_the_starter_shows_examples_as_turns():
    base = read_knowledge(SHIPPED / "examples_ja.yaml")
    assert [c.name for c in base.classes] == [
        "分析",
        "創作",
        "抽出",
        "意見",
        "解決",
        "説明",
        "役割",
        "計算",
    ]
    assert all(
        c.template.endswith("。\n\n{input}") and "{examples}" not in c.template
        for c in base.classes
    )
    near = Chooser(base).choose_all([e.input for e in base.examples])
    assert all(len(choice.examples) == SHOTS for choice in near)
    right = [
        choice.class_name == e.class_name for choice, e in zip(near, base.examples, strict=True)
    ]
    assert sum(right) >= 0.85 * len(right)  # each left out in its turn


def test_demo_base_knows_every_skill():
    from evomerge.demo import SKILLS, make_tasks

    base = read_knowledge(SHIPPED / "demo.xlsx")
    retriever = Chooser(base)
    assert [c.name for c in base.classes] == list(SKILLS)
    assert all(
        e.output == SKILLS[e.class_name].apply(e.input.partition(":")[2]) for e in base.examples
    )
    for task in make_tasks():
        choice = retriever.choose(task["input"])
        assert (choice.class_name, choice.kind.system, choice.examples) == (
            task["input"].partition(":")[0],
            "",
            (),
        )
        assert choice.similarity > 0
        assert filled(choice, task["input"]) == task["input"]
