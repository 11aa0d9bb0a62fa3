"""From answers and grades to what is maximised: a value for each task, and a candidate's score."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from evomerge.errors import StudyFileError
from evomerge.searching.generation.racing import t_quantile
from evomerge.searching.records.trial_record import Result, TaskGrade, metric_values
from evomerge.study import Study
from evomerge.tasks import Split, Task

if TYPE_CHECKING:  # scores that are stored can be read without torch
    from evomerge.searching.evaluate import Evaluation


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, s / sqrt(n) with n - 1 in s; one value has no error: None."""
    array = np.asarray(values, dtype=float)
    if len(array) < 2:
        return float(array.mean()), None
    return float(array.mean()), float(array.std(ddof=1) / np.sqrt(len(array)))


def stratified_error(values: Mapping[str, float], group: Mapping[str, int]) -> float | None:
    """Standard error of the mean of values by task, whose tasks come from groups of fixed sizes.

    √Σ (n_g/N)² s_g² / n_g (Cochran 1977, chapter 5). A single value in a group has no variance:
    that of all values is used instead.
    """
    if len(values) < 2:
        return None
    return _error_and_freedom(list(values.values()), [group[task] for task in values])[0]


def paired_interval(
    differences: Sequence[float], groups: Sequence[int] = ()
) -> tuple[float, float]:
    """95 % interval of the mean of two or more paired differences, by Student's t (Student 1908).

    With `groups`, one for each difference, the error is that of `stratified_error`, with the
    degrees of freedom of Satterthwaite (1946). On 50 tasks the percentile bootstrap holds the true
    difference in 92 % of right-or-wrong studies and this in 94 % (docs/SEARCH.md).
    """
    error, freedom = _error_and_freedom(differences, groups or [0] * len(differences))
    mean, away = float(np.mean(differences)), t_quantile(0.025, freedom) * error
    return mean - away, mean + away


def _error_and_freedom(values: Sequence[float], groups: Sequence[int]) -> tuple[float, float]:
    """The stratified error of a mean, and its degrees of freedom: (Σ e_g²)² / Σ e_g⁴ / (n_g - 1).

    `values` are two or more. One that is alone in its group has the variance of all.
    """
    parts: dict[int, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        parts.setdefault(group, []).append(value)
    total, fourth = 0.0, 0.0
    for part in parts.values():
        error, known = mean_and_error(part)[1], len(part)
        if error is None:
            error, known = float(np.std(values, ddof=1)), len(values)
        share = (len(part) / len(values)) ** 2 * error**2
        total += share
        fourth += share**2 / (known - 1)
    freedom = total**2 / fourth if fourth else len(values) - 1
    return float(np.sqrt(total)), freedom


def two_phase_mean(
    grades: Mapping[str, float], task_baselines: Mapping[str, float]
) -> tuple[float, float | None, float]:
    """A candidate's score over all search tasks, its standard error, and `draw_variance`.

    `task_baselines` are the tasks' mean grades by the references, which answered all: easy tasks
    must not flatter a candidate that drew them. score = mean(grade - baseline over the n tasks
    seen) + mean(baseline over all N); the error, of tasks like these, is that of two-phase
    sampling, s_d² (1/n - 1/N) + s_g² / N, with s_d² the variance of grade - baseline and s_g² that
    of the grade (Cochran 1977, chapter 12). With every task seen this is s_g / √N, the error of a
    plain mean.
    """
    values, above, known = _beside_baselines(grades, task_baselines)
    total = len(known)
    score, drawn = float(above.mean() + np.mean(known)), draw_variance(above, total)
    if len(values) > 1:
        return score, math.sqrt(drawn + values.var(ddof=1) / total), drawn
    # a single grade has no spread: that of the baselines is used instead
    return score, float(np.std(known, ddof=1)) if total > 1 else None, drawn


def draw_variance(above: np.ndarray, total: int) -> float:
    """s_d² (1/n - 1/N): a mean's variance from drawing n of `total` tasks; 0 for a single one."""
    if len(above) < 2:
        return 0.0
    return float(above.var(ddof=1)) * (1 / len(above) - 1 / total)


def difference_estimate(
    grades: Mapping[str, float],
    task_baselines: Mapping[str, float],
    chances: Mapping[str, float],
) -> tuple[float, float | None, float]:
    """The same as `two_phase_mean` where each task had a chance of its own to be drawn.

    `chances` are those of all tasks that were drawn; of these a candidate may have seen only a
    random part, which divides them further.
    score = sum over the tasks seen of (grade - baseline) / chance, over N, + mean(baseline over
    all N): the difference estimator, whose expectation is the mean over all N (Särndal, Swensson
    and Wretman 1992, 6.3). Its variance is Hájek's (1964) for fixed sizes: with
    e = (grade - baseline) / chance and B the mean of e weighted by 1 - chance, n / (n - 1) times
    the sum of (1 - chance) (e - B)², over N². s_g² weighs the grades by the inverse of their
    chances.
    """
    values, above, known = _beside_baselines(grades, task_baselines)
    n, total = len(values), len(known)
    chance = np.array([chances[task] for task in grades]) * n / len(chances)
    expanded, left = above / chance, 1 - chance
    score = float(expanded.sum() / total + np.mean(known))
    if n < 2:
        return score, float(np.std(known, ddof=1)) if total > 1 else None, 0.0
    center = left @ expanded / left.sum() if left.any() else 0.0
    drawn = float(left @ np.square(expanded - center)) * n / (n - 1) / total**2
    share = 1 / chance / (1 / chance).sum()
    spread = float(share @ np.square(values - share @ values)) * n / (n - 1)
    return score, math.sqrt(drawn + spread / total), drawn


def _beside_baselines(
    grades: Mapping[str, float], task_baselines: Mapping[str, float]
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """The grades, what they have more than their tasks' baselines, and all baselines."""
    values = np.array(list(grades.values()), dtype=float)
    above = values - np.array([task_baselines[task] for task in grades], dtype=float)
    return values, above, list(task_baselines.values())


@dataclass(frozen=True)
class Scorer:
    """Turns evaluations into grades by task and into a trial's result.

    `shares` weigh a task's value against another's, by task key, and `sources` name its source;
    both are empty where all sources have the same weight. `longest` gives the most tokens that a
    task's answer may have.
    """

    study: Study
    shares: Mapping[str, float]
    sources: Mapping[str, int]
    longest: Callable[[Task], int]

    def by_task(self, evaluation: Evaluation) -> dict[str, TaskGrade]:
        """Task key -> its grade, with the objective's parts where the study has an objective."""
        by_task, objective = {}, self.study.metric == "objective"
        for i, task in enumerate(evaluation.tasks):
            answer, grade = evaluation.answers[i], evaluation.grades[i]
            known = TaskGrade(
                grade.correct,
                answer.truncated,
                tokens=answer.tokens,
                **{evaluation.figure: grade.value},
            )
            if objective or self.study.objective.several:
                length = answer.tokens / self.longest(task)
                likelihood = None if evaluation.likelihoods is None else evaluation.likelihoods[i]
                known = replace(known, length=length, likelihood=likelihood)
            if objective:
                known = replace(known, objective=self._objective(task.key, known))
            by_task[task.key] = known
        return by_task

    def task_values(self, evaluation: Evaluation, missing: float) -> list[float]:
        """What is maximised, in the tasks' order; `missing` where a task has no value."""
        values = metric_values(self.by_task(evaluation), self.study.metric)
        return [values.get(task.key, missing) for task in evaluation.tasks]

    def _objective(self, task: str, known: TaskGrade) -> float | None:
        """The weighted sum of the parts; None for a task that lacks one of them."""
        weights = self.study.objective
        graded = known.value(self.study.judge.metric)
        if graded is None or (weights.likelihood and known.likelihood is None):
            return None
        assert known.length is not None
        total = (
            weights.grade * graded
            + weights.length * known.length
            + weights.likelihood * (known.likelihood or 0.0)
        )
        return float(self.shares.get(task, 1.0) * total)

    def result(self, evaluation: Evaluation, task_baselines: Mapping[str, float]) -> Result:
        """A trial's result.

        `task_baselines` are the search tasks' mean values by the references: they correct for the
        tasks that the trial has seen. Raises StudyFileError when no task has a value.
        """
        grades = self.by_task(evaluation)
        values = metric_values(grades, self.study.metric)
        if not values:
            raise StudyFileError(
                "no search task is closed, so none can be right or wrong",
                where="judge.metric",
                found="correct",
                remedy="Use grade.",
            )
        drawn = None
        if len(values) < len(task_baselines) and values.keys() <= task_baselines.keys():
            if evaluation.chances is None:
                score, error, drawn = two_phase_mean(values, task_baselines)
            else:
                chances = evaluation.chances
                score, error, drawn = difference_estimate(values, task_baselines, chances)
        else:
            score, error = mean_and_error(list(values.values()))
            if self.sources:
                error = stratified_error(values, self.sources)
        return Result(
            score=score,
            stderr=error,
            n=len(values),
            truncated=float(np.mean([answer.truncated for answer in evaluation.answers])),
            seconds=evaluation.seconds,
            grades=grades,
            tokens=sum(answer.tokens for answer in evaluation.answers),
            tokens_per_second=evaluation.tokens_per_second,
            parts=part_means(grades, self.study),
            draw_variance=drawn,
        )


def part_means(grades: Mapping[str, TaskGrade], study: Study) -> dict[str, float]:
    """The mean of each of the objective's parts over the tasks that have it; {} without one."""
    if study.metric != "objective":
        return {}
    by_part: dict[str, list[float]] = {"grade": [], "length": [], "likelihood": []}
    for known in grades.values():
        parts = (known.value(study.judge.metric), known.length, known.likelihood)
        for values, part in zip(by_part.values(), parts, strict=True):
            if part is not None:
                values.append(part)
    return {part: float(np.mean(values)) for part, values in by_part.items() if values}


def make_scorer(study: Study, split: Split, longest: Callable[[Task], int]) -> Scorer:
    """The study's scorer."""
    shares = task_shares(study, split)
    sources = {}
    if shares:
        for task in (*split.search, *split.held_out, *split.validation):
            sources[task.key] = task.source or 0
    return Scorer(study, shares, sources, longest)


def task_shares(study: Study, split: Split) -> dict[str, float]:
    """Task key -> its share. {} where all sources have the same weight.

    With weights W of the sources, the mean over a part of the split of share times value is
    sum(W * mean over the source's tasks) / sum(|W|).
    """
    weights = [source.weight for source in study.tasks]
    if study.lm_eval or len(set(weights)) < 2:
        return {}
    shares: dict[str, float] = {}
    for part in (split.search, split.held_out, split.validation):
        sources = [task.source or 0 for task in part]
        counts = Counter(sources)
        total = sum(abs(weights[source]) for source in counts) or 1.0
        for task, source in zip(part, sources, strict=True):
            shares[task.key] = weights[source] * len(part) / (counts[source] * total)
    return shares
