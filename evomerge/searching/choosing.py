"""The winner, chosen under noise among the distribution's mean, the best trials and the references.

docs/SEARCH.md reports what each rule of the choice contributes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from evomerge.genome.genome import Genome, Vector
from evomerge.genome.search_space import model_names
from evomerge.searching.estimates import t_quantile
from evomerge.searching.history import History, best_first
from evomerge.searching.records.trial_record import REFERENCES, TrialRecord, metric_values
from evomerge.searching.records.verdict_record import FOUND

Grades: TypeAlias = Mapping[str, float]  # by task

# that an equal trial beats the mean: three standard errors of many tasks, more of few (Student
# 1908)
CHANCE = 0.00135
# that an equal reference replaces the mean: one standard error. The mean is what a whole search
# arrived at, and a few references are no luckier than it
REFERENCE_CHANCE = 0.1587
MEAN = "mean"
TAKEN = ("winner", "base", "uniform", FOUND)  # names in a verdict that no sibling has


def choose(grades: Mapping[str, Grades], default: str = MEAN, chance: float = CHANCE) -> str:
    """The winner's name. `grades` are name -> task -> grade, finalists best first.

    The default wins unless another beats it in a one-sided paired t test at the level `chance`;
    among several the one with the largest lead. A pair's variance is at least twice that within
    tasks among all finalists, because a few rounded grades often do not differ by chance at all.
    Without a default among the names the best mean grade wins.
    """
    if default not in grades:
        return max(grades, key=lambda name: average(grades[name]))
    shared = set(grades[default]).intersection(*grades.values())
    tasks = [task for task in grades[default] if task in shared]
    if len(tasks) < 2 or len(grades) < 2:
        return default
    rows = {}
    for name, by_task in grades.items():
        rows[name] = np.array([by_task[task] for task in tasks], dtype=float)
    floor = 2 * float(np.array(list(rows.values())).var(axis=0, ddof=1).mean())
    needed = t_quantile(chance, len(tasks) - 1)
    leads = {}
    for name, row in rows.items():
        difference = row - rows[default]
        error = np.sqrt(max(float(difference.var(ddof=1)), floor) / len(tasks))
        if name != default and difference.mean() > needed * error:
            leads[name] = float(difference.mean())
    return max(leads, key=lambda name: leads[name], default=default)


def incumbent(
    mean: Grades | None, references: Mapping[str, Grades], chance: float = REFERENCE_CHANCE
) -> str:
    """What a trial must beat: the mean, or the reference that is furthest ahead of it.

    A reference is ahead if it is not below the mean in a one-sided paired t test at the level
    `chance`: one that answers every task as well as the mean is, because a search that found
    nothing better has found nothing. Without a mean, the best reference.
    """
    if mean is None:
        return max(references, key=lambda name: average(references[name]), default=MEAN)
    leads = {}
    for name, grades in references.items():
        ahead = np.array([grades[task] - mean[task] for task in mean if task in grades])
        if len(ahead) < 2:
            continue
        error = float(ahead.std(ddof=1)) / np.sqrt(len(ahead))
        if ahead.mean() >= t_quantile(chance, len(ahead) - 1) * error:
            leads[name] = float(ahead.mean())
    return max(leads, key=lambda name: leads[name], default=MEAN)


def average(grades: Grades) -> float:
    """The mean grade over tasks."""
    return float(np.mean(list(grades.values())))


@dataclass(frozen=True)
class Finalists:
    """Whom the winner is chosen among.

    The distribution's mean, the best trials and the best references, each best first by the search
    tasks. `references` is empty in a study that began before they could win.
    """

    mean: TrialRecord | None
    trials: tuple[TrialRecord, ...]
    references: tuple[TrialRecord, ...] = ()

    @property
    def every(self) -> tuple[TrialRecord, ...]:
        """All of them: trials, the mean, references."""
        mean = () if self.mean is None else (self.mean,)
        return (*self.trials, *mean, *self.references)


def finalists(history: History, most: int, references_win: bool) -> Finalists:
    """The finalists of a search; `most` limits trials and references each."""
    references: list[TrialRecord] = []
    if references_win:
        references = best_first(history.references)[:most]
    trials = best_first(history.candidates)[:most]
    return Finalists(history.mean, tuple(trials), tuple(references))


def choose_winner(
    found: Finalists, metric: str, validated: Mapping[int, Grades] | None = None
) -> TrialRecord:
    """The winner, from the search tasks and, by trial number, the grades on the validation tasks.

    First the mean stands against the references, on all tasks that both answered. The best of many
    noisy trials is lucky as well as good, so a trial wins only if it beats that incumbent by more
    than noise: on the validation tasks, which no trial was ranked on. Without them only the best
    trial is compared, on the search tasks.
    """
    fresh = validated or {}
    named: dict[str, TrialRecord] = {}
    known: dict[str, Grades] = {}  # on search and validation tasks
    for trial in found.every:
        name = MEAN if trial is found.mean else str(trial.number)
        named[name] = trial
        known[name] = metric_values(trial.grades, metric) | dict(fresh.get(trial.number, {}))
    references = {str(trial.number): known[str(trial.number)] for trial in found.references}
    standing = incumbent(known.get(MEAN), references)
    challengers = found.trials if validated else found.trials[:1]
    contest = [str(trial.number) for trial in challengers]
    if standing in named:
        contest.append(standing)
    if validated and (MEAN in named or not references):
        known = {name: validated[named[name].number] for name in contest}
    return named[choose({name: known[name] for name in contest}, default=standing)]


def compared_with(history: History, genome: Genome) -> dict[str, TrialRecord]:
    """The trials that the winner is compared with, known once the references are graded."""
    compared = {}
    if genome.has_base:
        compared["base"] = history.parents[genome.parent(None)]
    for m, name in enumerate(sibling_names(genome.siblings)):
        compared[name] = history.parents[genome.parent(m)]
    compared["uniform"] = history.best_uniform(genome.is_uniform)
    return compared


def sibling_names(siblings: Sequence[str]) -> list[str]:
    """The names of the siblings in a verdict: the folder's of a single one, else "sibling:NAME"."""
    names = list(model_names(siblings))
    if len(names) == 1 and names[0] not in TAKEN:
        return names
    return [f"sibling:{name}" for name in names]


def reference_names(genome: Genome, weights: Sequence[float]) -> dict[Vector, str]:
    """What each reference is called, by its vector: base, instruct or uniform 0.5, for example.

    `weights` are the uniform ones.
    """
    names: dict[Vector, str] = {}
    for weight in (*weights, 1.0):
        for vector in genome.uniform(weight):
            names[vector] = f"uniform {weight:g}"
    for m, name in enumerate(sibling_names(genome.siblings)):
        names[genome.parent(m)] = name
    if genome.has_base:
        names[genome.parent(None)] = "base"
    return names


def unbeaten_name(winner: TrialRecord, genome: Genome, weights: Sequence[float]) -> str | None:
    """What the winner is called if it is a reference, so that no merge was found to beat it."""
    if winner.role not in REFERENCES:
        return None
    return reference_names(genome, weights).get(winner.vector, winner.role)
