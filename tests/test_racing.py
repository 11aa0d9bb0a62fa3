"""Cheaper rankings: their error rates by simulation, their estimates against the full mean."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from evomerge.searching.estimates import t_quantile, two_phase_mean
from evomerge.searching.generation.racing import blocks, hopeless, subset_size, task_order


@pytest.mark.parametrize("freedom", [1, 2, 5, 49])
@pytest.mark.parametrize("level", [0.05, 1e-3, 1e-4])
def test_the_quantile_is_students(level, freedom):
    t = t_quantile(level, freedom)
    # t = sqrt(freedom) tan(angle) has a density proportional to cos(angle)^(freedom - 1)
    edge, weight = math.atan(t / math.sqrt(freedom)), lambda angle: math.cos(angle) ** (freedom - 1)
    tail = integrate.quad(weight, edge, math.pi / 2, epsabs=1e-14)[0]
    assert tail / (2 * integrate.quad(weight, 0, math.pi / 2)[0]) == pytest.approx(level, rel=1e-8)
    if freedom == 1:
        assert t == pytest.approx(math.tan(math.pi * (0.5 - level)), rel=1e-9)


def test_the_order_is_a_function_of_seed_and_generation():
    assert task_order(1, 2, 50) == task_order(1, 2, 50)
    assert sorted(task_order(1, 2, 50)) == list(range(50))
    assert (
        len(
            {
                tuple(task_order(seed, generation, 50))
                for seed in range(10)
                for generation in range(10)
            }
        )
        == 100
    )
    first = np.array([task_order(0, generation, 10)[0] for generation in range(3000)])
    assert stats.chisquare(np.bincount(first, minlength=10)).pvalue > 1e-3


def test_a_subset_grows_as_the_step_size_shrinks():
    sizes = [subset_size(50, 8, ratio) for ratio in (2.0, 1.0, 0.8, 0.5, 0.1, 0.0)]
    assert sizes == [8, 8, 13, 32, 50, 50]
    assert subset_size(5, 8, 1.0) == 5


@given(st.integers(1, 500), st.integers(1, 20))
def test_blocks_cover_every_position_once(size, block):
    parts = blocks(size, block)
    assert [i for part in parts for i in part] == list(range(size))
    assert all(2 * len(part) >= block for part in parts) or len(parts) == 1


def race(rng, quality, error, zero_one):
    """One generation's race over 48 tasks; what was thrown out."""
    count, size = len(quality), 48
    difficulty = rng.normal(0, 0.7, size)
    latent = quality[:, None] + difficulty + rng.normal(0, 0.9, (count, size))
    grades = (latent > 0).astype(float) if zero_one else np.clip(np.round(3.5 + latent), 1, 5)
    out, parts = set(), blocks(size)
    for part in parts[:-1]:
        seen = np.full((count, size), np.nan)
        seen[:, : part.stop] = grades[:, : part.stop]
        for i in out:
            seen[i, part.start :] = np.nan  # as those that stopped at least a block ago
        out |= hopeless(seen, count // 2, error, len(parts) - 1)
    return out


@pytest.mark.parametrize("zero_one", [False, True])
@pytest.mark.parametrize("spread", [0.0, 0.02, 0.6])
def test_no_more_generations_lose_a_good_candidate_than_stated(zero_one, spread):
    rng, error, runs = np.random.default_rng(0), 0.2, 150
    quality = np.linspace(spread, -spread, 12)  # the first six are the better half
    lost = sum(any(i < 6 for i in race(rng, quality, error, zero_one)) for _ in range(runs))
    assert stats.binomtest(lost, runs, error, alternative="greater").pvalue > 1e-3


def test_broken_candidates_stop_early():
    rng = np.random.default_rng(0)
    quality = np.array([0.1] * 8 + [-2.5] * 4)
    assert race(rng, quality, 0.05, False) == {8, 9, 10, 11}


def test_a_race_of_few_candidates_drops_none():
    grades = np.array([[5.0] * 20, [1.0] * 20])
    assert hopeless(grades, 2, 0.05) == set()
    assert hopeless(np.full((4, 3), np.nan), 2, 0.05) == set()


def test_equal_grades_decide_nothing_by_chance_alone():
    grades = np.array([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert hopeless(grades, 1, 0.05) == set()


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_the_corrected_score_is_right_on_average(data):
    """Over all subsets of a size the mean of the estimates is the mean over all tasks."""
    total = data.draw(st.integers(2, 7))
    values = st.lists(st.integers(1, 5), min_size=total, max_size=total)
    grades, levels = data.draw(values), data.draw(values)
    size = data.draw(st.integers(1, total))
    level = {str(i): float(x) for i, x in enumerate(levels)}
    scores = [
        two_phase_mean({str(i): float(grades[i]) for i in chosen}, level)[0]
        for chosen in combinations(range(total), size)
    ]
    assert np.mean(scores) == pytest.approx(np.mean(grades))


def test_an_easy_subset_does_not_flatter():
    level = {"easy": 5.0, "middling": 3.0, "hard": 1.0}
    assert (
        two_phase_mean({"easy": 5.0}, level)[0]
        == two_phase_mean({"hard": 1.0}, level)[0]
        == pytest.approx(3.0)
    )


def test_with_every_task_seen_the_error_is_that_of_the_mean():
    rng = np.random.default_rng(0)
    grades = {str(i): float(x) for i, x in enumerate(rng.integers(1, 6, 40))}
    score, error, _ = two_phase_mean(grades, dict.fromkeys(grades, 3.0))
    assert (score, error) == pytest.approx(
        (np.mean(list(grades.values())), stats.sem(list(grades.values())))
    )


def test_the_error_is_that_of_repeated_draws():
    """Tasks and the subset are drawn anew each time; the spread of the scores is the error that is
    stated.
    """
    rng = np.random.default_rng(1)
    scores, errors = [], []
    for _ in range(4000):
        level = rng.normal(3, 0.8, 50)
        grades = level + 0.2 + rng.normal(0, 0.9, 50)
        seen = rng.permutation(50)[:12]
        named = {str(i): float(level[i]) for i in range(50)}
        score, error, _ = two_phase_mean({str(i): float(grades[i]) for i in seen}, named)
        scores.append(score)
        errors.append(error)
    assert np.mean(scores) == pytest.approx(3.2, abs=0.02)
    assert np.std(scores) == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=0.05)
