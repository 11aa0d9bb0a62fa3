"""Validation of a judge: the statistics against scipy and plain loops, joins, the JSON shape,
one-line errors.
"""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from scipy.stats import spearmanr

from evomerge.cli import main
from evomerge.errors import InputError, TaskError
from evomerge.judging.answer_files import read_answers
from evomerge.judging.validation.agreement import _task_spearman as weighted_spearman
from evomerge.judging.validation.agreement import compare
from evomerge.judging.validation.families import family, is_tuning, split_models
from evomerge.judging.validation.reference import join_grades, pick, read_grades
from evomerge.judging.validation.validate import validate_files
from evomerge.tasks import load_tasks

KEYS = {
    "judge", "reference", "n_models", "n_answers", "within_task", "model_level", "within_model",
    "difficulty_baseline", "pairs", "seconds_per_100",
}  # fmt: skip


def tables(seed=0, models=12, tasks=9, missing=0.15):
    rng = np.random.default_rng(seed)
    skill, hard = rng.normal(size=(models, 1)), rng.normal(size=(1, tasks))
    reference = np.clip(np.round(3 + skill + hard + 0.5 * rng.normal(size=(models, tasks))), 1, 5)
    judge = np.clip(np.round(reference + rng.normal(size=reference.shape)), 1, 5)
    judge[rng.random(judge.shape) < missing] = np.nan
    reference[rng.random(judge.shape) < missing] = np.nan
    return judge, reference


def plain(a, b):
    have = ~(np.isnan(a) | np.isnan(b))
    if have.sum() < 3:
        return np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return spearmanr(a[have], b[have]).statistic


@pytest.mark.parametrize("seed", range(5))
def test_the_values_are_those_of_scipy_and_plain_loops(seed):
    judge, reference = tables(seed)
    found = compare(judge, reference, resamples=20)
    both = ~(np.isnan(judge) | np.isnan(reference))
    j, r = np.where(both, judge, np.nan), np.where(both, reference, np.nan)
    assert found.within_task.value == pytest.approx(
        np.nanmean([plain(j[:, t], r[:, t]) for t in range(9)]), abs=1e-4
    )
    means, expected = np.nanmean(j, 1), np.nanmean(r, 1)
    assert found.model_level.value == pytest.approx(plain(means, expected), abs=1e-4)
    assert found.within_model.value == pytest.approx(
        np.nanmean([plain(j[m], r[m]) for m in range(12)]), abs=1e-4
    )
    others = [[np.nanmean(np.delete(r[:, t], m)) for t in range(9)] for m in range(12)]
    assert found.difficulty_baseline.value == pytest.approx(
        np.nanmean([plain(np.array(others[m]), r[m]) for m in range(12)]), abs=1e-4
    )
    for name, low, high in (
        ("0.05-0.15", 0.05, 0.15),
        ("0.15-0.3", 0.15, 0.3),
        ("0.3-0.6", 0.3, 0.6),
    ):
        right = []
        for a in range(12):
            for b in range(12):
                if low <= round(expected[a] - expected[b], 9) < high:
                    right.append(
                        0.5 if abs(means[a] - means[b]) < 1e-9 else float(means[a] > means[b])
                    )
        assert found.pairs[name].n == len(right)
        assert found.pairs[name].value == (
            pytest.approx(np.mean(right), abs=1e-4) if right else None
        )


def test_weights_stand_for_repeated_models():
    judge, reference = tables(3, missing=0)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 12, 12) for _ in range(30)]
    weights = np.stack([np.bincount(row, minlength=12) for row in rows]).astype(float)
    found = weighted_spearman(judge[:, 0], reference[:, 0], weights)
    expected = [plain(judge[row, 0], reference[row, 0]) for row in rows]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_intervals_hold_the_value_and_are_the_same_again():
    judge, reference = tables(1, models=40, tasks=20)
    a, b = compare(judge, reference, 300), compare(judge, reference, 300)
    assert a == b
    for figure in (a.within_task, a.model_level, a.within_model, a.difficulty_baseline):
        assert figure.low < figure.value < figure.high


def test_what_cannot_be_told_is_none():
    one = compare(np.array([[1.0, 2.0, 3.0, 5.0]]), np.array([[1.0, 3.0, 2.0, 4.0]]))
    assert one.within_task.value is None
    assert one.model_level.value is None
    assert one.within_model.value == pytest.approx(0.8)
    assert one.pairs["0.15-0.3"].value is None
    constant = compare(np.full((5, 4), 3.0), tables(0, 5, 4, 0)[1])
    assert constant.within_task.value is None


def test_families_by_name():
    named = {
        "meta-llama__Llama-3.1-8B-Instruct": "llama", "shisa-ai__shisa-llama3-70b-v1": "shisa",
        "allenai__Llama-3.1-Tulu-3-8B~v2": "tulu",
        "cyberagent__Mistral-Nemo-Japanese-Instruct-2408": "cyberagent", "gpt-4o-mini": "gpt",
        "some-org__thing-7b": "some-org", "trial-12": "trial", "Qwen/Qwen2.5-7B": "qwen", "7": "7",
    }  # fmt: skip
    assert {name: family(name) for name in named} == named
    tuning, test = split_models([*named, "gpt-4o-mini"])
    assert sorted(tuning + test) == sorted(named)
    assert not {family(m) for m in tuning} & {family(m) for m in test}
    assert is_tuning("meta-llama__Llama-3.1-8B-Instruct")
    assert not is_tuning("gpt-4o-mini")


TASKS = [{"task_id": i, "input": f"{i} + 1 = ?", "output": str(i + 1)} for i in range(6)]


def write(path, records):
    path.write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8"
    )
    return path


@pytest.fixture
def files(tmp_path):
    """Four models; m0 knows all answers, m3 none; one answer and two grades have no partner."""
    models = range(4)
    answers = [
        {"model": f"m{m}", "task_id": i, "output": str(i + 1 + (i < 2 * m))}
        for m in models
        for i in range(6)
    ]
    grades = [
        {"model": f"m{m}", "task_id": i, "judge": "j", "take": take, "grade": 1 if i < 2 * m else 5}
        for take in (1, 2)
        for m in models
        for i in range(6)
    ]
    answers.append({"model": "alone", "task_id": 0, "output": "1"})
    grades += [{"model": "nobody", "task_id": i, "judge": "j", "grade": 3} for i in (0, 1)]
    grades.append({"model": "m0", "task_id": 0, "judge": "other", "grade": 2.5})
    return [
        write(tmp_path / f"{name}.jsonl", data)
        for name, data in (("tasks", TASKS), ("answers", answers), ("grades", grades))
    ]


def command(files, *more, judge="rules", reference="j"):
    options = [
        x
        for name, file in zip(("--tasks", "--answers", "--grades"), files, strict=True)
        for x in (name, str(file))
    ]
    return ["judge", "validate", *options, "--reference", reference, "--judge", judge, *more]


def test_json_is_one_object_of_the_agreed_shape(files, capsys):
    assert main(command(files, "--json")) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert captured.out.count("\n") == 1
    assert set(found) == KEYS
    assert set(found["pairs"]) == {"0.05-0.15", "0.15-0.3", "0.3-0.6"}
    for key in ("within_task", "model_level", "within_model", "difficulty_baseline"):
        assert set(found[key]) == {"value", "low", "high"}
    assert (found["judge"], found["reference"], found["n_models"], found["n_answers"]) == (
        "rules",
        "j",
        4,
        24,
    )
    assert found["model_level"]["value"] == 1.0
    assert found["seconds_per_100"] > 0
    assert "left out: 1 answers without a grade and 2 grades without an answer" in captured.err


def test_text_names_the_figure_to_judge_by_the_baseline_and_second_runs(files, capsys):
    assert main(command(files, "--again", "5")) == 0
    out = capsys.readouterr().out
    for words in (
        "(judge by this)", "task difficulty alone", "100% of 5 grades the same",
        "a second take of j: 100% of 24", "no cost", "resampled",
    ):  # fmt: skip
        assert words in out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            '{"model": "m0", "task_id": 0, "judge": "j", "take": 3, "grade": 6}',
            "line 52: `grade` is not a number from 1 to 5 .found: 6",
        ),
        (
            '{"model": "m0", "task_id": 0, "judge": "j", "take": 3, "grade": "5"}',
            "`grade` is not a number",
        ),
        (
            '{"model": "m0", "task_id": 0, "judge": "j", "take": 3, "grade": NaN}',
            "`grade` is not a number",
        ),
        (
            '{"model": "m0", "task_id": 77, "judge": "j", "grade": 5}',
            "a grade of an unknown task .found: 77",
        ),
        ('{"model": "m0", "task_id": 0, "judge": "j", "grade": 5}', "a second grade"),
        ('{"model": "m0", "task_id": 0, "grade": 5}', "no `judge`"),
        ('{"model": 3, "task_id": 0, "judge": "j", "grade": 5}', "`model` is not a string"),
        (
            '{"model": "m0", "task_id": 0, "judge": "j", "take": 0, "grade": 5}',
            "`take` is not a count",
        ),
        ("oops", "not valid JSON"),
    ],
)
def test_bad_grades_are_one_line(files, line, says):
    with files[2].open("a") as file:
        file.write(line + "\n")
    with pytest.raises((InputError, TaskError), match=says) as caught:
        validate_files(*files, "j", "rules")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_other_wrong_input_is_one_line(files, tmp_path, capsys):
    assert main(command(files, reference="nobody")) == 2
    assert "Name one of j, other" in capsys.readouterr().err
    assert main(command([files[0], files[1], tmp_path / "none.jsonl"])) == 2
    assert "no such grades file" in capsys.readouterr().err
    assert main(command(files, judge="learned:" + str(tmp_path / "none.npz"))) == 2
    assert "no such learned judge file" in capsys.readouterr().err
    assert main(command(files, judge="magic")) == 2
    assert "no such judge" in capsys.readouterr().err
    apart = write(
        tmp_path / "apart.jsonl", [{"model": "x", "task_id": 0, "judge": "j", "grade": 5}]
    )
    assert main(command([files[0], files[1], apart])) == 2
    err = capsys.readouterr().err
    assert "no answer has a grade" in err
    assert err.count("\n") == 1


def test_the_real_grades_join(shared):
    tasks = load_tasks(shared / "elyza/tasks.jsonl")
    grades = read_grades(shared / "elyza/grades.jsonl", tasks)
    assert len(grades) == 30348
    joined = join_grades(
        read_answers(shared / "elyza/answers.jsonl", tasks), pick(grades, ["gpt-4-turbo"], "grades")
    )
    assert len(joined.lines) == 8776
    assert (joined.answers_alone, joined.grades_alone) == (12200 - 8776, 0)
