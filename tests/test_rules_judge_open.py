"""Open tasks in the rule-based judge: what it reads from a task, what it checks in an answer, and
how far it agrees with strong judges.

The agreement is measured on models of families that no weight was tuned on
(judging/validation/families.py).
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.answering.engine import Answer
from evomerge.judging.grade import Grade
from evomerge.judging.rules.judge import RulesJudge
from evomerge.judging.rules.open_tasks.kinds import is_polar, kind_of
from evomerge.judging.rules.open_tasks.parsed_text import ParsedText, key_words, weighted_share
from evomerge.judging.rules.open_tasks.points import read_points
from evomerge.judging.validation.families import is_tuning
from evomerge.tasks import Task, load_tasks
from evomerge.text import clean, f1, foreign_letters, sentences, trigrams

ELYZA = Path(__file__).resolve().parents[2] / "shared" / "elyza"


def grade(question: str, reference: str, text: str, points: str = "") -> Grade:
    return RulesJudge().grade(Task(0, question, reference, points), Answer(text, False, 0))


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("次の英文を日本語に訳してください。", "translation"),
        ("以下の会話を要約してください。", "summary"),
        ("次の文を別の言葉で言い換えてください。", "rewriting"),
        ("猫が旅をする短編小説を書いてください。", "creative"),
        ("あなたは海賊です。海賊になりきって答えてください。", "role play"),
        ("次の数を昇順に並べてください。", "order"),
        ("次の中から正しいものを選んでください。", "choice"),
        ("記事から人名をすべて抽出してください。", "extraction"),
        ("りんごは全部で何個ですか？", "calculation"),
        ("夏の季語を3つ挙げてください。", "list"),
        ("鯨は魚ですか？", "yes or no"),
        ("虹はなぜ七色に見えるのですか？", "question"),
        ("Translate this sentence into French.", "translation"),
        ("Why is the sky blue?", "question"),
        ("Is ice lighter than water?", "yes or no"),
    ],
)
def test_the_kind_of_a_task_is_read_from_its_input(question: str, kind: str) -> None:
    assert kind_of(clean(question)) == kind


def test_polar_questions() -> None:
    assert is_polar("ペンギンは飛べますか?")
    assert is_polar("どちらですか? はいかいいえで答えてください。")
    assert not is_polar("ペンギンは何を食べますか?")
    assert not is_polar("ペンギンについて教えてください。")


# question, reference, a better answer, a worse one that is as long and as close in wording, what
# the reason says of the worse
PAIRS = [
    (
        "今日は月曜日です。3日後は何曜日ですか？",
        "順に数えます。\nよって3日後は木曜日です。",
        "3日後は木曜日です。",
        "3日後は金曜日です。",
        "not 木曜日",
    ),
    (
        "鯨は魚ですか？",
        "いいえ、鯨は魚ではありません。哺乳類です。",
        "いいえ、鯨は哺乳類です。",
        "はい、鯨は魚類です。",
        "unlike the reference",
    ),
    (
        "氷は水に沈みますか？",
        "氷は水より軽いため、水には沈みません。",
        "氷は軽いので沈みません。",
        "氷は軽いので沈みます。",
        "unlike the reference",
    ),
    (
        "一番高い山を選んでください。\nA) 浅間山\nB) 富士山\nC) 高尾山",
        "標高から考えると、答えは B) 富士山 になります。他は低い山です。",
        "答えは富士山です。",
        "答えは浅間山です。",
        "does not clearly choose",
    ),
    (
        "2に3を足して4を掛ける式を書いてください。",
        "よって式は (2+3)*4 になります。先に足すので括弧が要ります。",
        "式は 4×(2+3) です。",
        "式は 2+3×4 です。",
        "lacks (2+3)*4",
    ),
    (
        "対応する記号とのペアを答えてください。\n1. 犬 A. にゃあ\n2. 猫 B. ちゅう\n3. 鼠 C. わん",
        "次のようになります。\n(1, C)\n(2, A)\n(3, B)",
        "1. C\n2. A\n3. B",
        "1. A\n2. B\n3. C",
        "0 of 3 pairs",
    ),
    (
        "文を並び替えてください。\n1. 終わりました。\n2. 始まりました。\n3. 続きました。",
        "始まりが最初に来ます。\nよって順番は 2, 3, 1 です。",
        "順番は 2, 3, 1 です。",
        "順番は 1, 3, 2 です。",
        "another order",
    ),
]


@pytest.mark.parametrize(("question", "reference", "better", "worse", "why"), PAIRS)
def test_the_conclusion_is_checked(
    question: str, reference: str, better: str, worse: str, why: str
) -> None:
    good, bad = grade(question, reference, better), grade(question, reference, worse)
    assert good.correct is None
    assert good.value > bad.value + 1, (good, bad)
    assert why in bad.reason
    assert why not in good.reason


def test_what_the_points_call_right_is_looked_for() -> None:
    question, reference = (
        "車はどちらへ曲がりましたか。説明してください。",
        "車は次の角を通りました。\n車は左に曲がりました。",
    )
    points = "- 左が正解で、右は不正解"
    assert (
        grade(question, reference, "左に曲がりました。", points).value
        > grade(question, reference, "右に曲がりました。", points).value + 1
    )


def test_points_are_read_by_what_they_ask_for() -> None:
    reference = "可燃性と難燃性という違いは原子番号によるものです。水素は軽い気体です。"
    read = read_points(
        "- 可燃性に触れている: 5点\n- 気体の説明だけ: 2点\n- 原子番号が抜けている場合: -2点\n"
        "- 水素を褒める: -1点",
        reference,
    )
    assert "可燃性" in read.wanted
    assert "原子番号" in read.wanted
    assert "気体" not in read.wanted
    assert "水素" not in read.wanted
    assert read_points("問題1は左が正解で、南は不正解", "").right == ("左",)


def test_a_text_is_read_for_its_conclusion() -> None:
    reading = ParsedText(
        "以下のように考えます。\n1日後は火曜です。\nよって答えは「水曜」です。\nご参考まで。"
    )
    assert reading.conclusion == "よって答えは「水曜」です。"
    assert reading.body[0] == "1日後は火曜です。"
    assert key_words(reading.conclusion, "") == {"水曜": 2.0}
    assert weighted_share({"水曜": 2.0, "火曜": 1.0}, "火曜でした") == pytest.approx(1 / 3)
    assert [
        ParsedText(t).polarity("沈")
        for t in ("沈みません。", "沈みます。", "はい、沈みます。", "いいえ。", "")
    ] == [-1, 1, 1, -1, 0]
    assert (
        ParsedText("それではいけないので、試しましょう。").polarity("") == 1
    )  # no はい in ではいけない
    assert sentences("「あ。」と言う。\n\nい!う") == ["「あ。」と言う。", "い!", "う"]


def test_wording_and_letters() -> None:
    assert trigrams("あい、うえ") == {"あいう", "いうえ"}
    assert f1(trigrams("あいうえ"), trigrams("あいうお")) == 0.5
    assert set(foreign_letters("这个问题は한국어です")) == set(
        "这问题한국어"
    )  # 个 is a Japanese letter as well
    assert foreign_letters("café で😊コーヒーを①杯、ﾊﾝｶｸ") == ""
    assert foreign_letters("漢語の问", known="问") == ""


def test_faults_cost_and_are_named() -> None:
    question, reference = (
        "日本の四季について説明してください。",
        "日本には春、夏、秋、冬の四季があり、それぞれに行事や食べ物があります。春は桜、秋は紅葉が有名です。",
    )
    good = "日本には四季があります。春は桜が咲き、夏は海で泳ぎ、秋は紅葉を眺め、冬は雪で遊びます。"
    best = grade(question, reference, good).value
    for worse, why in (
        (good * 8, "repeats"),
        (good.replace("桜が咲き", "樱花盛开这里们"), "another script"),
        (
            "Japan has four seasons, and each has its own events and food. Spring is for "
            "flowers and autumn for leaves.",
            "language is latin",
        ),
        (good[:-8] + "、", "cut off"),
        (question, "is the task itself"),
    ):
        given = grade(question, reference, worse)
        assert given.value < best, worse
        assert why in given.reason


def test_brackets_alone_can_be_an_answer() -> None:
    question, reference = (
        "括弧を閉じてください。\n[ { (",
        "順番に閉じていきます。\nよって [ { ( ) } ] になります。",
    )
    assert (
        grade(question, reference, "[ { ( ) } ]").value
        > grade(question, reference, "[ { ( ] } )").value + 1
    )


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [x for row in PAIRS for x in row[:4]]
            + ["(", "1+", "「", "はい", "9" * 50, "]]", "\n", "第"]
        ),
        max_size=6,
    )
)
def test_any_mixture_of_tasks_and_answers_gets_a_grade(parts: list[str]) -> None:
    text = "".join(parts)
    for row in PAIRS:
        assert 1 <= grade(row[0], row[1], text).value <= 5
        assert 1 <= grade(text, row[1] + text, row[2], points=text).value <= 5


def _ranks(x: np.ndarray) -> np.ndarray:
    order = np.sort(x)
    return (np.searchsorted(order, x, "left") + np.searchsorted(order, x, "right")) / 2.0


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


@pytest.fixture(scope="module")
def real() -> tuple[list[str], np.ndarray, float]:
    """(models of the test families, our grades of shape (models, tasks), answers graded per
    second).
    """
    if not ELYZA.is_dir():
        pytest.skip("needs ../shared/elyza")
    tasks = {task.task_id: task for task in load_tasks(ELYZA / "tasks.jsonl")}
    answers = [
        json.loads(line)
        for line in (ELYZA / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    answers = [answer for answer in answers if not is_tuning(answer["model"])]
    models = sorted({answer["model"] for answer in answers})
    ours = np.full((len(models), 100), np.nan)
    start, judge = time.process_time(), RulesJudge()
    for answer in answers:
        given = judge.grade(tasks[answer["task_id"]], Answer(answer["output"], False, 0))
        ours[models.index(answer["model"]), answer["task_id"]] = given.value
    return models, ours, len(answers) / (time.process_time() - start)


@pytest.mark.parametrize("reference", ["gpt-4-turbo", "athene-v2"])
def test_it_agrees_with_strong_judges_on_models_it_was_not_tuned_on(
    real: tuple[list[str], np.ndarray, float], reference: str
) -> None:
    models, ours, _ = real
    theirs = np.full(ours.shape, np.nan)
    for record in map(
        json.loads, (ELYZA / "grades.jsonl").read_text(encoding="utf-8").splitlines()
    ):
        if record["judge"] == reference and record["model"] in models:
            theirs[models.index(record["model"]), record["task_id"]] = record["grade"]
    both = ~np.isnan(ours) & ~np.isnan(theirs)
    within = [
        _spearman(ours[both[:, t], t], theirs[both[:, t], t])
        for t in range(100)
        if both[:, t].sum() > 4 and np.ptp(theirs[both[:, t], t]) and np.ptp(ours[both[:, t], t])
    ]
    assert np.mean(within) >= 0.40
    full = both.sum(1) >= 50
    a = np.array([ours[i, both[i]].mean() for i in np.flatnonzero(full)])
    b = np.array([theirs[i, both[i]].mean() for i in np.flatnonzero(full)])
    assert _spearman(a, b) >= 0.80
    close = [(i, j) for i in range(len(b)) for j in range(i) if 0.15 <= abs(b[i] - b[j]) < 0.3]
    assert np.mean([(a[i] - a[j]) * (b[i] - b[j]) > 0 for i, j in close]) >= 0.68


def test_it_grades_2000_answers_a_second(real: tuple[list[str], np.ndarray, float]) -> None:
    assert real[2] > 1500  # 3,400 measured; the rest is for a busy machine


def test_a_grade_does_not_depend_on_the_tasks_number() -> None:
    for question, reference, better, *_ in PAIRS:
        other = RulesJudge().grade(Task(88, question, reference), Answer(better, False, 0))
        assert other == grade(question, reference, better)
