"""From answers and grades to what is maximised: a value for each task, and a candidate's score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from evomerge.errors import StudyFileError
from evomerge.searching.estimates import estimate, stratified_error
from evomerge.searching.front.objective_values import FrontObjective, objective_means
from evomerge.searching.records.trial_record import Result, TaskGrade, TrialRecord, metric_values
from evomerge.study import Study
from evomerge.tasks import Split, Task

if TYPE_CHECKING:  # scores that are stored can be read without torch
    from evomerge.searching.evaluate import Evaluation
    from evomerge.searching.prepare import Problem


@dataclass(frozen=True)
class Scorer:
    """Turns evaluations into grades by task and into a trial's result.

    `shares` weigh a task's value against another's, by task key, and `sources` name its source;
    both are empty where all sources have the same weight. `longest` gives the most tokens that a
    task's answer may have. `objectives` are those of a study with several.
    """

    study: Study
    shares: Mapping[str, float]
    sources: Mapping[str, int]
    longest: Callable[[Task], int]
    objectives: tuple[FrontObjective, ...] = ()

    def by_task(self, evaluation: Evaluation) -> dict[str, TaskGrade]:
        """Task key -> its grade, with the objective's parts where the study has an objective."""
        by_task, objective = {}, self.study.metric == "objective"
        for i, task in enumerate(evaluation.tasks):
            answer, grade = evaluation.answers[i], evaluation.grades[i]
            known = TaskGrade(
                grade.correct,
                answer.truncated,
                tokens=answer.answer_tokens,
                thought_tokens=answer.thought_tokens,
                **{evaluation.figure: grade.value},
            )
            if objective or self.objectives:
                length = answer.answer_tokens / self.longest(task)
                likelihood = None
                if evaluation.likelihoods is not None:
                    likelihood = evaluation.likelihoods[i]
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

    def result(
        self,
        evaluation: Evaluation,
        task_baselines: Mapping[str, float],
        references: Sequence[TrialRecord] = (),
    ) -> Result:
        """A trial's result.

        `task_baselines` are the search tasks' mean values by the references: they correct for the
        tasks that the trial has seen, as the `references` do for the values of several objectives.
        Raises StudyFileError when no task has a value.
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
        score, error, drawn = estimate(values, task_baselines, evaluation.chances)
        if drawn is None and self.sources:
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
            parts=self._parts(grades, references, evaluation.chances),
            draw_variance=drawn,
            thought_tokens=_thought_tokens(evaluation),
        )

    def _parts(
        self,
        grades: Mapping[str, TaskGrade],
        references: Sequence[TrialRecord],
        chances: Mapping[str, float] | None,
    ) -> dict[str, float]:
        if self.objectives:
            return objective_means(grades, references, self.objectives, chances)
        return part_means(grades, self.study)


def _thought_tokens(evaluation: Evaluation) -> int | None:
    """Those of all answers; None where the model has no thoughts."""
    known = []
    for answer in evaluation.answers:
        if answer.thought_tokens is not None:
            known.append(answer.thought_tokens)
    return sum(known) if known else None


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
    means = {}
    for name, values in by_part.items():
        if values:
            means[name] = float(np.mean(values))
    return means


def make_scorer(problem: Problem, longest: Callable[[Task], int]) -> Scorer:
    """The study's scorer."""
    study, split = problem.study, problem.split
    shares = task_shares(study, split)
    sources = {}
    if shares:
        for task in (*split.search, *split.held_out, *split.validation):
            sources[task.key] = task.source or 0
    objectives = problem.objectives if study.objective.several else ()
    return Scorer(study, shares, sources, longest, objectives)


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
