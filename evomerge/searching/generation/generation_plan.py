"""What each candidate of a generation answers, and which judge grades it.

Everything here is a function of the study and of the generation's candidates; answers and grades
come from their caches when it is computed again. A run that was killed in the middle of a
generation therefore has the same result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from evomerge.answering.cache import MERGED, ONE_PASS
from evomerge.console import Console
from evomerge.errors import EngineError
from evomerge.judging.cascade import CascadeJudge
from evomerge.judging.grade import Grade
from evomerge.recipe import Recipe
from evomerge.searching.evaluate import Evaluation, Evaluator, JudgedEvaluator
from evomerge.searching.generation.cascade_round import CascadeRound
from evomerge.searching.generation.one_pass import OnePass
from evomerge.searching.generation.racing import blocks, hopeless
from evomerge.searching.generation.task_draw import TaskDraw
from evomerge.searching.judge_answers import PendingEvaluation
from evomerge.searching.ledger import Ledger
from evomerge.searching.prefetch import Item
from evomerge.searching.prepare import Problem
from evomerge.searching.records.study_facts import CascadeSavings
from evomerge.searching.samplers.cma import Slot
from evomerge.searching.scoring import Scorer
from evomerge.tasks import Task


@dataclass
class GenerationDecisions:
    """What is known about a generation's candidates before their trials, by recipe digest."""

    recipes: tuple[str, ...]
    blocks: dict[str, int] = field(default_factory=dict)  # how many each answers
    grades: Mapping[str, Mapping[str, Grade]] = field(default_factory=dict)  # of a cascade


@dataclass
class AllTasksPlan:
    """The plan of a study whose candidates all answer every search task, one after another."""

    evaluator: Evaluator
    search_tasks: Sequence[Task]
    compares_candidates_first: bool = False
    tasks_follow_grades: bool = False

    def tasks(self, generation: int) -> Sequence[Task]:
        """Every search task."""
        return self.search_tasks

    def mode(self) -> str:
        """The mode in which candidates are merged."""
        return MERGED

    def evaluate(
        self, slot: Slot, recipe: Recipe, label: str, upcoming: Iterable[Item] = ()
    ) -> Evaluation:
        """Evaluate one candidate. Raises EngineError."""
        return self.evaluator.evaluate(recipe, [self.search_tasks], label, MERGED, upcoming)


class GenerationPlan:
    """One generation at a time, as `search.ranking`, the judge and the engine require."""

    def __init__(
        self,
        problem: Problem,
        ledger: Ledger,
        evaluator: JudgedEvaluator,
        scorer: Scorer,
        one_pass: OnePass,
        console: Console,
    ) -> None:
        self.study, self.genome, self.sampler = problem.study, problem.genome, problem.sampler
        self.ledger, self.task_draw = ledger, TaskDraw(problem, ledger)
        self.evaluator, self.scorer = evaluator, scorer
        self.one_pass, self.console = one_pass, console
        self.decisions: GenerationDecisions | None = None
        self.keep = max(1, self.sampler.population // 2)  # candidates of the better half
        self._mode: str | None = None

    @property
    def tasks_follow_grades(self) -> bool:
        """Whether a generation's tasks depend on the grades before it."""
        return self.task_draw.informative

    @property
    def compares_candidates_first(self) -> bool:
        """Whether a generation's candidates are compared before their trials begin.

        True for a race and for the cascade judge.
        """
        raced = self.study.search.ranking == "race"
        return raced or isinstance(self.evaluator.judge, CascadeJudge)

    def mode(self) -> str:
        """How candidates answer: each merged, or all in one pass. Raises StudyFileError."""
        if self._mode is None:
            raced = self.study.search.ranking == "race"
            shared = not raced and self.one_pass.wanted(len(self.tasks(0)))
            self._mode = ONE_PASS if shared else MERGED
        return self._mode

    def tasks(self, generation: int) -> tuple[Task, ...]:
        """The search tasks that a generation is ranked on."""
        return self.task_draw.of(generation).tasks

    def blocks(self, generation: int) -> list[tuple[Task, ...]]:
        """The generation's tasks in the blocks of a race; without a race they are one block."""
        tasks = self.tasks(generation)
        if self.study.search.ranking != "race":
            return [tasks]
        return [tasks[block.start : block.stop] for block in blocks(len(tasks))]

    def evaluate(
        self, slot: Slot, recipe: Recipe, label: str, upcoming: Iterable[Item] = ()
    ) -> Evaluation:
        """Evaluate one candidate, after deciding about its whole generation. Raises EngineError."""
        generation, named = slot.generation, f"gen {slot.generation + 1}"
        if self.mode() == ONE_PASS:
            self._answer_in_one_pass(generation, named)
        decisions = self._decide(generation, named)
        every, mode, digest = self.blocks(generation), self.mode(), recipe.digest()
        count = max(1, decisions.blocks.get(digest, len(every)))
        if digest in decisions.grades:
            grades = decisions.grades[digest]
            found = self.evaluator.evaluate_with_grades(recipe, every[:count], grades, label, mode)
        else:
            found = self.evaluator.evaluate(recipe, every[:count], label, mode, upcoming)
        return replace(found, chances=self.task_draw.of(generation).chances)

    def _answer_in_one_pass(self, generation: int, named: str) -> None:
        prompter = self.evaluator.prompter
        prompts = prompter.prepare([task.input for task in self.tasks(generation)])

        def report(line: str) -> None:
            self.console.status(f"{named}  in one pass  {line}", detail=True)

        texts = [prompt.text for prompt in prompts]
        self.one_pass.ahead(generation, texts, report, prompter.settings(prompts))

    def _decide(self, generation: int, label: str) -> GenerationDecisions:
        """What must be known about the whole generation: by a race, a cascade's round, or nothing.

        It is computed again when a candidate was replaced.
        """
        if not self.compares_candidates_first:
            return GenerationDecisions(())
        history, trials = self.ledger.history(), self.study.search.trials
        vectors = self.sampler.vectors(history, generation, trials)
        recipes = [self.genome.decode(vector) for vector in vectors]
        digests = tuple(recipe.digest() for recipe in recipes)
        if self.decisions is None or self.decisions.recipes != digests:
            # of candidates that were replaced; their answers are kept
            self.evaluator.prefetcher.begun.clear()
            if isinstance(self.evaluator.judge, CascadeJudge):
                grades = self._cascade(self.evaluator.judge, generation, recipes, label)
                self.decisions = GenerationDecisions(digests, grades=grades)
            else:
                weights = self.task_draw.of(generation).weights()
                counts = self._race(recipes, self.blocks(generation), weights, label)
                self.decisions = GenerationDecisions(digests, counts)
        return self.decisions

    def _cascade(
        self, judge: CascadeJudge, generation: int, recipes: Sequence[Recipe], label: str
    ) -> Mapping[str, Mapping[str, Grade]]:
        """The grades by recipe digest and task key; {} when no candidate could answer."""
        cascade = CascadeRound(judge, self.study, self.evaluator, self.scorer)
        drawn = self.task_draw.of(generation)
        outcome = cascade.run(recipes, drawn, self.keep, self.mode(), label)
        if outcome is None:
            return {}
        self._remember_savings(generation, outcome.savings)
        return outcome.grades

    def _race(
        self,
        recipes: Sequence[Recipe],
        every: Sequence[Sequence[Task]],
        weights: np.ndarray,
        label: str,
    ) -> dict[str, int]:
        """How many blocks each recipe answers, by its digest.

        Block by block; a candidate that can no longer enter the better half stops. `weights` are
        those of the tasks' values, in order.
        """
        counts: dict[str, int] = {}
        values = np.full((len(recipes), sum(map(len, every))), np.nan)
        racing = list(range(len(recipes)))
        start = 0
        for number, block in enumerate(every, start=1):
            named = f"{label}, block {number}/{len(every)}, {len(racing)} left"
            for i in racing:
                counts[recipes[i].digest()] = number
            begun = self._begin(recipes, racing, block, named)
            for i, pending in begun.items():
                values[i, start : start + len(block)] = self._values(recipes[i], pending)
            racing = list(begun)
            start += len(block)
            if number < len(every):
                looks, error = max(1, len(every) - 1), self.study.search.race_error
                stopped = hopeless(values[racing] * weights, self.keep, error, looks)
                racing = [i for row, i in enumerate(racing) if row not in stopped]
        return counts

    def _begin(
        self, recipes: Sequence[Recipe], racing: Sequence[int], block: Sequence[Task], label: str
    ) -> dict[int, PendingEvaluation]:
        """The evaluations of a block, by candidate.

        A candidate that fails is left out: its own turn, with the blocks up to this one, fails
        again and is recorded.
        """
        begun = {}
        for i in racing:
            item = (recipes[i], block, MERGED)
            try:
                begun[i] = self.evaluator.take_or_begin(item, label)
            except EngineError:
                continue
            self.evaluator.prefetcher.keep(item, begun[i])
        return begun

    def _values(self, recipe: Recipe, pending: PendingEvaluation) -> list[float]:
        """What a candidate is ranked by, by task; nan where a task has no value."""
        tasks = tuple(pending.tasks)
        likelihoods = self.evaluator.likelihoods(recipe, tasks)
        grades = pending.wait()
        evaluation = Evaluation(tasks, pending.answers, grades, {}, likelihoods=likelihoods)
        return self.scorer.task_values(evaluation, missing=np.nan)

    def _remember_savings(self, generation: int, savings: CascadeSavings) -> None:
        """Store the savings by generation, so that computing one again counts once."""
        known = dict(self.ledger.facts.cascade_generations)
        known[generation] = (savings.graded, savings.asked)
        self.ledger.remember("cascade_generations", known)
        graded, asked = map(sum, zip(*known.values(), strict=True))
        self.ledger.remember("cascade", CascadeSavings(graded, asked))
