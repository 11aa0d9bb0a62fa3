"""The rule that chooses the winner."""

import numpy as np

from evomerge.searching.choosing import choose, finalists, lead


def grades(*values):
    return {str(i): float(v) for i, v in enumerate(values)}


def test_the_best_few_trials_in_order():
    assert finalists({3: 0.5, 1: 0.7, 2: 0.7, 0: 0.1}, 3) == [1, 2, 3]
    assert finalists({4: 1.0}, 3) == [4]


def test_a_lead_is_paired():
    assert lead(grades(3, 4, 5, 2), grades(2, 3, 4, 1)) == (1.0, 0.0)
    difference, error = lead({"a": 1.0, "b": 3.0, "c": 9.0}, {"a": 1.0, "b": 1.0})
    assert (difference, error) == (1.0, np.std([0, 2], ddof=1) / np.sqrt(2))
    assert lead(grades(3), grades(2)) == (1.0, np.inf)


def test_the_mean_stands_unless_a_trial_is_clearly_better():
    mean = grades(*[3, 3, 3, 3, 3, 3] * 5)
    lucky = grades(*[5, 3, 3, 3, 3, 3] * 5)
    better = grades(*[4, 4, 4, 4, 3, 4] * 5)
    best = grades(*[5, 5, 5, 5, 4, 5] * 5)
    assert choose({"mean": mean, "#1": lucky}) == "mean"
    assert choose({"mean": mean, "#1": lucky, "#2": better}) == "#2"
    assert choose({"#2": better, "#3": best, "mean": mean}) == "#3"


def test_without_a_mean_the_best_grade_wins():
    assert choose({"#1": grades(1, 2), "#2": grades(2, 2)}) == "#2"


def test_equal_candidates_rarely_replace_the_mean():
    rng = np.random.default_rng(0)
    replaced = 0
    for _ in range(500):
        drawn = {name: grades(*rng.normal(3, 0.9, 20)) for name in ("mean", "#1", "#2", "#3")}
        replaced += choose(drawn) != "mean"
    assert replaced < 0.04 * 500
