"""Fitting the learned judge (judging/ridge.py) on files of graded answers, and saying how it does
on models held out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import InputError
from evomerge.judging.answer_files import read_answers
from evomerge.judging.learned.features import look
from evomerge.judging.learned.judge import Facts, JudgeWeights, save_judge, task_key
from evomerge.judging.learned.ridge import GradedAnswers, fit, predict
from evomerge.judging.validation.agreement import Agreements, compare
from evomerge.judging.validation.families import family
from evomerge.judging.validation.reference import join_grades, pick, read_grades
from evomerge.tasks import Task, load_tasks

FAMILY_POWER = 0.5  # a family of n models counts like sqrt(n): 0 is each model alike, 1 each family
FEWEST = 5  # graded answers to a task
FOLDS = 4


@dataclass(frozen=True)
class Fitted:
    """What a fit reports."""

    n_answers: int
    n_tasks: int
    models: tuple[str, ...]
    judges: tuple[str, ...]
    unmatched: str
    dropped: tuple[str, ...]  # ids of tasks with too few graded answers
    held_out: Agreements | None
    by_family: bool

    def lines(self) -> list[str]:
        """What to tell people."""
        several = len(self.judges) > 1
        lines = [
            f"fitted on {self.n_answers} answers of {len(self.models)} models to {self.n_tasks} tasks, graded by {', '.join(self.judges)}"
        ]
        lines += [self.unmatched] if self.unmatched else []
        if self.dropped:
            lines.append(
                f"not fitted, under {FEWEST} graded answers, and refused by this judge: tasks {', '.join(self.dropped)}"
            )
        if self.held_out is None:
            lines.append(
                f"too few models (under {2 * FEWEST}) to say how it agrees on models that it has not seen"
            )
            return lines
        kind = (
            "families of models"
            if self.by_family
            else "models (there are too few families to keep them apart)"
        )
        close = self.held_out.pairs["0.15-0.3"]
        figures = [
            ("within a task", self.held_out.within_task),
            ("across models", self.held_out.model_level),
            ("pairs .15 to .3", close),
        ]
        told = ", ".join(
            f"{name} {a.value:.3f} [{a.low:.3f}, {a.high:.3f}]"
            for name, a in figures
            if a.value is not None and a.low is not None and a.high is not None
        )
        lines.append(
            f"on {kind} held out, {FOLDS} folds, against the same judge{'s' * several}: {told or 'nothing can be told'}"
        )
        return lines


def fit_file(
    tasks_path: str | Path,
    answers_path: str | Path,
    grades_path: str | Path,
    judges: Sequence[str],
    out: Path,
    wanted: Callable[[str | None], bool] = lambda model: True,
) -> Fitted:
    """Fit on the answers that have grades by `judges` (their mean) and write the judge. `wanted`
    chooses models by name.

    Raises TaskError and InputError for the files, InputError where no task has enough graded
    answers, OutputError.
    """
    tasks = load_tasks(tasks_path)
    grades = pick(read_grades(grades_path, tasks), judges, grades_path)
    grades = {key: grade for key, grade in grades.items() if wanted(key[0])}
    joined = join_grades(
        [line for line in read_answers(answers_path, tasks) if wanted(line.model)], grades
    )
    counts = Counter(str(line.task.task_id) for line in joined.lines)
    chosen = [task for task in tasks if counts[str(task.task_id)] >= FEWEST]
    if not chosen:
        raise InputError(
            "no task has enough graded answers",
            where=grades_path,
            found=max(counts.values()),
            remedy=f"A task needs {FEWEST} or more.",
        )
    place = {str(task.task_id): i for i, task in enumerate(chosen)}
    models = sorted({line.model or "" for line in joined.lines})
    number = {model: i for i, model in enumerate(models)}
    sizes = Counter(map(family, models))
    rows = [
        (
            place[str(line.task.task_id)],
            number[line.model or ""],
            grade,
            look(line.task, line.answer),
        )
        for line, grade in zip(joined.lines, joined.grades, strict=True)
        if str(line.task.task_id) in place
    ]
    examples = GradedAnswers(
        np.array([row[0] for row in rows]),
        np.array([row[1] for row in rows]),
        np.array([row[2] for row in rows], float),
        [row[3][0] for row in rows],
        np.stack([row[3][1] for row in rows]),
        np.array([sizes[family(models[row[1]])] ** -FAMILY_POWER for row in rows]),
    )
    folds, by_family = _folds(models)
    held_out = _held_out(examples, folds, len(chosen)) if len(models) >= 2 * FEWEST else None
    weights = fit(examples, len(chosen))
    _save(out, weights, chosen, examples, judges, models, held_out, by_family)
    dropped = tuple(task_id for task_id in counts if task_id not in place)
    return Fitted(
        len(rows),
        len(chosen),
        tuple(models),
        tuple(judges),
        joined.unmatched(),
        dropped,
        held_out,
        by_family,
    )


def _folds(models: Sequence[str]) -> tuple[NDArray[np.int64], bool]:
    """(each model's fold, whether whole families stand in one fold). By family where there are
    enough of them, largest first.
    """
    groups = Counter(map(family, models))
    by_family = len(groups) >= FOLDS
    if not by_family:
        groups = Counter(models)
    sizes, fold = [0] * FOLDS, {}
    for name, size in sorted(groups.items(), key=lambda item: (-item[1], item[0])):
        fold[name] = int(np.argmin(sizes))
        sizes[fold[name]] += size
    return np.array([fold[family(m) if by_family else m] for m in models]), by_family


def _held_out(examples: GradedAnswers, folds: NDArray[np.int64], n_tasks: int) -> Agreements:
    """Agreement with the grades of models that a fit did not see, each fold in turn."""
    shape = (len(folds), n_tasks)
    predicted, expected = np.full(shape, np.nan), np.full(shape, np.nan)
    expected[examples.model, examples.task] = examples.grade
    for fold in range(FOLDS):
        test = folds[examples.model] == fold
        if test.any() and not test.all():
            part = examples.at(test)
            predicted[part.model, part.task] = predict(fit(examples.at(~test), n_tasks), part)
    return compare(predicted, expected)


def _save(
    out: Path,
    weights: JudgeWeights,
    tasks: Sequence[Task],
    examples: GradedAnswers,
    judges: Sequence[str],
    models: Sequence[str],
    held_out: Agreements | None,
    by_family: bool,
) -> None:
    counts = np.bincount(examples.task, minlength=len(tasks))
    told: dict[str, Any] = {}
    if held_out is not None:
        told = {"folds": FOLDS, "by_family": by_family} | {
            name: getattr(held_out, name).as_json()
            for name in ("within_task", "model_level", "within_model", "difficulty_baseline")
        }
    keys, ids = tuple(map(task_key, tasks)), tuple(str(task.task_id) for task in tasks)
    save_judge(
        out, weights, Facts(keys, ids, tuple(map(int, counts)), tuple(judges), tuple(models), told)
    )
