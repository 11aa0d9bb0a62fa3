"""Several objectives: which figure of which tasks each one is, and its value for a trial."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from evomerge.errors import StudyFileError
from evomerge.searching.estimates import estimate, task_means
from evomerge.searching.records.trial_record import TaskGrade, TrialRecord
from evomerge.study import GROUP, SOURCE, Study, source_names
from evomerge.tasks import Split, Task

TOKENS = "answer_tokens"
THOUGHTS = "thought_tokens"
Baselines: TypeAlias = Mapping[str, Mapping[str, float]]  # objective -> task key -> mean value


@dataclass(frozen=True)
class FrontObjective:
    """One of a study's objectives: a figure of its tasks' answers, and which way is better."""

    name: str
    # grade, correct, score, answer_tokens, thought_tokens, length or likelihood
    figure: str
    maximized: bool = True
    tasks: frozenset[str] | None = None  # the keys of a group's tasks; None: every task

    @property
    def sign(self) -> float:
        """What makes more of it better."""
        return 1.0 if self.maximized else -1.0

    def values(self, grades: Mapping[str, TaskGrade]) -> dict[str, float]:
        """Task key -> the figure, of the objective's tasks that have one."""
        found = {}
        for task, grade in grades.items():
            value = _figure(grade, self.figure)
            if value is not None and (self.tasks is None or task in self.tasks):
                found[task] = value
        return found


@dataclass(frozen=True)
class Estimate:
    """A trial's value of an objective over all search tasks, and its standard error."""

    mean: float
    stderr: float | None  # None: it is not known


def _figure(grade: TaskGrade, name: str) -> float | None:
    if name == TOKENS:
        return grade.tokens
    if name == THOUGHTS:
        return grade.thought_tokens
    if name in ("length", "likelihood"):
        value: float | None = getattr(grade, name)
        return value
    return grade.value(name)


def study_objectives(
    study: Study, groups: Mapping[str, Iterable[str]]
) -> tuple[FrontObjective, ...]:
    """The study's objectives; of a study with one, what it maximises and the answers' tokens.

    `groups`: the objective's name -> the keys of its tasks, as of `task_groups`.
    """
    named = study.objective
    if not named.several:
        metric = study.judge.metric
        return FrontObjective(metric, metric), FrontObjective(TOKENS, TOKENS, maximized=False)
    found = []
    for name in named.several:
        group, figure = None, name
        if name.startswith((SOURCE, GROUP)):
            group, figure = frozenset(groups.get(name, ())), study.judge.metric
        found.append(FrontObjective(name, figure, name in named.maximize, group))
    return tuple(found)


def task_groups(study: Study, split: Split) -> dict[str, tuple[str, ...]]:
    """Objective -> the keys of its tasks, for each objective that is a group of tasks.

    Raises StudyFileError for a group without tasks to search on, or held-out ones.
    """
    groups = {}
    for name in study.objective.several:
        if not name.startswith((SOURCE, GROUP)):
            continue
        parts = []
        for part in (split.search, split.validation, split.held_out):
            parts.append([task.key for task in part if _belongs(task, name, study)])
        if not parts[0] or not parts[-1]:
            kinds = sorted({task.kind for task in (*split.search, *split.held_out) if task.kind})
            remedy = f"Use one of {', '.join(GROUP + kind for kind in kinds)}."
            if name.startswith(SOURCE) or not kinds:
                remedy = "Add tasks: each group needs some to search on and some held out."
            raise StudyFileError(
                "the group has no tasks to search on, or none held out",
                where="objective",
                found=name,
                remedy=remedy,
            )
        groups[name] = (*parts[0], *parts[1], *parts[2])
    return groups


def _belongs(task: Task, name: str, study: Study) -> bool:
    if name.startswith(GROUP):
        return task.kind == name.removeprefix(GROUP)
    return source_names(study.tasks)[task.source or 0] == name.removeprefix(SOURCE)


def objective_baselines(
    references: Sequence[TrialRecord], objectives: Sequence[FrontObjective]
) -> dict[str, dict[str, float]]:
    """Objective -> task key -> its mean value by the references, which answer every task."""
    baselines = {}
    for objective in objectives:
        values = [objective.values(reference.grades) for reference in references]
        baselines[objective.name] = task_means(values)
    return baselines


def estimates(
    grades: Mapping[str, TaskGrade],
    baselines: Baselines,
    objectives: Sequence[FrontObjective],
    chances: Mapping[str, float] | None = None,
) -> dict[str, Estimate]:
    """A trial's value of each objective, corrected for the tasks that it has seen.

    As `estimate` corrects a score, by the `objective_baselines` and the tasks' `chances`. An
    objective of which the trial has seen no task is left out.
    """
    found = {}
    for objective in objectives:
        values, known = objective.values(grades), baselines[objective.name]
        if not values:
            continue
        mean, error, _ = estimate(values, known, chances)
        found[objective.name] = Estimate(mean, error)
    return found


def trial_estimates(
    trial: TrialRecord, baselines: Baselines, objectives: Sequence[FrontObjective], metric: str
) -> dict[str, Estimate]:
    """The same of a stored trial; `metric` is what its score is.

    A trial without tokens by task has those of all its answers.
    """
    found = estimates(trial.grades, baselines, objectives)
    if metric in found and trial.score is not None:
        found[metric] = Estimate(trial.score, trial.stderr)
    for objective in objectives:
        missing = objective.figure == TOKENS and objective.name not in found
        if missing and trial.tokens is not None and trial.grades:
            found[objective.name] = Estimate(trial.tokens / len(trial.grades), None)
    return found


def objective_means(
    grades: Mapping[str, TaskGrade],
    references: Sequence[TrialRecord],
    objectives: Sequence[FrontObjective],
    chances: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """A new trial's value of each objective. Raises StudyFileError.

    A generation's candidates lack the same ones: those of which its tasks say nothing.
    """
    baselines = objective_baselines(references, objectives)
    found = estimates(grades, baselines, objectives, chances)
    if not references and len(found) < len(objectives):  # the first one answers every task
        missing = next(each for each in objectives if each.name not in found)
        raise StudyFileError(
            "no search task has a value of this objective",
            where="objective",
            found=missing.name,
            remedy="Name another one: correct needs closed tasks, likelihood references, "
            "thought_tokens a model that thinks.",
        )
    return {name: value.mean for name, value in found.items()}
