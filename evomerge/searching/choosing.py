"""The winner, chosen under noise, and the verdict on tasks that the search never saw.

docs/SEARCH.md reports what each rule of the choice contributes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.answering.cache import MERGED
from evomerge.console import Console
from evomerge.errors import StudyFileError
from evomerge.genome.search_space import model_names
from evomerge.genome.weights import Genome
from evomerge.searching.evaluate import Evaluation, Evaluator
from evomerge.searching.generation.racing import t_quantile
from evomerge.searching.history import History, best_first
from evomerge.searching.ledger import Ledger
from evomerge.searching.prepare import Problem
from evomerge.searching.records.trial_record import TaskGrade, TrialRecord, metric_values
from evomerge.searching.records.verdict_record import (
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
from evomerge.searching.scoring import (
    Scorer,
    bootstrap_interval,
    mean_and_error,
    stratified_error,
)
from evomerge.tasks import Task

# that an equal trial beats the mean: three standard errors of many tasks, more of few (Student
# 1908)
CHANCE = 0.00135
TAKEN = ("winner", "base", "uniform")  # names in a verdict that no sibling has
SAMPLES = 12  # held-out tasks whose answers are stored for the report
SAMPLE_CHARACTERS = 600  # characters of each text that is stored for the report


def choose(
    grades: Mapping[str, Mapping[str, float]], default: str = "mean", chance: float = CHANCE
) -> str:
    """The winner's name. `grades` are name -> task -> grade, finalists best first.

    The default wins unless another beats it in a one-sided paired t test at the level `chance`;
    among several the one with the largest lead. A pair's variance is at least twice that within
    tasks among all finalists, because a few rounded grades often do not differ by chance at all.
    Without a default among the names the best mean grade wins.
    """
    if default not in grades:
        return max(grades, key=lambda name: float(np.mean(list(grades[name].values()))))
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


def choose_winner(history: History, metric: str) -> TrialRecord:
    """The choice by the search tasks: the distribution's mean or the best candidate.

    The best of many noisy trials is lucky as well as good, so it must beat the mean by more than
    noise on the tasks that both answered.
    """
    best, mean = history.best_candidate(), history.mean
    if mean is None:
        return best
    values = {
        "best": metric_values(best.grades, metric),
        "mean": metric_values(mean.grades, metric),
    }
    return best if choose(values) == "best" else mean


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


def make_verdict(
    held_out: Mapping[str, Mapping[str, TaskGrade]],
    metric: str,
    seed: int,
    sources: Mapping[str, int] | None = None,
) -> Verdict:
    """The verdict from the held-out grades of each candidate ("winner" among them).

    `sources` name each task's source where the sources have different weights.
    """
    candidates, paired = {}, {}
    winner = metric_values(held_out["winner"], metric)
    for name, grades in held_out.items():
        values = metric_values(grades, metric)
        mean, error = mean_and_error(list(values.values()))
        if sources:
            error = stratified_error(values, sources)
        truncated = float(np.mean([grade.truncated for grade in grades.values()]))
        candidates[name] = HeldOutScore(mean, error, truncated)
        if name != "winner":
            paired[f"{LEAD}{name}"] = _paired_difference(winner, values, seed, sources)
    return Verdict(metric, len(winner), candidates, paired)


def _paired_difference(
    winner: Mapping[str, float],
    other: Mapping[str, float],
    seed: int,
    sources: Mapping[str, int] | None,
) -> PairedDifference:
    differences, groups = [], []
    for task, value in winner.items():
        if task in other:
            differences.append(value - other[task])
            groups.append(sources[task] if sources else 0)
    if len(differences) == 1:
        return PairedDifference(differences[0], None, None)
    low, high = bootstrap_interval(differences, seed, groups)
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
        winner = self._choose(history)
        compared = {"winner": winner, **compared_with(history, self.problem.genome)}
        numbers = {name: trial.number for name, trial in compared.items()}
        if facts.verdict is not None and facts.compared == numbers:
            return facts.verdict
        evaluations = self._evaluate(compared, self.problem.split.held_out, "verdict: {name}")
        grades = {}
        for name, evaluation in evaluations.items():
            grades[name] = self.scorer.by_task(evaluation)
        metric, seed = self.problem.study.metric, self.problem.study.search.seed
        if not metric_values(grades["winner"], metric):
            raise StudyFileError(
                "no held-out task is closed",
                where="judge.metric",
                found=metric,
                remedy="Use grade.",
            )
        verdict = make_verdict(grades, metric, seed, self.scorer.sources)
        self._remember_answers(evaluations)
        look = 1 if facts.verdict is None else facts.look + 1
        self.ledger.remember("verdict", Decision(verdict, numbers, look))
        return verdict

    def _choose(self, history: History) -> TrialRecord:
        """The winner: by the validation tasks where there are any, else by the search tasks."""
        study, tasks = self.problem.study, self.problem.split.validation
        metric = study.metric
        if not tasks:
            return choose_winner(history, metric)
        compared = {}
        for trial in best_first(history.candidates)[: study.search.finalists]:
            compared[str(trial.number)] = trial
        if history.mean is not None:
            compared["mean"] = history.mean
        grades = {}
        evaluations = self._evaluate(compared, tasks, "validation: trial {number}")
        for name, evaluation in evaluations.items():
            grades[name] = metric_values(self.scorer.by_task(evaluation), metric)
        if not all(grades.values()):
            self.console.say(
                "no validation task is closed, so the winner is chosen on the search tasks"
            )
            return choose_winner(history, metric)
        winner = compared[choose(grades)]
        means = {}
        for name, values in grades.items():
            means[compared[name].number] = mean_and_error(list(values.values()))
        n = len(next(iter(grades.values())))
        self.ledger.remember("validation", ValidationChoice(n, means, winner.number))
        return winner

    def _evaluate(
        self, compared: Mapping[str, TrialRecord], tasks: Sequence[Task], label: str
    ) -> dict[str, Evaluation]:
        """Evaluate trials on the same tasks; while the judge works, the next ones answer."""
        recipes = [self.problem.genome.decode(trial.weights) for trial in compared.values()]
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
