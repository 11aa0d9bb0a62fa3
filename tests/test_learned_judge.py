"""The learned judge: its regression against scikit-learn's, its file, what it refuses, and what it
reaches on real grades.
"""

from __future__ import annotations

import json
import pickle
import zipfile

import numpy as np
import pytest

from evomerge.answering.engine import Answer
from evomerge.cli import main
from evomerge.errors import InputError, TaskError
from evomerge.judging.learned import features
from evomerge.judging.learned import judge as learned
from evomerge.judging.learned.features import hashed_grams, measures, normalise
from evomerge.judging.learned.fit import FEWEST, fit_file
from evomerge.judging.learned.judge import LearnedJudge
from evomerge.judging.learned.ridge import (
    ENGLISH_GAP,
    ENGLISH_GRAMS,
    MEASURES_WEIGHT,
    RIDGE,
    GradedAnswers,
    centred,
    english_gap,
    fit,
)
from evomerge.judging.learned.ridge import _ridge as ridge
from evomerge.judging.validation.families import is_tuning
from evomerge.judging.validation.validate import validate_files
from evomerge.tasks import Task, load_tasks

GOOD, BAD = (
    "順番に説明します。まず準備をします。次に実行します。",
    "わかりません。I do not know. わかりません。",
)
TASKS = [
    {"task_id": i, "input": f"手順{i}を説明してください。", "output": GOOD, "eval_aspect": "順番"}
    for i in range(3)
]


def write(path, records):
    path.write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8"
    )
    return path


@pytest.fixture
def files(tmp_path):
    """Twelve models of twelve families; model m says m parts in eleven of the good answer. Task 2
    has too few grades.
    """
    rng = np.random.default_rng(0)
    answers, grades = [], []
    for m in range(12):
        for t in range(3):
            kept = "".join(GOOD[i] if rng.random() < m / 11 else BAD[i] for i in range(len(GOOD)))
            answers.append({"model": f"org{chr(97 + m)}__x", "task_id": t, "output": kept})
            if t < 2 or m < FEWEST - 1:
                grades += [
                    {
                        "model": f"org{chr(97 + m)}__x",
                        "task_id": t,
                        "judge": j,
                        "grade": 1 + 4 * m / 11,
                    }
                    for j in ("p", "q")
                ]
    return [
        write(tmp_path / f"{n}.jsonl", r)
        for n, r in (("tasks", TASKS), ("answers", answers), ("grades", grades))
    ]


def options(files):
    return [
        x
        for name, file in zip(("--tasks", "--answers", "--grades"), files, strict=True)
        for x in (name, str(file))
    ]


def test_fit_says_what_it_is_worth_and_the_judge_orders_answers(files, tmp_path, capsys):
    out = tmp_path / "judge.npz"
    assert main(["judge", "fit", *options(files), "--reference", "p,q", "--out", str(out)]) == 0
    err = capsys.readouterr().err
    for words in (
        "24 answers of 12 models to 2 tasks, graded by p, q",
        "refused by this judge: tasks 2",
        "families of models held out",
    ):
        assert words in err
    judge, tasks = LearnedJudge(out), load_tasks(files[0])
    grades = [
        judge.grade(tasks[0], Answer(text, False, 0)) for text in (GOOD, GOOD[:12] + BAD[12:], BAD)
    ]
    assert grades[0].value > grades[1].value > grades[2].value
    assert all(
        1 <= g.value <= 5
        and g.correct is None
        and "24" not in g.reason
        and "12 answers" in g.reason
        for g in grades
    )
    assert judge.grade(tasks[0], Answer(" \n。", False, 0)).value == 1.0
    assert judge.facts.held_out["by_family"] is True


def test_a_fitted_judge_is_kept(files, tmp_path, capsys, monkeypatch):
    """Studies name it: another fit to the same file is refused, the same one does nothing."""
    out = tmp_path / "judge.npz"
    command = ["judge", "fit", *options(files), "--out", str(out)]
    assert main([*command, "--reference", "p"]) == 0
    before = out.read_bytes()
    capsys.readouterr()
    assert main([*command, "--reference", "p"]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert main([*command, "--reference", "p,q"]) == 2
    assert "holds a judge from another run (changed: judges or models)" in capsys.readouterr().err
    monkeypatch.setattr(learned.features, "VERSION", 99)
    assert main([*command, "--reference", "p"]) == 2
    assert "version of evomerge" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert main([*command, "--reference", "p,q", "--overwrite"]) == 0


def test_commas_and_spaces_name_the_same_judges(files, tmp_path):
    names = [["--reference", "p,q"], ["--judge", "p", "q"]]
    versions = []
    for i, name in enumerate(names):
        assert (
            main(["judge", "fit", *options(files), *name, "--out", str(tmp_path / f"{i}.npz")]) == 0
        )
        versions.append(LearnedJudge(tmp_path / f"{i}.npz").weights)
    np.testing.assert_array_equal(versions[0].grams, versions[1].grams)


def test_tasks_it_has_not_seen_are_refused_before_anything_is_graded(files, tmp_path, capsys):
    out = tmp_path / "judge.npz"
    fit_file(*files, ["p"], out)
    judge, tasks = LearnedJudge(out), load_tasks(files[0])
    with pytest.raises(TaskError, match=r"was not fitted on this task \(found: '?2"):
        judge.grade(tasks[2], Answer("x", False, 0))
    with pytest.raises(TaskError, match="a different text of this task"):
        judge.check([Task(0, "別の問い", GOOD, "順番")])
    judge.check([Task("renamed", tasks[0].input, GOOD, "順番")])
    assert (
        main(
            ["judge", "validate", *options(files), "--reference", "p", "--judge", f"learned:{out}"]
        )
        == 2
    )
    err = capsys.readouterr().err
    assert "was not fitted on this task" in err
    assert err.count("\n") == 1


def test_the_ridge_is_that_of_scikit_learn():
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    x, z, y = rng.random((20, 50)), rng.normal(size=(20, 6)), rng.normal(size=20)
    w, v, bias = ridge(x, z, y, np.ones(20))
    scale = np.sqrt(MEASURES_WEIGHT / 6)
    reference = Ridge(alpha=RIDGE).fit(np.hstack([x, scale * z]), y)
    np.testing.assert_allclose(w, reference.coef_[:50], atol=1e-8)
    np.testing.assert_allclose(v, scale * reference.coef_[50:], atol=1e-8)
    assert bias == pytest.approx(reference.intercept_, abs=1e-8)
    weights = rng.random(20) + 0.5
    w, v, bias = ridge(x, z, y, weights)
    reference = Ridge(alpha=RIDGE).fit(np.hstack([x, scale * z]), y, sample_weight=weights)
    np.testing.assert_allclose(w, reference.coef_[:50], atol=1e-8)
    assert bias == pytest.approx(reference.intercept_, abs=1e-8)


def test_the_gap_of_english_answers_is_that_within_models():
    rng = np.random.default_rng(0)
    model = np.repeat(np.arange(6), 40)
    english = rng.random(240) < np.array([0.0, 0.1, 0.3, 0.5, 0.8, 1.0])[model]
    # across models English looks bad, within them it is good
    above = -1.0 * model + 0.2 * english + rng.normal(scale=0.01, size=240)
    dummies = np.eye(6)[model]
    outside = np.eye(240) - dummies @ np.linalg.pinv(dummies)
    inside = outside @ english
    assert english_gap(above, english, model) == pytest.approx(
        inside @ outside @ above / (inside @ inside + ENGLISH_GAP)
    )
    assert english_gap(above, english, model) > 0.05
    assert above[english].mean() < above[~english].mean() - 1


def test_groups_of_answers_are_centred_apart():
    x, common = np.arange(12.0).reshape(4, 3), np.ones(3)
    rows, means = centred(x, np.array([False, False, True, False]), common)
    np.testing.assert_allclose(rows[[0, 1, 3]].sum(0), 0, atol=1e-12)
    np.testing.assert_allclose(means[1], (x[2] + ENGLISH_GRAMS * common) / (1 + ENGLISH_GRAMS))
    rows, means = centred(x, np.zeros(4, bool), np.zeros(3))
    np.testing.assert_allclose(means[0], means[1])


def english_examples(latin):
    """Ten models' answers to two tasks; the three weakest answer task 0 in Latin letters, everybody
    task 1 where `latin`.
    """
    rng = np.random.default_rng(0)
    task, model = np.repeat([0, 1], 10), np.tile(np.arange(10), 2)
    z = rng.normal(size=(20, len(features.NAMES))).astype(np.float32)
    z[:, features.NAMES.index("latin")] = np.where(
        (task == 0) & (model < 3) | (task == 1) & latin, 0.9, 0.0
    )
    z[:, features.NAMES.index("kana")] = 0.0
    grams_of = [
        (np.array([model[i], 100 + task[i], 200 + i]), np.ones(3, np.float32)) for i in range(20)
    ]
    return GradedAnswers(task, model, 1 + 4 * model / 9, grams_of, z, np.ones(20))


def test_an_english_answer_is_no_worse_for_being_english():
    weights = fit(english_examples(latin=True), 2)
    np.testing.assert_array_equal(weights.asks_english, [False, True])
    new = (np.array([5000]), np.ones(1, np.float32))  # n-grams that no answer has
    at = {g: weights.mean[g, 0].copy() for g in (0, 1)}
    at[1][features.NAMES.index("latin")], at[1][features.NAMES.index("kana")] = 0.9, 0.0
    japanese, english = weights.predict(0, new, at[0]), weights.predict(0, new, at[1])
    assert english > 2.8  # the three English answers of the fit have 1.0 to 1.9
    assert abs(english - japanese) < 1.5


def test_a_fit_without_english_answers_treats_them_like_the_others():
    weights = fit(english_examples(latin=False).at(np.arange(20) >= 3), 2)
    for values in (weights.mean, weights.scale, weights.bias):
        np.testing.assert_array_equal(values[0], values[1])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ああああいう", []),
        (
            "京都は2,000円か3.5円、東京タワー",
            ["京都", "2,000", "円", "3.5", "円", "東京", "タワー"],
        ),
        ("I don't know x ア", ["don't", "know"]),
    ],
)
def test_grams_count_every_n_gram_and_word(text, words):
    from collections import Counter

    counts = [
        Counter(text[i : i + n] for n in lengths for i in range(len(text) - n + 1))
        for lengths in ((3, 4), (1, 2))
    ]
    counts.append(Counter(words))
    buckets, weights = hashed_grams(text)
    assert (np.diff(buckets) > 0).all()
    for kind, (low, high), weight in zip(
        counts, ((0, 32768), (32768, 49152), (49152, 65536)), (1, 2, 2), strict=True
    ):
        inside = (buckets >= low) & (buckets < high)
        assert inside.sum() == len(kind)
        assert sorted(weights[inside]) == pytest.approx(
            sorted(weight * (1 + np.log(np.array(list(kind.values())))))
        )


@pytest.mark.parametrize("text", ["", "a", "\ud83d", "\x00", "𠮷" * 30_000, "a\n" * 9000, "⁰" * 10])
def test_any_text_has_finite_features(text):
    for reference in ("", "b", GOOD):
        found = measures(normalise(text), reference)
        assert found.shape == (len(features.NAMES),)
        assert np.isfinite(found).all()
    assert np.isfinite(hashed_grams(normalise(text))[1]).all()


def test_overlap_with_the_reference_is_that_of_bigrams():
    from collections import Counter

    a, b = (
        Counter(map("".join, zip("abcab", "bcab", strict=False))),
        Counter(map("".join, zip("abab", "bab", strict=False))),
    )
    shared = sum((a & b).values())
    found = dict(zip(features.NAMES, measures("abcab", "abab"), strict=True))
    assert found["precision"] == pytest.approx(shared / 4)
    assert found["recall"] == pytest.approx(shared / 3)


def test_files_that_are_no_judges(files, tmp_path, monkeypatch):
    path = tmp_path / "judge.npz"

    def refused(says):
        with pytest.raises(InputError, match=says) as caught:
            LearnedJudge(path)
        assert "\n" not in str(caught.value)

    for data in (b"", b"PK\x03\x04", pickle.dumps({"a": 1}), b"x" * 100):
        path.write_bytes(data)
        refused("is not a learned judge")
    np.savez(path, about=np.array({"format": 1}, dtype=object))
    refused("is not a learned judge")
    np.savez(path, about=np.array("{}"))
    refused("is not a learned judge")
    fit_file(*files, ["p"], path)
    with zipfile.ZipFile(path) as file:
        assert {name.removesuffix(".npy") for name in file.namelist()} >= {"about", "grams", "bias"}
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused("is not a learned judge")
    path.write_bytes(whole)
    monkeypatch.setattr(learned.features, "VERSION", 99)
    refused("fitted by a different version")


def test_too_little_to_fit(files, tmp_path, capsys):
    few = write(
        tmp_path / "few.jsonl", [{"model": "orga__x", "task_id": 0, "judge": "p", "grade": 3}]
    )
    assert (
        main(
            [
                "judge",
                "fit",
                *options([*files[:2], few]),
                "--reference",
                "p",
                "--out",
                str(tmp_path / "j.npz"),
            ]
        )
        == 2
    )
    assert "no task has enough graded answers" in capsys.readouterr().err
    assert not (tmp_path / "j.npz").exists()


def test_real_grades_of_families_it_was_not_fitted_on(shared, tmp_path):
    real = [shared / f"elyza/{name}.jsonl" for name in ("tasks", "answers", "grades")]
    fitted = fit_file(
        *real,
        ["athene-v2", "tulu-405b"],
        tmp_path / "judge.npz",
        lambda model: is_tuning(model or ""),
    )
    assert (len(fitted.models), fitted.n_tasks) == (62, 100)
    found = validate_files(
        *real, "gpt-4-turbo", f"learned:{tmp_path / 'judge.npz'}", models="test", again=0
    )
    assert found.n_models == 37
    assert found.agreements.within_task.value >= 0.57
    assert found.agreements.model_level.value >= 0.89
