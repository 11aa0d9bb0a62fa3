"""A study's front: from the trials as they are recorded, and from their held-out answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from evomerge.searching.estimates import Z95, paired_interval
from evomerge.searching.front.objective_values import (
    Estimate,
    FrontObjective,
    objective_baselines,
    trial_estimates,
)
from evomerge.searching.front.pareto_front import knee, non_dominated, thinned
from evomerge.searching.history import History
from evomerge.searching.records.front_record import Front, FrontPoint, FrontValue
from evomerge.searching.records.trial_record import REFERENCES, TaskGrade, TrialRecord

MOST = 8  # points that answer the held-out tasks


def contenders(history: History, several: bool) -> tuple[TrialRecord, ...]:
    """The trials that a front is chosen among.

    Where several objectives were searched, the distributions' means, once they are evaluated, and
    the references: the trials that look best are mostly the luckiest. Else every trial.
    """
    if several and history.means:
        return (*history.references, *history.means)
    return history.complete


def choose_front(
    known: Mapping[int, Mapping[str, Estimate]],
    trials: Sequence[TrialRecord],
    objectives: Sequence[FrontObjective],
    most: int | None = None,
) -> tuple[list[TrialRecord], TrialRecord] | None:
    """The trials on the front, the best in the first objective first, and the compromise of them.

    `known` are their values by number; `most` limits the front. The compromise is a reference only
    where all of them are. None where no trial has every objective.
    """
    complete = [t for t in trials if len(known[t.number]) == len(objectives)]
    if not complete:
        return None
    values = np.array([_row(known[t.number], objectives) for t in complete])
    front = non_dominated(values)
    if most is not None:
        front = [front[i] for i in thinned(values[front], most)]
    front.sort(key=lambda i: -values[i, 0])
    chosen = [complete[i] for i in front]
    found = [i for i, t in enumerate(chosen) if t.role not in REFERENCES]
    return chosen, chosen[knee(values[front], found or range(len(front)))]


def _row(known: Mapping[str, Estimate], objectives: Sequence[FrontObjective]) -> list[float]:
    return [objective.sign * known[objective.name].mean for objective in objectives]


def recorded_front(
    history: History,
    objectives: Sequence[FrontObjective],
    *,
    several: bool,
    metric: str,
    labels: Mapping[int, str],
) -> Front | None:
    """The front from what the trials have recorded on the search tasks; None if that is too little.

    `metric` is what the trials' scores are. `labels` name parents and uniform weights, which are
    shown beside the front, by their trials' numbers.
    """
    trials = contenders(history, several)
    baselines, known = objective_baselines(history.references, objectives), {}
    for t in (*trials, *history.references):
        known[t.number] = trial_estimates(t, baselines, objectives, metric)
    found = choose_front(known, trials, objectives)
    if found is None:
        return None
    chosen, middle = found
    points = {}
    for t in (*chosen, *history.references):
        values = {name: _interval(value) for name, value in known[t.number].items()}
        points[t.number] = FrontPoint(t.number, labels.get(t.number, t.role), values)
    return as_front(
        objectives,
        [points[t.number] for t in chosen],
        [points[t.number] for t in history.references],
        middle.number,
    )


def as_front(
    objectives: Sequence[FrontObjective],
    points: Sequence[FrontPoint],
    compared: Sequence[FrontPoint],
    middle: int,
    held_out: bool = False,
) -> Front:
    """The front of these points, sorted by the first objective; `middle` is the compromise."""
    first = objectives[0]

    def place(point: FrontPoint) -> tuple[float, int]:
        value = point.values.get(first.name)
        return (np.inf if value is None else -first.sign * value.mean, point.trial)

    ordered = sorted(points, key=place)
    return Front(
        maximize=tuple(each.name for each in objectives if each.maximized),
        minimize=tuple(each.name for each in objectives if not each.maximized),
        points=tuple(ordered),
        compared=tuple({point.trial: point for point in compared}.values()),
        knee=[point.trial for point in ordered].index(middle) + 1,
        held_out=held_out,
    )


def held_out_point(
    trial: TrialRecord,
    name: str,
    grades: Mapping[str, TaskGrade],
    objectives: Sequence[FrontObjective],
) -> FrontPoint:
    """A trial's values on the held-out tasks, each with its 95 % interval by Student's t."""
    values = {}
    for objective in objectives:
        by_task = list(objective.values(grades).values())
        if len(by_task) == 1:
            values[objective.name] = FrontValue(by_task[0], None, None)
        elif by_task:
            low, high = paired_interval(by_task)
            values[objective.name] = FrontValue(float(np.mean(by_task)), low, high)
    return FrontPoint(trial.number, name, values)


def _interval(value: Estimate) -> FrontValue:
    if value.stderr is None:
        return FrontValue(value.mean, None, None)
    error = Z95 * value.stderr
    return FrontValue(value.mean, value.mean - error, value.mean + error)
