"""The verdict: the winner against its parents and the best uniform weight, on tasks that the search
never saw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.searching.choosing import choose
from evomerge.searching.ledger import TrialRecord

RESAMPLES = 10_000


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, s / sqrt(n) with n - 1 in s; the error of one value is 0."""
    array = np.asarray(values, dtype=float)
    error = array.std(ddof=1) / np.sqrt(len(array)) if len(array) > 1 else 0.0
    return float(array.mean()), float(error)


def bootstrap_interval(
    differences: Sequence[float], seed: int = 0, groups: Sequence[str] | None = None
) -> tuple[float, float]:
    """95 % percentile interval of the mean of paired differences (Efron and Tibshirani 1993,
    section 13.3).

    With `groups`, one for each difference, every group is resampled on its own: their sizes are no
    chance.
    """
    array = np.asarray(differences, dtype=float)
    rng = np.random.default_rng(seed)
    parts = (
        [array]
        if groups is None
        else [array[[g == name for g in groups]] for name in dict.fromkeys(groups)]
    )
    sums = [part[rng.integers(0, len(part), (RESAMPLES, len(part)))].sum(axis=1) for part in parts]
    means = np.sum(sums, axis=0) / len(array)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def choose_winner(records: Sequence[TrialRecord], metric: str) -> TrialRecord:
    """The distribution's mean, unless the best candidate beats it by more than noise on the search
    tasks that both answered.

    The best of many noisy trials is lucky as well as good: choosing.choose says what it takes.
    """
    best = _best([r for r in records if r.role == "candidate"])
    means = [r for r in records if r.role == "mean" and r.state == "complete"]
    if not means:
        return best
    mean = max(means, key=lambda r: r.number)
    grades = {
        "best": metric_values(best.grades, metric),
        "mean": metric_values(mean.grades, metric),
    }
    return best if choose(grades) == "best" else mean


def best_uniform(
    records: Sequence[TrialRecord], is_uniform: Callable[[Sequence[float]], bool]
) -> TrialRecord:
    """The best single weight by the search tasks; the base and the sibling alone count as the
    weights 0 and 1.
    """
    return _best(
        [
            r
            for r in records
            if r.role == "uniform" or (r.role == "parent" and is_uniform(r.weights))
        ]
    )


def metric_values(grades: Mapping[str, Mapping[str, Any]], metric: str) -> dict[str, float]:
    """task_id -> what is optimised: the grade, or 1.0 and 0.0 for closed tasks."""
    return {task: float(g[metric]) for task, g in grades.items() if g[metric] is not None}


def stratified_error(values: Mapping[str, float], group: Callable[[str], str]) -> float:
    """Standard error of the mean of values by task, when the tasks come from groups of fixed sizes:
    √Σ (n_g/N)² s_g² / n_g.
    """
    parts: dict[str, list[float]] = {}
    for task, value in values.items():
        parts.setdefault(group(task), []).append(value)
    return float(
        np.sqrt(
            sum(
                (len(part) / len(values)) ** 2 * mean_and_error(part)[1] ** 2
                for part in parts.values()
            )
        )
    )


def make_verdict(
    held_out: Mapping[str, Mapping[str, Mapping[str, Any]]],
    metric: str,
    seed: int,
    group: Callable[[str], str] | None = None,
) -> dict[str, Any]:
    """The verdict from the held-out grades of each candidate ("winner" among them). `group` names a
    task's source, where sources have weights.
    """
    values = {name: metric_values(grades, metric) for name, grades in held_out.items()}
    candidates = {}
    for name, by_task in values.items():
        mean, error = mean_and_error(list(by_task.values()))
        error = error if group is None else stratified_error(by_task, group)
        cut = float(np.mean([bool(g["truncated"]) for g in held_out[name].values()]))
        candidates[name] = {"mean": mean, "stderr": error, "truncated": cut}
    paired = {}
    for name in values:
        if name != "winner":
            differences = _paired(values["winner"], values[name])
            shared = [task for task in values["winner"] if task in values[name]]
            low, high = bootstrap_interval(
                differences, seed, None if group is None else [group(task) for task in shared]
            )
            paired[f"winner-{name}"] = {
                "diff": float(np.mean(differences)),
                "low": low,
                "high": high,
            }
    return {
        "metric": metric,
        "n": len(values["winner"]),
        "candidates": candidates,
        "paired": paired,
    }


def _paired(a: Mapping[str, float], b: Mapping[str, float]) -> list[float]:
    return [a[task] - b[task] for task in a if task in b]


def _best(records: Sequence[TrialRecord]) -> TrialRecord:
    return max(
        (r for r in records if r.score is not None and r.state == "complete"),
        key=lambda r: (r.score or 0.0, -r.number),
    )


def sibling_names(siblings: Sequence[str]) -> list[str]:
    """What the siblings are called in a verdict: "instruct" alone, else "sibling:NAME" by folder
    name.
    """
    if len(siblings) == 1:
        return ["instruct"]
    stems = [Path(ref).name for ref in siblings]
    return [
        f"sibling:{stem}" if stems.count(stem) == 1 else f"sibling:{stem}-{i}"
        for i, stem in enumerate(stems)
    ]
