"""The rule that chooses the winner."""

from types import SimpleNamespace

import numpy as np

from evomerge.searching.choosing import choose
from evomerge.searching.history import best_first


def grades(*values):
    return {str(i): float(v) for i, v in enumerate(values)}


def test_the_best_few_trials_in_order():
    def best(count, **scores):
        trials = [SimpleNamespace(number=int(n[1:]), score=score) for n, score in scores.items()]
        return [trial.number for trial in best_first(trials)[:count]]

    assert best(3, t3=0.5, t1=0.7, t2=0.7, t0=0.1) == [1, 2, 3]
    assert best(3, t4=1.0) == [4]


def test_the_comparison_is_paired_over_the_tasks_that_all_saw():
    mean = grades(*[3, 1, 5, 2, 4] * 6)
    above = {task: value + 0.5 for task, value in mean.items()}
    # without pairs, the spread of the tasks would hide the difference
    assert choose({"#1": above, "mean": mean}) == "#1"
    assert choose({"#1": above, "mean": mean | {"unseen": 1e6}}) == "#1"
    assert choose({"#1": grades(5), "mean": grades(1)}) == "mean", "one task tells nothing"


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
