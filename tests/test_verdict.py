import numpy as np
import pytest
from scipy import stats

from evomerge.searching.choosing import choose_winner, finalists
from evomerge.searching.estimates import mean_and_error, paired_interval, stratified_error
from evomerge.searching.final_test import make_verdict
from evomerge.searching.history import History
from evomerge.searching.records.trial_record import TaskGrade, TrialRecord
from evomerge.searching.records.verdict_record import Verdict


def record(number, role, grades, weights=(1.0, 0.5)):
    by_task = {
        str(i): TaskGrade(grade=float(g), correct=None, truncated=False)
        for i, g in enumerate(grades)
    }
    score, error = mean_and_error(list(map(float, grades)))
    return TrialRecord(
        number,
        0,
        number,
        role,
        "complete",
        weights,
        score,
        error,
        len(grades),
        0.0,
        {},
        None,
        by_task,
    )


def test_mean_and_error_are_scipys():
    values = [1.0, 2.0, 4.0, 5.0, 5.0]
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(np.mean(values))
    assert error == pytest.approx(stats.sem(values))


def test_one_value_has_no_standard_error():
    assert mean_and_error([2.0]) == (2.0, None)
    assert stratified_error({"a": 2.0}, {"a": 0}) is None
    old = {
        "metric": "grade",
        "n": 1,
        "candidates": {"winner": {"mean": 2.0, "stderr": 0.0, "truncated": 0.0}},
        "paired": {},
    }
    assert Verdict.from_dict(old).candidates["winner"].stderr is None


def test_the_error_of_groups_is_that_of_their_means():
    values = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 2.5, "e": 4.0}
    parts = [[1.0, 3.0], [2.0, 2.5, 4.0]]
    expected = sum((len(p) / 5) ** 2 * np.var(p, ddof=1) / len(p) for p in parts)
    found = stratified_error(values, {"a": 0, "b": 0, "c": 1, "d": 1, "e": 1})
    assert found == pytest.approx(np.sqrt(expected))
    # a group of one has no spread of its own: that of all values is used for it
    alone = (4 / 5) ** 2 * np.var([1.0, 3.0, 2.0, 2.5], ddof=1) / 4
    alone += (1 / 5) ** 2 * np.var(list(values.values()), ddof=1)
    found = stratified_error(values, {"a": 0, "b": 0, "c": 0, "d": 0, "e": 1})
    assert found == pytest.approx(np.sqrt(alone))


def test_the_interval_is_scipys():
    differences = np.random.default_rng(0).normal(0.3, 1.0, 60)
    wanted = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert paired_interval(differences.tolist()) == pytest.approx((wanted.low, wanted.high))
    assert paired_interval([0.5] * 7) == (0.5, 0.5)


def test_the_interval_of_groups_is_welchs():
    """Half the sum of two groups' means is half the difference of the one and minus the other."""
    rng = np.random.default_rng(1)
    one, two = rng.normal(0.3, 1.0, 9), rng.normal(-0.1, 3.0, 9)
    wanted = stats.ttest_ind(one, -two, equal_var=False).confidence_interval(0.95)
    found = paired_interval([*one, *two], [0] * 9 + [1] * 9)
    assert found == pytest.approx((wanted.low / 2, wanted.high / 2))
    low, high = paired_interval([*one, 0.4], [0] * 9 + [1])  # one alone has the spread of all
    known = {str(i): x for i, x in enumerate([*one, 0.4])}
    error = stratified_error(known, {task: int(task == "9") for task in known})
    assert high - low > 2 * 1.96 * error


def chosen(trials, references_win=False):
    return choose_winner(finalists(History(trials), 3, references_win), "grade")


def test_a_lucky_trial_does_not_beat_the_mean_but_a_clearly_better_one_does():
    mean = record(9, "mean", [3, 3, 3, 3, 3, 3] * 4)
    lucky = record(1, "candidate", [5, 1, 3, 3, 4, 3] * 4)
    clear = record(2, "candidate", [4, 5, 4, 4, 5, 4] * 4)
    assert chosen((lucky, mean)).number == 9
    assert chosen((clear, mean)).number == 2
    assert chosen((lucky,)).number == 1


def test_the_best_uniform_weight_is_one_weight():
    history = History(
        (
            record(0, "parent", [1], (0.0, 0.0)),
            record(1, "parent", [5], (1.0, 0.0)),
            record(2, "uniform", [3], (0.5, 0.5)),
        )
    )
    assert history.best_uniform(lambda weights: len(set(weights)) == 1).number == 2
    assert history.best_uniform(lambda weights: weights == (1.0, 0.0)).number == 1


def test_the_verdict_pairs_by_task_and_leaves_open_tasks_out_of_correct():
    def grades(*rights):
        return {
            str(i): TaskGrade(grade=1.0, correct=r, truncated=i == 0) for i, r in enumerate(rights)
        }

    verdict = make_verdict(
        {"winner": grades(True, True, None, True), "base": grades(False, True, None, False)},
        "correct",
    )
    assert (verdict.metric, verdict.n) == ("correct", 3)
    assert verdict.candidates["winner"].mean == 1.0
    assert verdict.candidates["base"].truncated == 0.25
    assert verdict.paired["winner-base"].diff == pytest.approx(2 / 3)
    wanted = stats.ttest_rel([1, 1, 1], [0, 1, 0]).confidence_interval(0.95)
    assert verdict.paired["winner-base"].low == pytest.approx(wanted.low)
    assert verdict.paired["winner-base"].high == pytest.approx(wanted.high)
