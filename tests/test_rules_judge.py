"""The rule-based judge against a hand-made table of right and wrong answers, and what holds for any
text.
"""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.answering.engine import Answer
from evomerge.judging.grade import Grade
from evomerge.judging.rules.closed_tasks.grading import is_closed
from evomerge.judging.rules.judge import RulesJudge
from evomerge.tasks import Task, load_tasks
from evomerge.text import count_items, find_numbers, language, named_count

SHARED = Path(__file__).resolve().parents[2] / "shared"
EGYPT = "What is the capital of Egypt?"
MINUTES = "How many minutes are 1 hours and 20 minutes?"
SORT = "Sort these numbers from smallest to largest: 20, 12, 67"
LETTERS = 'How many letters are in the word "candle"?'
FIRST = "Write the first letter of each word: garden button chair"
BIG = 'What is the opposite of "big"? Answer with one word.'
CANADA = "What is the capital of Canada?"
ISE = "伊勢神宮は何県？"
CAN = "缶コーヒーの形は？一番近いものを選んでください。\nA) 円\nB) 円錐\nC) 円柱\nD) 円環"

# question, reference, answer, right or wrong: decided by reading, not by running
TABLE = [
    (EGYPT, "Cairo", "Cairo", True),
    (EGYPT, "Cairo", "cairo.", True),
    (EGYPT, "Cairo", "**Cairo**", True),
    (EGYPT, "Cairo", "The capital of Egypt is Cairo.", True),
    (EGYPT, "Cairo", "The capital of Egypt is Cairo, a city on the Nile.", True),
    (EGYPT, "Cairo", "Cairo is the capital of Egypt.", True),
    (EGYPT, "Cairo", "Sure! The capital city of Egypt is called Cairo.", True),
    (EGYPT, "Cairo", "Egypt is a country in Africa. Its capital is Cairo.", True),
    (EGYPT, "Cairo", "Cairo, Egypt", True),
    (EGYPT, "Cairo", "I'm not sure, but I think it's Cairo.", True),
    (EGYPT, "Cairo", "It is not Alexandria but Cairo.", True),
    (EGYPT, "Cairo", "Answer: Cairo", True),
    (EGYPT, "Cairo", "Cairo\n\nCairo is a large city in the north of the country.", True),
    (EGYPT, "Cairo", "Cairo or Tripoli", False),
    (EGYPT, "Cairo", "Either Tripoli or Cairo.", False),
    (EGYPT, "Cairo", "Cairo, Tripoli, Tunis", False),
    (EGYPT, "Cairo", "1. Cairo\n2. Tripoli\n3. Tunis", False),
    (EGYPT, "Cairo", "Tripoli\nCairo\nTunis", False),
    (EGYPT, "Cairo", "The capital of Egypt is not Cairo.", False),
    (EGYPT, "Cairo", "The capital of Egypt isn't Cairo.", False),
    (EGYPT, "Cairo", "The capital of Egypt is Alexandria, which is north of Cairo.", False),
    (EGYPT, "Cairo", "The capital of Egypt is Alexandria. Cairo is another city.", False),
    (EGYPT, "Cairo", "Alexandria lies north of Cairo.", False),
    (EGYPT, "Cairo", "Alexandria", False),
    (EGYPT, "Cairo", "Cairobi", False),
    ("What is the capital of India?", "New Delhi", "The capital of India is New Delhi.", True),
    ("What is the capital of India?", "New Delhi", "new  delhi", True),
    ("What is the capital of India?", "New Delhi", "The capital of India is Mumbai.", False),
    (
        "What is the capital of Argentina?",
        "Buenos Aires",
        "The capital of Argentina is Buenos Aires. It is on the coast.",
        True,
    ),
    (CANADA, "Ottawa", "Ottawa, Ontario", True),
    (CANADA, "Ottawa", "Ottawa, Ontario.", True),
    (CANADA, "Ottawa", "**Ottawa, Ontario, Canada**", True),
    (CANADA, "Ottawa", "The capital of Canada is Ottawa, Ontario.", True),
    (CANADA, "Ottawa", "It is Ottawa, in the province of Ontario.", True),
    (CANADA, "Ottawa", "Ottawa (Ontario)", True),
    (CANADA, "Ottawa", "Ottawa, Toronto", False),
    (CANADA, "Ottawa", "Ottawa, Ontario, Toronto", False),
    (CANADA, "Ottawa", "Ottawa, Ontario or Toronto, Ontario", False),
    (CANADA, "Ottawa", "Toronto, Ontario", False),
    (
        CANADA,
        "Ottawa",
        "The capital of Canada is Toronto, Ontario. Ottawa, Ontario is another city.",
        False,
    ),
    ("カナダの首都は？", "オタワ", "オンタリオ州オタワです。", True),
    ("カナダの首都は？", "オタワ", "オタワ（オンタリオ州）です。", True),
    (ISE, "三重県", "三重県伊勢市です。", True),
    (ISE, "三重県", "伊勢神宮は三重県伊勢市にあります。", True),
    (ISE, "三重県", "三重県津市ではなく奈良県です。", False),
    (ISE, "三重県", "伊勢市です。", False),
    ("伊勢神宮は何市？", "伊勢市", "三重県伊勢市です。", True),
    (MINUTES, "80", "80", True),
    (MINUTES, "80", "80 minutes", True),
    (MINUTES, "80", "1 hour and 20 minutes is 80 minutes", True),
    (MINUTES, "80", "There are 80 minutes in 1 hours and 20 minutes.", True),
    (MINUTES, "80", "60 + 20 = 80", True),
    (MINUTES, "80", "An hour has 60 minutes, so 60 + 20 = 80 minutes.", True),
    (MINUTES, "80", "80, because an hour has 60 minutes.", True),
    (MINUTES, "80", "eighty minutes", True),
    (MINUTES, "80", "It is not 80 minutes but 90 minutes.", False),
    (MINUTES, "80", "80 or 90 minutes", False),
    (MINUTES, "80", "70, 80, 90", False),
    (MINUTES, "80", "There are 120 minutes in 1 hours and 20 minutes.", False),
    (MINUTES, "80", "800", False),
    (MINUTES, "80", "1 hours and 20 minutes", False),
    ("How many minutes are 1 hours and 0 minutes?", "60", "There are 60 minutes in 1 hour.", True),
    (SORT, "12, 20, 67", "12, 20, 67", True),
    (SORT, "12, 20, 67", "12,20,67", True),
    (SORT, "12, 20, 67", "12 < 20 < 67", True),
    (SORT, "12, 20, 67", "[12, 20, 67]", True),
    (SORT, "12, 20, 67", "12\n20\n67", True),
    (SORT, "12, 20, 67", "1. 12\n2. 20\n3. 67", True),
    (SORT, "12, 20, 67", "The numbers in order are 12, 20 and 67.", True),
    (SORT, "12, 20, 67", "The sorted list of 20, 12, 67 is 12, 20, 67.", True),
    (SORT, "12, 20, 67", "12, 20, 67 is the order of 20, 12, 67.", True),
    (SORT, "12, 20, 67", "20, 12, 67", False),
    (SORT, "12, 20, 67", "12, 20, 67, 80", False),
    (SORT, "12, 20, 67", "12, 20", False),
    (SORT, "12, 20, 67", "The smallest is 12.", False),
    (SORT, "12, 20, 67", "12, 67, 20 or 12, 20, 67", False),
    (LETTERS, "6", 'There are 6 letters in the word "candle".', True),
    (LETTERS, "6", 'The word "candle" has six letters.', True),
    (LETTERS, "6", 'The word "candle" has 6 letters and 2 vowels.', True),
    (LETTERS, "6", 'There are 5 letters in the word "candle".', False),
    (LETTERS, "6", "c, a, n, d, l, e", False),
    (FIRST, "g b c", "g b c", True),
    (FIRST, "g b c", "G, B, C", True),
    (FIRST, "g b c", "gbc", True),
    (FIRST, "g b c", "The first letters are g, b, and c.", True),
    (FIRST, "g b c", "garden: g, button: b, chair: c", True),
    (FIRST, "g b c", "g b c d", False),
    (FIRST, "g b c", "b g c", False),
    (FIRST, "g b c", "garden button chair", False),
    (BIG, "small", "Small", True),
    (BIG, "small", 'The opposite of "big" is "small".', True),
    (BIG, "small", "The opposite of big is small. The opposite of small is big.", True),
    (BIG, "small", "The opposite of big is large, not small.", False),
    (BIG, "small", "smaller", False),
    (BIG, "small", "small, tiny, little", False),
    (ISE, "三重県", "三重県", True),
    (ISE, "三重県", "三重県です。", True),
    (ISE, "三重県", "伊勢神宮は三重県にあります。", True),
    (ISE, "三重県", "答えは「三重県」です。", True),
    (ISE, "三重県", "三重県か奈良県です。", False),
    (ISE, "三重県", "伊勢神宮は三重県ではありません。", False),
    (ISE, "三重県", "伊勢神宮は奈良県にあり、三重県の隣です。", False),
    (ISE, "三重県", "三重県、奈良県、京都府", False),
    ("エジプトの首都は？", "カイロ", "エジプトの首都はカイロです。", True),
    ("エジプトの首都は？", "カイロ", "カイロがエジプトの首都です。", True),
    ("エジプトの首都は？", "カイロ", "ｶｲﾛ", True),
    (
        "エジプトの首都は？",
        "カイロ",
        "エジプトの首都はアレクサンドリアで、カイロの北にあります。",
        False,
    ),
    ("大阪の方が大きいですか。", "はい", "はい、そうです。", True),
    ("大阪の方が大きいですか。", "はい", "いいえ、違います。", False),
    ("Is ice cold?", "Yes", "Yes, it is not warm.", True),
    ("Is ice cold?", "Yes", "No.", False),
    (CAN, "C", "C) 円柱", True),
    (CAN, "C", "正解はＣです。", True),
    (CAN, "C", "The answer is (C).", True),
    (CAN, "C", "B) 円錐", False),
    (CAN, "C", "A or C", False),
    ("逆順:あいう", "ういあ", "ういあ", True),
    ("逆順:あいう", "ういあ", "ういあ、", True),
    ("逆順:あいう", "ういあ", "答えは「ういあ」です。", True),
    ("逆順:あいう", "ういあ", "ういあです。", True),
    ("逆順:あいう", "ういあ", "ういああ", False),
    ("逆順:あいう", "ういあ", "いうあ", False),
    ("逆順:あいう", "ういあ", "うういあ", False),
    ("逆順:あいう", "ういあ", "ういあういあ", False),
    ("先頭:あいう", "あ", "あ", True),
    ("先頭:あいう", "あ", "ああ", False),
    ("並:3121", "1123", "１１２３", True),
    ("並:3121", "1123", "3121", False),
    ("並:3121", "1123", "123", False),
    ("並:1020", "0012", "0012", True),
    ("並:1020", "0012", "12", False),
    ("世界の人口は？", "80億", "約80億人です。", True),
    ("価格は？", "1,200円", "1200円", True),
    ("価格は？", "1,200円", "１，２００円です。", True),
    ("価格は？", "1,200円", "1300円", False),
    ("何人ですか。", "30", "三十人です。", True),
    ("割合は？", "12.5%", "12.50%", True),
    ("信号の色は？", "赤、青、黄", "青、赤、黄", True),
    ("信号の色は？", "赤、青、黄", "信号の色は赤、青、黄です。", True),
    ("信号の色は？", "赤、青、黄", "赤、青", False),
    ("信号の色は？", "赤、青、黄", "赤、青、黄、白", False),
    (
        "Name the primary colours.",
        "red, blue, yellow",
        "The primary colours are red, yellow and blue.",
        True,
    ),
    ("Name the primary colours.", "red, blue, yellow", "red, yellow, blue, green", False),
    ("次のリストを昇順で並び替えて。\n[10, -4, 5]", "[-4, 5, 10]", "[-4,5,10]", True),
    ("次のリストを昇順で並び替えて。\n[10, -4, 5]", "[-4, 5, 10]", "[4, 5, 10]", False),
]


def grade(
    question: str, reference: str, text: str, *, truncated: bool = False, points: str = ""
) -> Grade:
    return RulesJudge().grade(Task(0, question, reference, points), Answer(text, truncated, 0))


@pytest.mark.parametrize(("question", "reference", "answer", "right"), TABLE)
def test_closed_answers_are_right_or_wrong_as_a_reader_says(
    question: str, reference: str, answer: str, right: bool
) -> None:
    given = grade(question, reference, answer)
    assert given.correct is right, given.reason
    assert given.value == 5 if right else given.value <= 3
    assert given.reason
    assert "\n" not in given.reason


def test_an_answer_nearer_to_the_expected_one_gets_partial_credit() -> None:
    near, far = grade(SORT, "12, 20, 67", "12, 67, 20"), grade(SORT, "12, 20, 67", "hello there")
    assert far.value == 1 < near.value < 5
    assert grade("", "ういあ", "ういああ").value > grade("", "ういあ", "かきく").value


@pytest.mark.parametrize("empty", ["", " \n\t", "　", "…。"])
def test_an_empty_answer_gets_1(empty: str) -> None:
    assert grade(EGYPT, "Cairo", empty) == Grade(1.0, False, grade(EGYPT, "Cairo", empty).reason)
    open_grade = grade("説明してください。", PROSE, empty)
    assert (open_grade.value, open_grade.correct) == (1.0, None)


PROSE = (
    "クマは、森での生活に飽き飽きし、新しい冒険を求めて海辺に向かった。海辺に到着したクマは、アザラシたちと出会った。"
    "彼らはクマを受け入れてくれ、一緒に遊んだり、話をしたりするようになった。最後に、クマは別れを告げ、家に帰った。"
)
OTHER_PROSE = (
    "経済の発展には、教育への投資と安定した制度が欠かせない。特に若い世代の雇用を増やす政策が重要だと考えられている。"
    * 2
)
ENGLISH = (
    "The bear was tired of life in the woods and went to the sea, where he met some seals and "
    "became friends with them."
)


def test_open_tasks_are_graded_by_overlap_and_faults() -> None:
    question = "クマが海辺に行く短編小説を書いてください。"
    best = grade(question, PROSE, PROSE)
    assert best.correct is None
    assert best.value == 5
    for worse in (OTHER_PROSE, ENGLISH, PROSE[:20], "クマは海辺に向かった。" * 30):
        assert grade(question, PROSE, worse).value < best.value - 1
    assert (
        grade(question, PROSE, PROSE[:80], truncated=True).value
        < grade(question, PROSE, PROSE[:80]).value
    )
    assert "language" in grade(question, PROSE, ENGLISH).reason
    assert "repeats" in grade(question, PROSE, "クマは海辺に向かった。" * 30).reason


def test_grading_points_count_where_they_name_what_the_reference_has() -> None:
    question, points = (
        "クマが海辺に行く短編小説を書いてください。",
        "- クマとアザラシが友達になる\n- 欠けている場合: 3点",
    )
    with_both, with_one = (
        "クマとアザラシは仲良くなったのでした。",
        "クマとウミウシは仲良くなったのでした。",
    )
    gain = (
        grade(question, PROSE, with_both, points=points).value
        - grade(question, PROSE, with_one, points=points).value
    )
    assert gain > grade(question, PROSE, with_both).value - grade(question, PROSE, with_one).value
    assert "grading points" in grade(question, PROSE, with_both, points=points).reason


def test_without_a_reference_only_the_checkable_counts() -> None:
    question = "仕事の熱意を取り戻すためのアイデアを5つ挙げてください。"
    five = "\n".join(
        f"{i}. {text}"
        for i, text in enumerate(
            ["休みを取る。", "学び直す。", "目標を決める。", "話をする。", "体を動かす。"], 1
        )
    )
    four = five.rsplit("\n", 1)[0]
    assert grade(question, "", five).value == 3
    assert grade(question, "", five).correct is None
    assert grade(question, "", four).value < 3
    assert "4 items instead of 5" in grade(question, "", four).reason
    assert grade(question, "", ENGLISH).value < 3


@pytest.mark.parametrize(
    ("reference", "closed"),
    [("Cairo", True), ("80", True), ("12, 20, 67", True), ("g b c", True), ("ういあ", True),
     ("1,200円", True), ("三重県", True), ("はい。", True), ("[-4, 2, 5]", True), ("", False),
     (PROSE, False), (ENGLISH, False), ("伊勢神宮は三重県にあります。", False),
     ("缶コーヒーの多くは C) 円柱 に近い形をしています。", False)],
)  # fmt: skip
def test_which_references_are_closed(reference: str, closed: bool) -> None:
    assert is_closed(reference) is closed


@pytest.mark.parametrize(
    ("text", "values"),
    [("1,234 and 5", ["1234", "5"]), ("3億5000万", ["350000000"]), ("三百二十一", ["321"]),
     ("twenty-one", ["21"]), ("one hundred and five", ["105"]), ("-4, 2.50", ["-4", "2.5"]),
     ("0012", ["0012"]), ("two 3", ["3"])],
)  # fmt: skip
def test_numbers_in_text(text: str, values: list[str]) -> None:
    assert [n.value for n in find_numbers(text)] == values


def test_counts_and_languages() -> None:
    assert named_count("アイデアを5つ挙げてください。") == 5
    assert named_count("次に読むべきSFを10冊挙げて") == 10
    assert named_count("List three reasons.") == 3
    assert named_count("List zero reasons.") is None
    assert named_count("2024年の3つの出来事を要約せずに読んだ") is None
    assert count_items("1. あ\n   - い\n2. う\n") == 2
    assert count_items("- a\n- b\n- c") == 3
    assert [
        language(t)
        for t in (
            PROSE,
            ENGLISH,
            "我们认为这个问题的解决方法是提高教育水平并且增加投资以促进经济发展",
            "12",
        )
    ] == [
        "ja",
        "latin",
        "zh",
        "",
    ]


@settings(max_examples=400, deadline=None)
@given(
    st.text(max_size=60),
    st.one_of(st.text(max_size=30), st.sampled_from([row[1] for row in TABLE])),
    st.one_of(st.text(max_size=200), st.sampled_from([row[2] for row in TABLE])),
    st.booleans(),
)
def test_any_text_gets_a_grade_from_1_to_5(
    question: str, reference: str, answer: str, truncated: bool
) -> None:
    first = grade(question, reference, answer, truncated=truncated)
    assert 1 <= first.value <= 5
    assert (first.correct is None) is not is_closed(reference)
    assert first == grade(question, reference, answer, truncated=truncated)
    assert "\n" not in first.reason


@pytest.mark.parametrize(
    "text",
    [
        "9" * 30_000,
        "9" * 30 + "億" * 3000,
        "," * 20_000,
        "(" * 20_000,
        "a " * 10_000,
        "あ、" * 10_000,
        "は" * 20_000,
        "not " * 5000,
    ],
)
@pytest.mark.parametrize(
    "reference", ["Cairo", "80", "12, 20, 67", "g b c", "三重県", "ういあ", "赤、青、黄", PROSE]
)
def test_long_and_odd_answers_take_no_time(text: str, reference: str) -> None:
    import time

    start = time.perf_counter()
    assert 1 <= grade("", reference, text).value <= 5
    assert time.perf_counter() - start < 2


def test_every_kind_of_the_real_pairs_tasks_is_closed_and_right_when_it_says_the_reference() -> (
    None
):
    path = SHARED / "smollm-sibling" / "tasks.jsonl"
    if not path.is_file():
        pytest.skip("needs ../shared/smollm-sibling")
    frames = {"capital": "The capital is {}.", "minutes": "It is {} minutes.",
              "sort": "In order: {}.", "letters": "The word has {} letters.",
              "first": "The first letters are {}.",
              "opposite": 'The opposite is "{}".'}  # fmt: skip
    tasks = load_tasks(path)
    for task in tasks:
        for text in (task.output, frames[task.kind].format(task.output)):
            assert RulesJudge().grade(task, Answer(text, False, 0)).correct is True, (task, text)
    by_kind = {kind: [t for t in tasks if t.kind == kind] for kind in frames}
    for group in by_kind.values():
        for task, other in pairwise(group):
            if task.output != other.output:
                assert (
                    RulesJudge()
                    .grade(task, Answer(frames[task.kind].format(other.output), False, 0))
                    .correct
                    is False
                ), (task, other)


def test_it_agrees_with_a_strong_judge_within_tasks_on_real_answers() -> None:
    folder = SHARED / "elyza"
    if not folder.is_dir():
        pytest.skip("needs ../shared/elyza")
    from scipy.stats import spearmanr

    tasks = {task.task_id: task for task in load_tasks(folder / "tasks.jsonl")}
    lines = (folder / "grades.jsonl").read_text(encoding="utf-8").splitlines()
    theirs = {
        (g["model"], g["task_id"]): g["grade"]
        for g in map(json.loads, lines)
        if g["judge"] == "gpt-4-turbo"
    }
    models = set(random.Random(1).sample(sorted({model for model, _ in theirs}), 30))
    ours: dict[int, list[tuple[float, float]]] = {}
    for a in map(json.loads, (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()):
        key = a["model"], a["task_id"]
        if a["model"] in models and key in theirs:
            value = RulesJudge().grade(tasks[a["task_id"]], Answer(a["output"], False, 0)).value
            ours.setdefault(a["task_id"], []).append((value, theirs[key]))
    rhos = [
        spearmanr(pairs).statistic
        for pairs in ours.values()
        if all(len(set(column)) > 1 for column in zip(*pairs, strict=True))
    ]
    assert len(rhos) > 90
    assert sum(rhos) / len(rhos) > 0.30


@pytest.mark.parametrize(
    ("question", "reference", "answer"),
    [
        ("", "and", "and, and"),
        ("", "0012, ", "7"),
        ("", "0012万", "12万"),
        ("name zero", "", "zero"),
        ("", "six ", "six and hundred six"),
    ],
)
def test_unusual_references_get_a_grade(question: str, reference: str, answer: str) -> None:
    assert 1 <= grade(question, reference, answer).value <= 5
