"""Tasks drawn by how much models differ on them: chances, draws and estimates against plain
formulas, and studies that use them.
"""

from collections import Counter

import numpy as np
import pytest
from search_tools import QualityJudge, make_search, make_study

from evomerge.judging.grade import Grade
from evomerge.searching.estimates import difference_estimate, two_phase_mean
from evomerge.searching.generation.informative import (
    FLOOR,
    PRIOR,
    inclusion_chances,
    spreads,
    systematic_sample,
)

SPREADS = {
    "idle and telling": [0.0] * 20 + [1.0] * 10 + [3.0] * 6,
    "one that tells far more": [0.0] * 20 + [1.0] * 15 + [500.0],
    "one alone": [0.0] * 35 + [2.0],
    "all alike": [0.7] * 36,
}


def water_level(spread, size):
    """min(1, least + c spread), with c by bisection such that the chances add up to the size."""
    least = FLOOR * size / len(spread)
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        total = np.minimum(1, least + middle * spread).sum()
        low, high = (middle, high) if total < size else (low, middle)
    return np.minimum(1, least + low * spread)


@pytest.mark.parametrize("size", [2, 8, 16])
@pytest.mark.parametrize("name", ["idle and telling", "one that tells far more", "all alike"])
def test_chances_grow_with_the_spread_and_add_up_to_the_size(name, size):
    spread = np.array(SPREADS[name])
    chances = inclusion_chances(spread, size)
    assert chances == pytest.approx(water_level(spread, size), abs=1e-9)
    assert chances.sum() == pytest.approx(size)


def test_what_a_single_telling_task_leaves_is_shared():
    chances = inclusion_chances(np.array(SPREADS["one alone"]), 8)
    assert chances == pytest.approx([7 / 35] * 35 + [1.0])


@pytest.mark.parametrize("name", SPREADS)
def test_each_task_is_drawn_with_its_chance(name):
    spread, rng = np.array(SPREADS[name]), np.random.default_rng(0)
    chances, draws = inclusion_chances(spread, 16), 4000
    drawn = Counter()
    for _ in range(draws):
        sample = systematic_sample(chances, rng.permutation(36), rng.random())
        assert len(sample) == len(set(sample)) == 16
        drawn.update(sample)
    found = np.array([drawn[i] / draws for i in range(36)])
    assert np.abs(found - chances).max() < 4.5 * np.sqrt(0.25 / draws)


def test_spreads_pool_the_variances_within_groups():
    rng = np.random.default_rng(1)
    tasks = list("abcdef")
    first = [dict(zip(tasks, rng.normal(size=6), strict=True)) for _ in range(5)]
    second = [dict(zip("ace", 10 + rng.normal(size=3), strict=True)) for _ in range(4)]
    squares, freedom = dict.fromkeys(tasks, 0.0), dict.fromkeys(tasks, 0)
    for group in (first, second):
        for task in group[0]:
            values = [grades[task] for grades in group]
            squares[task] += np.var(values) * len(values)
            freedom[task] += len(values) - 1
    pooled = sum(squares.values()) / sum(freedom.values())
    expected = [np.sqrt((squares[t] + PRIOR * pooled) / (freedom[t] + PRIOR)) for t in tasks]
    assert spreads([first, second], tasks) == pytest.approx(expected)
    assert not spreads([[{"a": 3.0}, {"a": 3.0}]], tasks).any()


def test_the_estimate_is_unbiased_and_its_variance_is_what_draws_vary_by():
    rng = np.random.default_rng(2)
    n, size = 60, 15
    names = [str(i) for i in range(n)]
    baseline = rng.normal(3, 1, n)
    telling = np.where(rng.random(n) < 0.4, 0.05, 1.0)
    grades = baseline + 0.5 + telling * rng.normal(size=n)
    chances = inclusion_chances(telling, size)
    known = dict(zip(names, baseline, strict=True))
    scores, drawn, plain = [], [], []
    for _ in range(3000):
        order = rng.permutation(n)
        sample = systematic_sample(chances, order, rng.random())
        seen = {names[i]: grades[i] for i in sample}
        found = difference_estimate(seen, known, {names[i]: chances[i] for i in sample})
        scores.append(found[0])
        drawn.append(found[2])
        assert found[1] ** 2 > found[2]
        plain.append(two_phase_mean({names[i]: grades[i] for i in order[:size]}, known)[0])
    error = np.std(scores) / np.sqrt(len(scores))
    assert abs(np.mean(scores) - grades.mean()) < 4 * error
    assert np.mean(drawn) == pytest.approx(np.var(scores), rel=0.15)


def test_equal_chances_give_the_plain_two_phase_mean():
    rng = np.random.default_rng(3)
    known = {str(i): float(x) for i, x in enumerate(rng.normal(3, 1, 40))}
    seen = {str(i): known[str(i)] + float(rng.normal()) for i in range(0, 40, 3)}
    chances = dict.fromkeys(seen, len(seen) / 40)
    assert difference_estimate(seen, known, chances) == pytest.approx(two_phase_mean(seen, known))
    # of a race's tasks a candidate saw the first half
    half = dict(list(seen.items())[:7])
    assert difference_estimate(half, known, chances) == pytest.approx(two_phase_mean(half, known))


@pytest.mark.parametrize("ranking", ["subset", "race"])
def test_a_study_scores_by_the_chances_of_its_tasks(tmp_path, ranking):
    """Each generation's chances, worked out from the grades before it."""
    search, _, _ = make_search(tmp_path, make_study(ranking=ranking, subset=12))
    search.run()
    records = [r for r in search.ledger.records() if r.state == "complete"]
    references = [r for r in records if r.role in ("parent", "uniform")]
    tasks = list(references[0].grades)
    level = {t: float(np.mean([r.grades[t].grade for r in references])) for t in tasks}
    by_generation = {}
    for r in records:
        if r.role == "candidate":
            by_generation.setdefault(r.generation, []).append(r)
    groups = [[{t: g.grade for t, g in r.grades.items()} for r in references]]
    for _, trials in sorted(by_generation.items()):
        drawn = max((list(r.grades) for r in trials), key=len)
        if len(drawn) < len(tasks):
            chance = dict(zip(tasks, water_level(spreads(groups, tasks), len(drawn)), strict=True))
            for r in trials:
                share = len(r.grades) / len(drawn)
                above = [(g.grade - level[t]) / (chance[t] * share) for t, g in r.grades.items()]
                expected = sum(above) / len(tasks) + np.mean(list(level.values()))
                assert r.score == pytest.approx(expected)
                assert r.stderr**2 > r.draw_variance > 0
        trials = sorted(trials, key=lambda r: r.index)
        groups.append([{t: g.grade for t, g in r.grades.items()} for r in trials])
    assert len(groups) > 2


class HalfIdle(QualityJudge):
    """Of every other task each answer has the same grade."""

    def grade(self, task, answer):
        found = super().grade(task, answer)
        return Grade(3.0, None, "idle") if int(task.task_id) % 2 else found


@pytest.mark.parametrize(
    ("sampling", "low", "high"), [("informative", 0, 0.3), ("uniform", 0.4, 1)]
)
def test_tasks_that_tell_nothing_are_rarely_asked(tmp_path, sampling, low, high):
    study = make_study(ranking="subset", subset=8, sampling=sampling)
    search, _, _ = make_search(tmp_path, study, judge=HalfIdle())
    search.run()
    asked = [
        int(task) % 2 for r in search.ledger.records() if r.role == "candidate" for task in r.grades
    ]
    assert low < np.mean(asked) < high
