"""Grading a file of answers: what is read, what is written, and the one-line errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from evomerge.answering.engine import Answer
from evomerge.errors import InputError, JudgeError, OutputError, TaskError
from evomerge.judging.answer_files import GradeSummary, grade_file
from evomerge.judging.grade import Grade
from evomerge.judging.rules.judge import RulesJudge
from evomerge.tasks import Task

TASKS = [
    {"task_id": 0, "input": "What is the capital of Egypt?", "output": "Cairo"},
    {"task_id": 1, "input": "1 + 1 = ?", "output": "2"},
    {"task_id": "x", "input": "自由に書いてください。", "output": ""},
]


def write(path: Path, records: list[dict], newline: str = "\n") -> Path:
    path.write_bytes("".join(json.dumps(r, ensure_ascii=False) + newline for r in records).encode())
    return path


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return write(tmp_path / "tasks.jsonl", TASKS)


def test_answers_with_raw_line_breaks_and_tasks_of_a_table(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.csv"
    tasks.write_text("task_id;input;output\n0;1 + 1 = ?;2\n1;2 + 2 = ?;4\n", encoding="utf-16")
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"task_id": 0, "output": "2\n"}\n{"task_id": 1, "output": "\n5"}\n')
    out = tmp_path / "grades.jsonl"
    grade_file(tasks, answers, RulesJudge(), out)
    assert [json.loads(line)["correct"] for line in out.read_text().splitlines()] == [True, False]
    answers.write_text('{"task_id": 0, "output": "2\n"}\n{"task_id": 7, "output": "5"}\n')
    with pytest.raises(TaskError, match=r"answers\.jsonl, line 3: an answer to an unknown task"):
        grade_file(tasks, answers, RulesJudge(), out)


def test_grades_come_in_input_order_with_every_field(tmp_path: Path, tasks: Path) -> None:
    answers = [
        {"task_id": 1, "output": "3", "model": "b"},
        {"task_id": 0, "output": "It is Cairo.", "model": "a", "truncated": False},
        {"task_id": "x", "output": "今日は良い天気です。散歩に行きます。", "truncated": True},
        {"task_id": 1, "output": "2", "model": "a"},
    ]
    out = tmp_path / "grades.jsonl"
    summary = grade_file(
        tasks, write(tmp_path / "answers.jsonl", answers, "\r\n"), RulesJudge(), out
    )
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(g["task_id"], g["model"], g["correct"]) for g in lines] == [
        (1, "b", False),
        (0, "a", True),
        ("x", None, None),
        (1, "a", True),
    ]
    assert all(
        list(g) == ["task_id", "grade", "reason", "judge", "model", "correct"]
        and g["judge"] == "rules"
        for g in lines
    )
    assert "cut off" in lines[2]["reason"]
    values = [g["grade"] for g in lines]
    mean = sum(values) / 4
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / 3 / 4)
    assert (summary.n, summary.mean, summary.stderr) == (
        4,
        pytest.approx(mean),
        pytest.approx(spread),
    )
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_stdout_when_no_file_is_named(
    tmp_path: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = grade_file(
        tasks,
        write(tmp_path / "a.jsonl", [{"task_id": "0", "output": "カイロ"}]),
        RulesJudge(),
        None,
    )
    captured = capsys.readouterr()
    assert json.loads(captured.out)["task_id"] == 0
    assert captured.err == ""
    assert isinstance(summary, GradeSummary)
    assert summary.stderr is None


def test_half_a_surrogate_pair_is_graded_and_written(tmp_path: Path, tasks: Path) -> None:
    answers = tmp_path / "a.jsonl"
    answers.write_text(
        '{"task_id": 0, "output": "\\ud83d"}\n{"task_id": 1, "output": "The answer is \\ud83d2"}\n'
    )
    out = tmp_path / "g.jsonl"
    assert grade_file(tasks, answers, RulesJudge(), out).n == 2
    assert len(out.read_text(encoding="utf-8").splitlines()) == 2


GOOD = '{"task_id": 0, "output": "Cairo"}\n'


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        (
            GOOD + '{"task_id": 7, "output": "x"}',
            TaskError,
            r"line 2: an answer to an unknown task \(found: 7\)",
        ),
        (GOOD + '{"task_id": 1}', InputError, "line 2: an answer has no `output`"),
        ('{"output": "x"}', InputError, "line 1: an answer has no `task_id`"),
        (GOOD + '{"task_id": 1, "output": null}', InputError, "line 2: `output` is not a string"),
        (GOOD + '{"task_id": 1, "output": "x", "model": 3}', InputError, "`model` is not a string"),
        (
            GOOD + '{"task_id": 1, "output": "x", "truncated": "no"}',
            InputError,
            "`truncated` is neither true nor false",
        ),
        (GOOD + GOOD, InputError, "line 2: a second answer to this task; the first is in line 1"),
        (GOOD + '{"task_id": "0", "output": "x"}', InputError, "a second answer"),
        (GOOD + "[1, 2]", TaskError, "line 2"),
        (GOOD + "{oops", TaskError, "line 2: not valid JSON"),
        ("\n", InputError, "contains no answers"),
    ],
)
def test_bad_answers_are_one_line_errors_and_write_nothing(
    tmp_path: Path, tasks: Path, text: str, kind: type, says: str
) -> None:
    answers, out = tmp_path / "a.jsonl", tmp_path / "g.jsonl"
    answers.write_text(text, encoding="utf-8")
    with pytest.raises(kind, match=says) as caught:
        grade_file(tasks, answers, RulesJudge(), out)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert not out.exists()


def test_the_same_task_by_two_models_is_no_duplicate(tmp_path: Path, tasks: Path) -> None:
    answers = write(
        tmp_path / "a.jsonl",
        [{"task_id": 0, "output": "Cairo", "model": m} for m in ("a", "b")]
        + [{"task_id": 0, "output": "Cairo"}],
    )
    assert grade_file(tasks, answers, RulesJudge(), tmp_path / "g.jsonl") == GradeSummary(
        3, 5.0, 0.0
    )


def test_missing_files_and_folders(tmp_path: Path, tasks: Path) -> None:
    answers = write(tmp_path / "a.jsonl", [{"task_id": 0, "output": "Cairo"}])
    with pytest.raises(InputError, match="no such answers file"):
        grade_file(tasks, tmp_path / "none.jsonl", RulesJudge(), None)
    with pytest.raises(TaskError, match="no such task file"):
        grade_file(tmp_path / "none.jsonl", answers, RulesJudge(), None)
    with pytest.raises(OutputError, match="cannot be written"):
        grade_file(tasks, answers, RulesJudge(), tmp_path / "no" / "folder" / "g.jsonl")


class Failing:
    name, version = "failing", "1"

    def grade(self, task: Task, answer: Answer) -> Grade:
        if task.task_id == 1:
            raise JudgeError("gone", where=self.name)
        return Grade(5.0, None, answer.text)


def test_a_judge_that_fails_leaves_the_old_grades(tmp_path: Path, tasks: Path) -> None:
    out = tmp_path / "g.jsonl"
    out.write_text("old")
    answers = write(tmp_path / "a.jsonl", [{"task_id": i, "output": "x"} for i in (0, 1)])
    with pytest.raises(JudgeError):
        grade_file(tasks, answers, Failing(), out)
    assert out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "g.jsonl", "tasks.jsonl"]
