"""No answer, and no reply of a judge, takes a judge long; and mended patterns grade as before."""

import hashlib
import json
import random
import time

import pytest

from evomerge.answering.engine import Answer
from evomerge.inference.best_of import mutual_grades
from evomerge.inference.selfcheck import faults
from evomerge.judging.learned.features import look
from evomerge.judging.llm.judge_prompt import Rubric, read_vote
from evomerge.judging.rules.judge import RulesJudge
from evomerge.tasks import Task, load_tasks

LONG = 1_000_000
PIECES = [
    "1", "2", "12", "3.5", " ", "  ", "\n", "\n\n", "\u3000", ",", "、", "・", "- ", "* ", "1. ",
    "(1) ", "A. ", "(B) ", " or ", "または", "か", "や", "/", " and ", "と", "->", "→", "。", ". ",
    " but ", "しかし", "です", "ですが、", "the ", "of ", "'", '"', "「", "」", "foo", "Cairo",
    "Ontario", "in ", "(", ")", "=", " is ", "は", "答えは", "answer", ": ", "**", "yes", "no",
    "はい", "いいえ", "km", "個", "%", "万", "?", "か？", "漢", "カタカナ", "not ", "ではない",
    "three ", "四", "\ufdfa", "㌔", "<think>", "```", "よって",
]  # fmt: skip
ROWS = [
    ("いくつですか？", "1, 2, 3"),
    ("How many apples are there?", "12"),
    ("正しいですか？", "はい"),
    ("What is the capital of Egypt?", "Cairo"),
    ("Sort: foo, bar", "bar, foo"),
    ("Which one? (A) x (B) y", "B"),
    ("どちらですか。\nA. 円\nB. 円柱", "よって、答えは円です。円は丸いです。", "円が正解"),
    ("何個ありますか。", "全部で12個です。これは3個と4個の積だからです。"),
    ("並べ替えてください。\n1. a\n2. b\n3. c", "順番は1, 3, 2です。これが順番です。"),
    ("3つ挙げてください。", "1. りんご\n2. みかん\n3. ぶどう\n果物です。", "- 果物: 5点"),
    ("Is it so?\nWrite a poem.", "Roses are red.\nViolets are blue."),
    ("式を書いてください。", "式は(3+4)*5=35です。これが答えです。"),
]
TASKS = [Task(i, *(*row, "")[:3]) for i, row in enumerate(ROWS)]


def texts(count, longest, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        yield "".join(rng.choice(PIECES) for _ in range(rng.randint(1, longest)))


def digest(grades):
    text = json.dumps([[g.value, g.correct, g.reason] for g in grades], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_generated_answers_have_the_grades_of_version_0_1():
    judge = RulesJudge()
    grades = [
        judge.grade(task, Answer(text, False, 1)) for text in texts(150, 40) for task in TASKS
    ]
    assert digest(grades) == "d9310c2ce8d7e461"


def test_real_answers_have_the_grades_of_version_0_1(shared):
    judge, found = RulesJudge(), []
    tasks = {task.task_id: task for task in load_tasks(shared / "elyza" / "tasks.jsonl")}
    with (shared / "elyza" / "answers.jsonl").open(encoding="utf-8") as lines:
        for i, line in enumerate(lines):
            if i % 8 == 0:
                row = json.loads(line)
                found.append(judge.grade(tasks[row["task_id"]], Answer(row["output"], False, 1)))
    assert digest(found) == "f6c712eaba143c3e"


def test_blank_lines_between_two_numbers_end():
    """The answer of a base model that hung a search for ever."""
    grade = RulesJudge().grade(TASKS[0], Answer("1" + "\n" * 40 + "answer: 2", False, 1))
    assert grade.correct is False


def seconds(function, *arguments):
    began = time.process_time()
    function(*arguments)
    return time.process_time() - began


def pumped(count, seed):
    """A megabyte of one or two pieces each, after some others."""
    rng = random.Random(seed)
    for _ in range(count):
        unit = "".join(rng.sample(PIECES, rng.randint(1, 2)))
        head = "".join(rng.choice(PIECES) for _ in range(4))
        yield head + unit * (LONG // len(unit)) + rng.choice(PIECES)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.output[:8])
def test_a_megabyte_of_answer_is_graded_in_a_second(task):
    judge = RulesJudge()
    for text in pumped(5, task.task_id):
        answer = Answer(text, True, 1)
        assert seconds(judge.grade, task, answer) < 1, text[:60]


def test_a_megabyte_is_no_burden_for_what_else_looks_at_answers():
    for text in pumped(4, 100):
        answer = Answer(text, True, 1)
        assert seconds(look, TASKS[6], answer) < 1.5, text[:60]
        assert seconds(faults, answer, TASKS[6].input) < 1.5, text[:60]
        assert seconds(Rubric().messages, TASKS[6], text) < 1, text[:60]


def test_answers_as_references_are_no_burden():
    for text in pumped(2, 200):
        answers = [Answer(text, False, 1), Answer("1, 2", False, 1)]
        assert seconds(mutual_grades, TASKS[0], answers) < 3, text[:60]


@pytest.mark.parametrize(
    "reply",
    [
        "得点" + " " * LONG + "x",
        "<think>" * (LONG // 7),
        "<think></think>" * (LONG // 15) + '{"grade": 4}',
        "```" + " " * LONG,
        "``` " * (LONG // 4),
        "[" * LONG,
        '{"grade": ' + "4" * 100_000 + "}",
        '{"reason": ' + "[" * 900 + "]" * 900 + ', "grade": 4}',
        "grade: " + "4" * LONG,
        '"grade": ' * (LONG // 9),
    ],
    ids=lambda reply: reply[:12],
)
def test_a_megabyte_of_reply_is_read_in_a_second(reply):
    assert seconds(read_vote, reply) < 1


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("<think>2</think>4", 4),
        ("<think>a</think>b<think>c</think> 点数は 3", 3),
        ("a</think>b</think>5", 5),
        ("<think>a 4", None),
        ("4<think>2</think>", None),
        ("評価： **4", 4),
        ("スコアは:　2", 2),
        ('```json\n{"grade": 2}\n```', 2),
        ('```\n\n{"grade": 2}```', 2),
    ],
)
def test_replies_are_read_as_before(reply, grade):
    vote = read_vote(reply)
    assert (None if vote is None else vote.grade) == grade
