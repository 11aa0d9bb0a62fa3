"""The course of a study: references, generations, the mean, the choice of the winner, the verdict.

A trial is drawn, decoded into a recipe, evaluated (merge, answer, judge), scored and recorded; the
next generation is drawn from what the ledger holds. A run that is interrupted anywhere therefore
resumes as if it had not been.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from evomerge.console import Console
from evomerge.errors import EngineError
from evomerge.recipe import Recipe
from evomerge.searching.evaluate import Evaluation, Evaluator
from evomerge.searching.final_test import FinalTest
from evomerge.searching.generation import stopping
from evomerge.searching.generation.generation_plan import AllTasksPlan, GenerationPlan
from evomerge.searching.generation.learning import LearningWarnings
from evomerge.searching.ledger import Ledger
from evomerge.searching.prefetch import Item, Reference, Upcoming
from evomerge.searching.prepare import Problem
from evomerge.searching.records.trial_record import TrialRecord
from evomerge.searching.records.verdict_record import Verdict
from evomerge.searching.scoring import Scorer
from evomerge.searching.starting.warm_start import GradientStart

Evaluate = Callable[[Recipe], Evaluation]
LUCK = "no generation of {} is complete: the best trial wins, which is mostly luck"


@dataclass
class Search:
    """One running study. `run` resumes from the state of the ledger."""

    problem: Problem
    ledger: Ledger
    evaluator: Evaluator
    generation_plan: GenerationPlan | AllTasksPlan
    scorer: Scorer
    upcoming: Upcoming
    final_test: FinalTest
    console: Console
    warm_start: GradientStart | None = None

    def __post_init__(self) -> None:
        problem = self.problem
        self.study, self.genome, self.split = problem.study, problem.genome, problem.split
        self.sampler, self.clock = problem.sampler, stopping.StudyClock(self.ledger)
        self.ledger.storage.claim()
        # by slot, in this run only, so that a study resumes once the cause is fixed
        self.failures: Counter[tuple[int | None, int | None]] = Counter()
        self.warnings = LearningWarnings(self.study.metric, self.console)

    def run(self) -> Verdict:
        """Search to the end. Raises whatever stops a run; everything done so far is stored."""
        stale = self.ledger.mark_interrupted()
        if stale:
            self.console.say(f"{stale} interrupted trial(s) are restarted")
        if self.study.engine.population:
            self.generation_plan.mode()  # refused here, before any work
        self._evaluate_references()
        if self.warm_start is not None:
            self.warm_start.run(self.ledger, self.console, self.clock)
        reason = self._run_generations()
        self.console.say(f"the search ends: {reason}")
        self.ledger.remember("stopped", reason)
        self._evaluate_means()
        return self.final_test.run()

    def _evaluate_references(self) -> None:
        """Evaluate the parents and the uniform weights, each once."""
        wanted = self.genome.references(self.study.search.uniform)
        for i, (role, vector) in enumerate(wanted):
            history = self.ledger.history()
            if history.has(role, vector):
                continue
            after: list[Reference] = [r for r in wanted[i + 1 :] if not history.has(*r)]
            upcoming = self.upcoming.after_reference(after)
            label = f"{role} {i + 1}/{len(wanted)}"
            self._evaluate_whole(self.ledger.start(role, vector), label, upcoming)
        self.warnings.about_references(self.ledger.history().references)

    def _run_generations(self) -> str:
        """Run candidates until there is a reason to stop, which is returned."""
        judge, why_stop = self.evaluator.judge, stopping.why_stop
        reason = why_stop(self.study, self.sampler, self.ledger, self.clock, judge)
        if reason is None:
            self.ledger.remember("stopped", None)
        while reason is None:
            self._run_candidate()
            reason = why_stop(self.study, self.sampler, self.ledger, self.clock, judge)
        stopping.check_searched(self.ledger.history(), reason)
        return reason

    def _run_candidate(self) -> None:
        """Run one trial in the first open slot."""
        history = self.ledger.history()
        slot = self.sampler.next_slot(history)
        stopping.check_attempts(self.failures[slot.generation, slot.index], history)
        done = len(history.candidates) + 1
        label = f"gen {slot.generation + 1}  candidate {done}/{self.study.search.trials}"
        vector = self.sampler.draw(history, slot)
        trial = self.ledger.start("candidate", vector.tolist(), slot.generation, slot.index)
        upcoming = self.upcoming.after_candidate(slot)
        self._evaluate_and_record(
            trial, label, lambda r: self.generation_plan.evaluate(slot, r, label, upcoming)
        )
        if slot.index == self.sampler.population - 1:
            drawn = self.ledger.history().generation(slot.generation)
            self.warnings.about(drawn, f"the candidates of generation {slot.generation + 1}")

    def _evaluate_means(self) -> None:
        """Evaluate the mean of each distribution that the search arrived at."""
        generation, means = self.sampler.means(self.ledger.history())
        if not generation:
            self.console.say(LUCK.format(self.sampler.population))
            return
        for number, mean in enumerate(means, start=1):
            if self.ledger.history().has("mean", mean.tolist()):
                continue
            label = f"mean {number}/{len(means)}" if len(means) > 1 else "the distribution's mean"
            trial = self.ledger.start("mean", mean.tolist(), generation)
            self._evaluate_whole(trial, label, self.upcoming.after_mean())

    def _evaluate_whole(self, trial: TrialRecord, label: str, ahead: Iterable[Item]) -> None:
        """Run a trial that answers every search task."""
        tasks = [self.split.search]
        self._evaluate_and_record(
            trial, label, lambda r: self.evaluator.evaluate(r, tasks, label, upcoming=ahead)
        )

    def _evaluate_and_record(self, trial: TrialRecord, label: str, evaluate: Evaluate) -> None:
        """Evaluate, score, record. A candidate may fail; anything else stops the run."""
        try:
            evaluation = evaluate(self.genome.decode(trial.vector))
        except EngineError as error:
            self.ledger.fail(trial, str(error))
            if trial.role != "candidate":
                raise
            self.failures[trial.slot] += 1
            self.console.say(f"{label}: failed: {error}")
            return
        history = self.ledger.history()
        baselines = history.task_baselines(self.study.metric) if trial.role == "candidate" else {}
        self.ledger.finish(trial, self.scorer.result(evaluation, baselines, history.references))
        self.clock.remember()
        self.console.status(stopping.progress_line(self.study, self.ledger.history(), label))
