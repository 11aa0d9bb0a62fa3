"""Fits the learned judge (ridge.py) on files of graded answers.

It also reports how the judge does on models that a fit has not seen.
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
from evomerge.judging.learned.judge import Facts, save_judge, task_key
from evomerge.judging.learned.ridge import GradedAnswers, fit, predict
from evomerge.judging.validation.agreement import Agreements, compare
from evomerge.judging.validation.families import family
from evomerge.judging.validation.reference import Joined, join_grades, pick, read_grades
from evomerge.outputs import check_outputs
from evomerge.tasks import Task, load_tasks

FAMILY_POWER = 0.5  # a family of n models counts like sqrt(n); 0: all models alike, 1: all families
FEWEST = 5  # graded answers to a task
FOLDS = 4


@dataclass(frozen=True)
class Fitted:
    """The report of a fit."""

    n_answers: int
    n_tasks: int
    models: tuple[str, ...]
    judges: tuple[str, ...]
    unmatched: str
    dropped: tuple[str, ...]  # ids of tasks with too few graded answers
    held_out: Agreements | None
    by_family: bool

    def lines(self) -> list[str]:
        """The report, line by line."""
        lines = [
            f"fitted on {self.n_answers} answers of {len(self.models)} models to {self.n_tasks} "
            f"tasks, graded by {', '.join(self.judges)}"
        ]
        if self.unmatched:
            lines.append(self.unmatched)
        if self.dropped:
            lines.append(
                f"not fitted because they have fewer than {FEWEST} graded answers, and refused by "
                "this judge: "
                f"tasks {', '.join(self.dropped)}"
            )
        if self.held_out is None:
            lines.append(
                f"too few models (under {2 * FEWEST}) to tell how well it agrees on unseen models"
            )
        else:
            lines.append(self._held_out_line(self.held_out))
        return lines

    def _held_out_line(self, held_out: Agreements) -> str:
        kind = "models (there are too few families to keep them apart)"
        if self.by_family:
            kind = "families of models"
        figures = {
            "within a task": held_out.within_task,
            "across models": held_out.model_level,
            "pairs .15 to .3": held_out.pairs["0.15-0.3"],
        }
        told = []
        for name, a in figures.items():
            if a.value is not None and a.low is not None and a.high is not None:
                told.append(f"{name} {a.value:.3f} [{a.low:.3f}, {a.high:.3f}]")
        judges = "judge"
        if len(self.judges) > 1:
            judges = "judges"
        return (
            f"on {kind} held out, {FOLDS} folds, against the same {judges}: "
            f"{', '.join(told) or 'not enough data'}"
        )


def fit_file(
    tasks_path: str | Path,
    answers_path: str | Path,
    grades_path: str | Path,
    judges: Sequence[str],
    out: Path,
    wanted: Callable[[str | None], bool] = lambda model: True,
) -> Fitted:
    """Fit on the answers that have grades by `judges` (their mean) and write the judge to `out`.

    `wanted` chooses models by name. Raises TaskError and InputError for the files, InputError where
    no task has enough graded answers, OutputError.
    """
    read = [Path(path) for path in (tasks_path, answers_path, grades_path)]
    check_outputs(files=[out], inputs=read)
    tasks = load_tasks(tasks_path)
    grades = pick(read_grades(grades_path, tasks), judges, grades_path)
    grades = {key: grade for key, grade in grades.items() if wanted(key[0])}
    lines = [line for line in read_answers(answers_path, tasks) if wanted(line.model)]
    joined = join_grades(lines, grades)
    counts = Counter(str(line.task.task_id) for line in joined.lines)
    chosen = [task for task in tasks if counts[str(task.task_id)] >= FEWEST]
    if not chosen:
        raise InputError(
            "no task has enough graded answers",
            where=grades_path,
            found=max(counts.values()),
            remedy=f"Add answers: a task needs {FEWEST} or more.",
        )
    models = sorted({line.model or "" for line in joined.lines})
    answers = _graded_answers(joined, chosen, models)
    folds, by_family = _folds(models)
    held_out = None
    if len(models) >= 2 * FEWEST:
        held_out = _held_out(answers, folds, len(chosen))
    per_task = np.bincount(answers.task, minlength=len(chosen))
    facts = Facts(
        tasks=tuple(map(task_key, chosen)),
        ids=tuple(str(task.task_id) for task in chosen),
        answers=tuple(map(int, per_task)),
        judges=tuple(judges),
        models=tuple(models),
        held_out=_held_out_facts(held_out, by_family),
    )
    save_judge(out, fit(answers, len(chosen)), facts)
    return Fitted(
        n_answers=len(answers.task),
        n_tasks=len(chosen),
        models=facts.models,
        judges=facts.judges,
        unmatched=joined.unmatched(),
        dropped=tuple(task_id for task_id in counts if task_id not in facts.ids),
        held_out=held_out,
        by_family=by_family,
    )


def _graded_answers(joined: Joined, tasks: Sequence[Task], models: Sequence[str]) -> GradedAnswers:
    """The answers to `tasks`, with tasks and models by their places and families weighed."""
    place = {str(task.task_id): i for i, task in enumerate(tasks)}
    number = {model: i for i, model in enumerate(models)}
    sizes = Counter(map(family, models))
    task, model, grades, grams, measures, weights = [], [], [], [], [], []
    for line, grade in zip(joined.lines, joined.grades, strict=True):
        if str(line.task.task_id) not in place:
            continue
        name = line.model or ""
        x, z = look(line.task, line.answer)
        task.append(place[str(line.task.task_id)])
        model.append(number[name])
        grades.append(grade)
        grams.append(x)
        measures.append(z)
        weights.append(sizes[family(name)] ** -FAMILY_POWER)
    return GradedAnswers(
        np.array(task),
        np.array(model),
        np.array(grades, float),
        grams,
        np.stack(measures),
        np.array(weights),
    )


def _folds(models: Sequence[str]) -> tuple[NDArray[np.int64], bool]:
    """(each model's fold, whether whole families share a fold).

    By family where there are enough of them; the largest are placed first.
    """
    groups = list(map(family, models))
    by_family = len(set(groups)) >= FOLDS
    if not by_family:
        groups = list(models)
    sizes = [0] * FOLDS
    fold = {}
    for name, size in sorted(Counter(groups).items(), key=lambda item: (-item[1], item[0])):
        fold[name] = int(np.argmin(sizes))
        sizes[fold[name]] += size
    return np.array([fold[name] for name in groups]), by_family


def _held_out(answers: GradedAnswers, folds: NDArray[np.int64], n_tasks: int) -> Agreements:
    """Agreement with the grades of models that a fit did not see, each fold in turn."""
    shape = (len(folds), n_tasks)
    predicted = np.full(shape, np.nan)
    expected = np.full(shape, np.nan)
    expected[answers.model, answers.task] = answers.grade
    for fold in range(FOLDS):
        test = folds[answers.model] == fold
        if test.any() and not test.all():
            part = answers.at(test)
            predicted[part.model, part.task] = predict(fit(answers.at(~test), n_tasks), part)
    return compare(predicted, expected)


def _held_out_facts(held_out: Agreements | None, by_family: bool) -> dict[str, Any]:
    if held_out is None:
        return {}
    return {
        "folds": FOLDS,
        "by_family": by_family,
        "within_task": held_out.within_task.as_json(),
        "model_level": held_out.model_level.as_json(),
        "within_model": held_out.within_model.as_json(),
        "difficulty_baseline": held_out.difficulty_baseline.as_json(),
    }
