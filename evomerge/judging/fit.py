"""Fitting the learned judge: a ridge for each task on n-grams and measures, after a small one on the measures of all tasks.

The numbers below were chosen by cross-validation over the tuning families of judging/families.py alone.
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
from evomerge.judging.agreement import Agreements, compare
from evomerge.judging.families import family
from evomerge.judging.features import BITS, NAMES, Floats, look
from evomerge.judging.files import read_answers
from evomerge.judging.learned import CLIP, Facts, Weights, save_judge, task_key
from evomerge.judging.reference import join, pick, read_grades
from evomerge.tasks import Task, load_tasks

RIDGE = 0.02  # the kernel's diagonal is about 1
MEASURES_WEIGHT = 0.1  # of the measures' kernel beside the n-grams' in a task
RULES_STRETCH = 2.0  # the rules' grade counts like four other measures
SHARED, SHARED_RIDGE = 0.3, 100.0  # how much of the ridge over all tasks counts, and its penalty
MODEL_SHARE = 1 / 3  # of a target is what the answer's model reaches elsewhere: one grade is noisy, a mean of 100 is not
FAMILY_POWER = 0.5  # a family of n models counts like sqrt(n): 0 is each model alike, 1 each family
FEWEST = 5  # graded answers to a task
FOLDS = 4


@dataclass(frozen=True)
class Examples:
    """Graded answers: n rows over T tasks. `x` are their n-grams (buckets, weights), `z` their measures [n, M].

    `weight` is what a row counts: less in a large family, whose models say much the same.
    """

    task: NDArray[np.int64]
    model: NDArray[np.int64]
    grade: NDArray[np.float64]
    x: list[tuple[NDArray[np.int64], Floats]]
    z: Floats
    weight: NDArray[np.float64]

    def at(self, rows: NDArray[np.bool_]) -> Examples:
        """Some of the rows."""
        return Examples(
            self.task[rows], self.model[rows], self.grade[rows], [self.x[i] for i in np.flatnonzero(rows)], self.z[rows], self.weight[rows]
        )


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
            lines.append(f"not fitted, under {FEWEST} graded answers, and refused by this judge: tasks {', '.join(self.dropped)}")
        if self.held_out is None:
            lines.append(f"too few models (under {2 * FEWEST}) to say how it agrees on models that it has not seen")
            return lines
        kind = "families of models" if self.by_family else "models (there are too few families to keep them apart)"
        close = self.held_out.pairs["0.15-0.3"]
        figures = [("within a task", self.held_out.within_task), ("across models", self.held_out.model_level), ("pairs .15 to .3", close)]
        told = ", ".join(
            f"{name} {a.value:.3f} [{a.low:.3f}, {a.high:.3f}]"
            for name, a in figures
            if a.value is not None and a.low is not None and a.high is not None
        )
        lines.append(f"on {kind} held out, {FOLDS} folds, against the same judge{'s' * several}: {told or 'nothing can be told'}")
        return lines


def fit_file(
    tasks_path: str | Path,
    answers_path: str | Path,
    grades_path: str | Path,
    judges: Sequence[str],
    out: Path,
    wanted: Callable[[str | None], bool] = lambda model: True,
) -> Fitted:
    """Fit on the answers that have grades by `judges` (their mean) and write the judge. `wanted` chooses models by name.

    Raises TaskError and InputError for the files, InputError where no task has enough graded answers, OutputError.
    """
    tasks = load_tasks(tasks_path)
    grades = pick(read_grades(grades_path, tasks), judges, grades_path)
    grades = {key: grade for key, grade in grades.items() if wanted(key[0])}
    joined = join([line for line in read_answers(answers_path, tasks) if wanted(line.model)], grades)
    counts = Counter(str(line.task.task_id) for line in joined.lines)
    chosen = [task for task in tasks if counts[str(task.task_id)] >= FEWEST]
    if not chosen:
        raise InputError(
            "no task has enough graded answers", where=grades_path, found=max(counts.values()), remedy=f"A task needs {FEWEST} or more."
        )
    place = {str(task.task_id): i for i, task in enumerate(chosen)}
    models = sorted({line.model or "" for line in joined.lines})
    number = {model: i for i, model in enumerate(models)}
    sizes = Counter(map(family, models))
    rows = [
        (place[str(line.task.task_id)], number[line.model or ""], grade, look(line.task, line.answer))
        for line, grade in zip(joined.lines, joined.grades, strict=True)
        if str(line.task.task_id) in place
    ]
    examples = Examples(
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
    return Fitted(len(rows), len(chosen), tuple(models), tuple(judges), joined.unmatched(), dropped, held_out, by_family)


def fit(examples: Examples, n_tasks: int) -> Weights:
    """The weights for T = n_tasks tasks; a task without examples predicts the mean of all."""
    from scipy import sparse  # comes with scikit-learn; needed here alone

    e, buckets, m = examples, 1 << BITS, len(NAMES)
    starts = np.cumsum([0] + [len(b) for b, _ in e.x])
    x = sparse.csr_matrix((np.concatenate([w for _, w in e.x]), np.concatenate([b for b, _ in e.x]), starts), shape=(len(e.x), buckets))
    seen = np.bincount(x.indices, minlength=buckets)
    idf = np.log(len(e.x) / (1.0 + seen)).clip(min=0).astype(np.float32)
    x = x @ sparse.diags(idf)
    x = sparse.diags(1 / np.sqrt(np.asarray(x.multiply(x).sum(1)).ravel()).clip(min=1e-9)) @ x

    overall = e.z.std(0) + 1e-6
    mean, scale = np.tile(e.z.mean(0), (n_tasks, 1)), np.tile(overall, (n_tasks, 1))
    level = np.full(n_tasks, e.grade.mean())
    for t in np.unique(e.task):
        here = e.task == t
        mean[t], scale[t], level[t] = e.z[here].mean(0), e.z[here].std(0) + 0.1 * overall, e.grade[here].mean()
    stretch = np.where(np.array(NAMES) == "rules", RULES_STRETCH, 1.0)
    z = ((e.z - mean[e.task]) / scale[e.task]).clip(-CLIP, CLIP).astype(np.float64) * stretch
    above = e.grade - level[e.task]
    weight = e.weight / e.weight.mean()
    shared = SHARED * np.linalg.solve(z.T @ (weight[:, None] * z) + SHARED_RIDGE * np.eye(m), z.T @ (weight * above))
    reach = np.bincount(e.model, above) / np.bincount(e.model).clip(min=1)
    target = e.grade - MODEL_SHARE * (above - reach[e.model]) - z @ shared

    by_grams, by_measures, bias = np.zeros((n_tasks, buckets), np.float32), np.tile(shared, (n_tasks, 1)), level.copy()
    for t in np.unique(e.task):
        here = e.task == t
        w, v, bias[t] = _ridge(x[here], z[here], target[here], weight[here])
        by_grams[t] = w
        by_measures[t] += v
    small = [np.asarray(a, np.float32) for a in (by_measures * stretch, mean, scale, bias)]
    return Weights(idf, by_grams, small[0], small[1], small[2], small[3])


def _ridge(
    x: Any, z: NDArray[np.float64], target: NDArray[np.float64], weight: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """(weights of the n-grams [B], of the measures [M], bias) of a ridge with a free bias and a weight for each of n rows.

    Solved in its dual, since n is small: alpha = (K + RIDGE / weight)^-1 y, with K and y centred on their weighted means.
    """
    n, share, part = len(target), MEASURES_WEIGHT / z.shape[1], weight / weight.sum()
    centre = np.eye(n) - part[None]  # [n, n]: subtracts the weighted mean
    kernel = centre @ ((x @ x.T).toarray() + share * (z @ z.T)) @ centre.T
    alpha = centre.T @ np.linalg.solve(kernel + RIDGE * np.diag(1 / weight), target - part @ target)
    w, v = np.asarray(x.T @ alpha).ravel(), share * (z.T @ alpha)
    return w, v, float(part @ (target - np.asarray(x @ w).ravel() - z @ v))


def predict(weights: Weights, examples: Examples) -> NDArray[np.float64]:
    """[n] grades of the examples, 1 to 5."""
    e = examples
    return np.array([weights.predict(t, x, z) for t, x, z in zip(e.task, e.x, e.z, strict=True)]).clip(1, 5)


def _folds(models: Sequence[str]) -> tuple[NDArray[np.int64], bool]:
    """(each model's fold, whether whole families stand in one fold). By family where there are enough of them, largest first."""
    groups = Counter(map(family, models))
    by_family = len(groups) >= FOLDS
    if not by_family:
        groups = Counter(models)
    sizes, fold = [0] * FOLDS, {}
    for name, size in sorted(groups.items(), key=lambda item: (-item[1], item[0])):
        fold[name] = int(np.argmin(sizes))
        sizes[fold[name]] += size
    return np.array([fold[family(m) if by_family else m] for m in models]), by_family


def _held_out(examples: Examples, folds: NDArray[np.int64], n_tasks: int) -> Agreements:
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
    weights: Weights,
    tasks: Sequence[Task],
    examples: Examples,
    judges: Sequence[str],
    models: Sequence[str],
    held_out: Agreements | None,
    by_family: bool,
) -> None:
    counts = np.bincount(examples.task, minlength=len(tasks))
    told: dict[str, Any] = {}
    if held_out is not None:
        told = {"folds": FOLDS, "by_family": by_family} | {
            name: getattr(held_out, name).as_json() for name in ("within_task", "model_level", "within_model", "difficulty_baseline")
        }
    keys, ids = tuple(map(task_key, tasks)), tuple(str(task.task_id) for task in tasks)
    save_judge(out, weights, Facts(keys, ids, tuple(map(int, counts)), tuple(judges), tuple(models), told))
