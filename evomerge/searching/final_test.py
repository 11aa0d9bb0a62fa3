"""The end of a study: the winner is chosen and compared on tasks that the search never saw."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from evomerge.answering.cache import MERGED
from evomerge.console import Console
from evomerge.errors import StudyFileError
from evomerge.searching.choosing import (
    choose_winner,
    compared_with,
    finalists,
    reference_names,
    unbeaten_name,
)
from evomerge.searching.estimates import mean_and_error, paired_interval, stratified_error
from evomerge.searching.evaluate import Evaluation, Evaluator
from evomerge.searching.front.make_front import (
    MOST,
    as_front,
    choose_front,
    contenders,
    held_out_point,
)
from evomerge.searching.front.objective_values import estimates, objective_baselines
from evomerge.searching.history import History
from evomerge.searching.ledger import Ledger
from evomerge.searching.prepare import Problem
from evomerge.searching.records.front_record import Front
from evomerge.searching.records.trial_record import (
    REFERENCES,
    TaskGrade,
    TrialRecord,
    metric_values,
)
from evomerge.searching.records.verdict_record import (
    FOUND,
    LEAD,
    Decision,
    HeldOutScore,
    PairedDifference,
    Sample,
    SampleAnswer,
    ValidationChoice,
    Verdict,
)
from evomerge.searching.report_judge import cut, known_agreement, report_judge
from evomerge.searching.scoring import Scorer
from evomerge.tasks import Task

SAMPLES = 12  # held-out tasks whose answers are stored for the report
POINT = "point:"  # begins the names of the front's other points among those compared
SAMPLE_CHARACTERS = 600  # characters of each text that is stored for the report


def make_verdict(
    held_out: Mapping[str, Mapping[str, TaskGrade]],
    metric: str,
    sources: Mapping[str, int] | None = None,
    unbeaten: str | None = None,
    same: Collection[str] = (),
) -> Verdict:
    """The verdict from the held-out grades of each candidate ("winner" among them).

    `sources` name each task's source where the sources have different weights; `unbeaten` as in
    `Verdict`. Candidates that are the `same` trial as the winner are not compared with it.
    """
    candidates, paired = {}, {}
    winner = metric_values(held_out["winner"], metric)
    for name, grades in held_out.items():
        values = metric_values(grades, metric)
        mean, error = mean_and_error(list(values.values()))
        if sources:
            error = stratified_error(values, sources)
        truncated = float(np.mean([grade.truncated for grade in grades.values()]))
        candidates[name] = HeldOutScore(mean, error, truncated, *_mean_tokens(grades.values()))
        if name != "winner" and name not in same:
            paired[f"{LEAD}{name}"] = _paired_difference(winner, values, sources)
    return Verdict(metric, len(winner), candidates, paired, unbeaten)


def _mean_tokens(grades: Collection[TaskGrade]) -> tuple[float | None, float | None]:
    """Tokens per answer, of thoughts and of the answer; None where the model has no thoughts."""
    thoughts, answers = [], []
    for grade in grades:
        if grade.thought_tokens is not None and grade.tokens is not None:
            thoughts.append(grade.thought_tokens)
            answers.append(grade.tokens)
    if not thoughts:
        return None, None
    return float(np.mean(thoughts)), float(np.mean(answers))


def _paired_difference(
    winner: Mapping[str, float],
    other: Mapping[str, float],
    sources: Mapping[str, int] | None,
) -> PairedDifference:
    differences, groups = [], []
    for task, value in winner.items():
        if task in other:
            differences.append(value - other[task])
            groups.append(sources[task] if sources else 0)
    if len(differences) == 1:
        return PairedDifference(differences[0], None, None)
    low, high = paired_interval(differences, groups)
    return PairedDifference(float(np.mean(differences)), low, high)


@dataclass(frozen=True)
class FinalTest:
    """The end of a study: the choice of the winner, and the verdict on the held-out tasks."""

    problem: Problem
    ledger: Ledger
    evaluator: Evaluator
    scorer: Scorer
    console: Console

    def run(self) -> Verdict:
        """Choose the winner and compare it. Raises EngineError, JudgeError, StudyFileError.

        What was computed before an interruption comes from the cache. Each look at the held-out
        tasks is counted: a winner that is chosen after one look is no longer chosen blindly.
        """
        history, facts = self.ledger.history(), self.ledger.facts
        points: list[TrialRecord] = []
        if self.problem.study.objective.several:
            points, winner = self._choose_front(history)
        else:
            winner = self._choose(history)
        uniform = self.problem.study.search.uniform
        unbeaten = unbeaten_name(winner, self.problem.genome, uniform)
        compared = {"winner": winner, **compared_with(history, self.problem.genome)}
        if unbeaten is not None:
            compared[FOUND] = history.mean or history.best_candidate()
        numbers = {name: trial.number for name, trial in compared.items()}
        also = {str(t.number): t for t in points if t.number not in numbers.values()}
        numbers |= {f"{POINT}{number}": int(number) for number in also}
        if facts.verdict is not None and facts.compared == numbers:
            return facts.verdict
        evaluations = self._evaluate(compared, self.problem.split.held_out, "verdict: {name}")
        others = self._evaluate(also, self.problem.split.held_out, "verdict: trial {name}")
        grades = {}
        for name, evaluation in evaluations.items():
            grades[name] = self.scorer.by_task(evaluation)
        metric = self.problem.study.metric
        if not metric_values(grades["winner"], metric):
            raise StudyFileError(
                "no held-out task is closed",
                where="judge.metric",
                found=metric,
                remedy="Use grade.",
            )
        same = [name for name, trial in compared.items() if trial.number == winner.number]
        verdict = make_verdict(grades, metric, self.scorer.sources, unbeaten, same)
        if points:
            verdict = replace(verdict, front=self._front(points, compared, grades, others))
        self._remember_answers(evaluations)
        look = 1 if facts.verdict is None else facts.look + 1
        self.ledger.remember("verdict", Decision(verdict, numbers, look))
        return verdict

    def _choose(self, history: History) -> TrialRecord:
        """The winner: by the validation tasks where there are any, else by the search tasks."""
        study, tasks = self.problem.study, self.problem.split.validation
        metric = study.metric
        found = finalists(history, study.search.finalists, self.ledger.facts.references_win)
        if not tasks:
            return choose_winner(found, metric)
        compared = {str(trial.number): trial for trial in found.every}
        grades = {}
        evaluations = self._evaluate(compared, tasks, "validation: trial {number}")
        for name, evaluation in evaluations.items():
            grades[int(name)] = metric_values(self.scorer.by_task(evaluation), metric)
        if not all(grades.values()):
            self.console.say(
                "no validation task is closed, so the winner is chosen on the search tasks"
            )
            return choose_winner(found, metric)
        winner = choose_winner(found, metric, grades)
        means = {}
        for number, values in grades.items():
            means[number] = mean_and_error(list(values.values()))
        n = len(next(iter(grades.values())))
        self.ledger.remember("validation", ValidationChoice(n, means, winner.number))
        return winner

    def _choose_front(self, history: History) -> tuple[list[TrialRecord], TrialRecord]:
        """The trials on the front, by the search tasks and the validation tasks, and the winner."""
        objectives = self.problem.objectives
        trials, more = contenders(history, several=True), self.problem.split.validation
        fresh: dict[str, dict[str, TaskGrade]] = {}
        if more and history.means:  # else the trials have seen different tasks
            compared = {str(trial.number): trial for trial in trials}
            for name, evaluation in self._evaluate(compared, more, "validation: {name}").items():
                fresh[name] = self.scorer.by_task(evaluation)
        baselines, known = objective_baselines(history.references, objectives), {}
        for t in trials:
            grades = {**t.grades, **fresh.get(str(t.number), {})}
            known[t.number] = estimates(grades, baselines, objectives)
        found = choose_front(known, trials, objectives, MOST)
        assert found is not None  # the references have every objective
        return found

    def _front(
        self,
        points: Sequence[TrialRecord],
        compared: Mapping[str, TrialRecord],
        grades: Mapping[str, Mapping[str, TaskGrade]],
        others: Mapping[str, Evaluation],
    ) -> Front:
        """The front on the held-out tasks, with the parents and the best uniform weight."""
        objectives, study = self.problem.objectives, self.problem.study
        by_number = {compared[name].number: grades[name] for name in compared}
        for name, evaluation in others.items():
            by_number[int(name)] = self.scorer.by_task(evaluation)
        names = reference_names(self.problem.genome, study.search.uniform)
        made = {}
        for trial in (*points, *compared.values()):
            label = trial.role
            if label in REFERENCES:
                label = names.get(trial.vector, label)
            own = by_number[trial.number]
            made[trial.number] = held_out_point(trial, label, own, objectives)
        shown = compared_with(self.ledger.history(), self.problem.genome).values()
        return as_front(
            objectives,
            [made[trial.number] for trial in points],
            [made[trial.number] for trial in shown],
            compared["winner"].number,
            held_out=True,
        )

    def _evaluate(
        self, compared: Mapping[str, TrialRecord], tasks: Sequence[Task], label: str
    ) -> dict[str, Evaluation]:
        """Evaluate trials on the same tasks; while the judge works, the next ones answer."""
        recipes = [self.problem.genome.decode(trial.vector) for trial in compared.values()]
        evaluations = {}
        for i, (name, trial) in enumerate(compared.items()):
            upcoming = [(recipe, tasks, MERGED) for recipe in recipes[i + 1 :]]
            shown = label.format(name=name, number=trial.number)
            evaluate = self.evaluator.evaluate
            evaluations[name] = evaluate(recipes[i], [tasks], shown, upcoming=upcoming)
        return evaluations

    def _remember_answers(self, evaluations: Mapping[str, Evaluation]) -> None:
        """Store what the report shows about the judge and the held-out answers."""
        tasks, judge = self.problem.split.held_out, self.evaluator.judge
        if judge is not None:
            known = known_agreement(judge)
            report = report_judge(judge.name, judge.version, tasks, evaluations, known)
            self.ledger.remember("judge_report", report)
        self.ledger.remember("samples", samples(tasks, evaluations))


def samples(tasks: Sequence[Task], evaluations: Mapping[str, Evaluation]) -> list[Sample]:
    """Held-out answers side by side, those first on which the candidates' grades differ most."""
    spreads = []
    for i in range(len(tasks)):
        values = [evaluation.grades[i].value for evaluation in evaluations.values()]
        spreads.append(max(values) - min(values))
    chosen = []
    for i in sorted(range(len(tasks)), key=lambda i: (-spreads[i], i))[:SAMPLES]:
        task, answers = tasks[i], {}
        for name, evaluation in evaluations.items():
            text = cut(evaluation.answers[i].text, SAMPLE_CHARACTERS)
            answers[name] = SampleAnswer(text, evaluation.grades[i].value)
        shown = cut(task.input, SAMPLE_CHARACTERS), cut(task.output, SAMPLE_CHARACTERS)
        chosen.append(Sample(task.stored_id, *shown, answers))
    return chosen
