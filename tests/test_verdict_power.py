"""What `evomerge check` says a verdict can show, against plain formulas and simulated verdicts."""

import math
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest

from evomerge.searching.estimates import paired_interval
from evomerge.searching.generation.learning import telling_tasks
from evomerge.searching.preflight.verdict_power import advice, verdict_power
from evomerge.searching.records.trial_record import TaskGrade


def graded(*rows):
    """Trials whose grades are the rows; tasks are called by their place."""
    return [
        SimpleNamespace(grades={str(i): TaskGrade(None, False, grade) for i, grade in enumerate(r)})
        for r in rows
    ]


def test_the_error_is_that_of_a_paired_difference():
    rng = np.random.default_rng(0)
    rows = rng.integers(1, 6, (4, 60)).astype(float)
    found = verdict_power(25, "grade", graded(*rows.tolist()))
    variances = [np.var(a - b, ddof=1) for a, b in combinations(rows, 2)]
    assert found.measured
    assert found.error == pytest.approx(math.sqrt(np.mean(variances) / 25))
    assert found.smallest == pytest.approx(1.96 * found.error)


@pytest.mark.parametrize(("metric", "deviation"), [("correct", 0.5), ("grade", 1.5)])
def test_before_any_answer_it_is_what_models_differ_by(metric, deviation):
    found = verdict_power(100, metric)
    assert (found.measured, found.error) == (False, pytest.approx(deviation / 10))
    assert verdict_power(100, metric, graded([1.0, 2.0])).error == found.error, "one is no pair"
    assert verdict_power(0, metric) is None


def test_a_difference_of_the_smallest_size_is_shown_in_half_of_the_verdicts():
    """Tasks like those of the references: of 400 verdicts about half have an interval above 0."""
    rng = np.random.default_rng(1)
    level = rng.normal(3, 1, 80)
    found = verdict_power(50, "grade", graded(*(level + rng.normal(0, 0.9, (5, 80))).tolist()))
    shown = 0
    for _ in range(400):
        winner, parent = rng.normal(0, 0.9, (2, 50))
        shown += paired_interval((winner - parent + found.smallest).tolist())[0] > 0
    assert 0.4 < shown / 400 < 0.6


def test_tasks_that_tell_references_apart_are_counted():
    found = graded([1, 2, 3, 4], [1, 2, 5, 4], [1, 3, 3, 4])
    assert telling_tasks(found, "grade") == (2, 4)
    found[0].grades.pop("1")
    assert telling_tasks(found, "grade") == (1, 3)
    assert telling_tasks([], "grade") == (0, 0)


def test_advice_names_the_setting():
    assert advice(0, 0, 16, 8, 240) == [], "nothing is known yet"
    assert advice(60, 96, 16, 14, 240) == []
    (found,) = advice(24, 96, 16, 14, 240)
    assert "about 4 tell models apart: set search.subset to 32" in found
    assert advice(24, 96, 32, 14, 240) == []
    (found,) = advice(7, 96, 16, 14, 240)
    assert "only 7 of 96 search tasks" in found
    (found,) = advice(60, 96, 96, 14, 60)
    assert "five generations of 14" in found
    assert "search.trials to 70" in found
