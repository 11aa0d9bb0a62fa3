"""Figures on who graded and how far that can be believed, for the report page.

When a search takes its verdict it remembers `judge_facts`; here they become what the page shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evomerge.judging.validation.agreement import spearman

if TYPE_CHECKING:
    from evomerge.searching.records.study_facts import CascadeSavings

LEVELS = (1, 2, 3, 4, 5)


def judge_section(
    facts: Mapping[str, Any] | None, cascade: CascadeSavings | None = None
) -> dict[str, Any] | None:
    """What the page shows of `judge_facts`, and of what a cascade judge saved."""
    if facts is None:
        return None
    grades, rules = facts["grades"], facts.get("rules")
    rows = [
        {
            "name": name,
            **mean_and_error(values),
            "bars": shares(values),
            "rules": mean_and_error(rules[name]) if rules else None,
        }
        for name, values in grades.items()
    ]
    return {
        "name": facts["name"],
        "version": facts["version"],
        "rows": rows,
        # one scale for all bars
        "top": max((bar["share"] for row in rows for bar in row["bars"]), default=0.0) or 1.0,
        "agreement": agreement(grades, rules) if rules else None,
        "held_out": held_out_rows(facts.get("held_out")),
        "savings": savings(cascade),
        "pairs": facts["pairs"],
        "by_rules": rules is None,
    }


def mean_and_error(values: Sequence[float]) -> dict[str, Any]:
    """{"mean", "stderr", "n"}: the standard error is s / sqrt(n) with n - 1 in s; None with fewer
    than two values.
    """
    n = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None
    return {"mean": float(np.mean(values)) if n else None, "stderr": error, "n": n}


def shares(grades: Sequence[float]) -> list[dict[str, Any]]:
    """The share of the grades nearest to each of 1 to 5; a half goes up, and what lies outside to
    the end.
    """
    nearest = [min(5, max(1, math.floor(grade + 0.5))) for grade in grades]
    counts = [nearest.count(level) for level in LEVELS]
    return [
        {"level": level, "count": count, "share": count / len(grades) if grades else 0.0}
        for level, count in zip(LEVELS, counts, strict=True)
    ]


def agreement(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """How far two judges' grades of the same answers, {candidate: [tasks]}, agree.

    "spearman": within one task over the candidates, mean over the tasks where both tell any apart;
    "difference": of the grades, a minus b, mean within a task and then over the tasks; each {mean,
    stderr, n tasks}. "orders": the candidates by each judge's mean, highest first.
    """
    # [candidates, tasks]
    first, second = (np.array([grades[name] for name in a], dtype=np.float64) for grades in (a, b))
    by_task = [spearman(first[:, t], second[:, t]) for t in range(first.shape[1])]
    orders = [
        [name for _, name in sorted((-float(np.mean(grades[name])), name) for name in a)]
        for grades in (a, b)
    ]
    return {
        "spearman": mean_and_error([value for value in by_task if not math.isnan(value)]),
        "difference": mean_and_error((first - second).mean(0).tolist()),
        "candidates": len(a),
        "orders": orders,
    }


def held_out_rows(held_out: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A learned judge's agreement with its references on models that it was not fitted on, a row
    per figure.
    """
    names = {"within_task": "within one task, across models", "model_level": "across models’ means"}
    found = [(text, (held_out or {}).get(key)) for key, text in names.items()]
    found += [
        (f"model pairs {gap.replace('-', ' to ')} apart ordered right", value)
        for gap, value in (held_out or {}).get("pairs", {}).items()
    ]
    return [
        {"name": text, **{k: value.get(k) for k in ("value", "low", "high")}}
        for text, value in found
        if isinstance(value, Mapping)
    ]


def savings(cascade: CascadeSavings | None) -> dict[str, Any] | None:
    """Of `graded` answers the expensive judge graded `asked`; None without a cascade judge."""
    if cascade is None or not cascade.graded:
        return None
    return {**vars(cascade), "saved": 1 - cascade.asked / cascade.graded}
