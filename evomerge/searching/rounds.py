"""What each candidate of a generation answers, and who grades it, before its trial is recorded.

Everything here is a function of the study and of the generation's candidates; answers and grades
come from their caches when it is worked out again. So a run that was killed in mid-generation comes
to the same end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from evomerge.answering.cache import MERGED
from evomerge.errors import EngineError
from evomerge.judging.cascade import CascadeJudge, Floats, completed, composed, settle
from evomerge.judging.grade import Grade
from evomerge.recipe import Recipe
from evomerge.searching.ahead import Begun
from evomerge.searching.examine import Examined, Examiner
from evomerge.searching.ledger import Ledger
from evomerge.searching.racing import BLOCK, blocks, hopeless, subset_size, task_order
from evomerge.searching.sampler import ReplayedCmaEs
from evomerge.searching.scoring import Scorer, task_levels
from evomerge.searching.verdict import metric_values
from evomerge.study import SUBSET, Study
from evomerge.tasks import Task


@dataclass
class Decided:
    """For candidates by their recipe's digest: how many blocks each answers, and grades that are
    known (cascade).
    """

    recipes: tuple[str, ...]
    blocks: dict[str, int] = field(default_factory=dict)
    grades: dict[str, dict[str, Grade]] = field(default_factory=dict)


class Rounds:
    """One generation at a time."""

    def __init__(
        self,
        study: Study,
        tasks: Sequence[Task],
        sampler: ReplayedCmaEs,
        ledger: Ledger,
        examiner: Examiner,
        scorer: Scorer,
    ) -> None:
        self.study, self.search_tasks, self.sampler = study, tuple(tasks), sampler
        self.ledger, self.examiner, self.scorer = ledger, examiner, scorer
        self.decided: Decided | None = None

    @property
    def together(self) -> bool:
        """Whether a generation's candidates are looked at side by side before their trials: in a
        race, and for the cascade judge.
        """
        return self.study.search.ranking == "race" or isinstance(self.examiner.judge, CascadeJudge)

    def tasks(self, generation: int) -> tuple[Task, ...]:
        """The search tasks that a generation is ranked on."""
        s = self.study.search
        if s.ranking == "all":
            return self.search_tasks
        # an open task is neither right nor wrong
        levels = task_levels(self.ledger.records(), self.study.metric)
        eligible = [
            task for task in self.search_tasks if str(task.task_id) in levels
        ] or self.search_tasks
        n = len(eligible)
        ratio = self.sampler.sigma(self.ledger.trials(), generation) / self.sampler.first_sigma
        size = subset_size(n, min(n, s.subset or SUBSET), ratio)
        return tuple(eligible[i] for i in task_order(s.seed, generation, n)[:size])

    def blocks(self, generation: int) -> list[tuple[Task, ...]]:
        """The same in the blocks that are answered one after another: more than one only in a race."""
        tasks = self.tasks(generation)
        if self.study.search.ranking != "race":
            return [tasks]
        return [tuple(tasks[i] for i in block) for block in blocks(len(tasks))]

    def prepare(self, generation: int, recipes: Sequence[Recipe], mode: str, label: str) -> None:
        """Work out what must be known about the whole generation: a race, or whom the llm judge is
        asked about.
        """
        judge, digests = self.examiner.judge, tuple(recipe.digest() for recipe in recipes)
        if self.decided is not None and self.decided.recipes == digests:
            return
        self.decided = Decided(digests)
        # of candidates that were replaced; their answers are kept
        self.examiner.ahead.begun.clear()
        if isinstance(judge, CascadeJudge):
            self._cascade(self.decided, judge, recipes, generation, mode, label)
        else:
            self._race(self.decided, recipes, self.blocks(generation), label)

    def of(self, generation: int, recipe: Recipe) -> list[tuple[Task, ...]]:
        """The blocks that a candidate answers."""
        every = self.blocks(generation)
        count = (
            len(every)
            if self.decided is None
            else self.decided.blocks.get(recipe.digest(), len(every))
        )
        return every[: max(1, count)]

    def grades(self, recipe: Recipe) -> Mapping[str, Grade] | None:
        """A candidate's grades, where they are known."""
        return None if self.decided is None else self.decided.grades.get(recipe.digest())

    def _race(
        self,
        decided: Decided,
        recipes: Sequence[Recipe],
        every: Sequence[Sequence[Task]],
        label: str,
    ) -> None:
        """Block by block; who cannot enter the better half any more stops (racing.hopeless)."""
        values = np.full((len(recipes), sum(map(len, every))), np.nan)
        out: set[int] = set()
        start = 0
        for number, block in enumerate(every, start=1):
            items = {i: (recipe, block, MERGED) for i, recipe in enumerate(recipes) if i not in out}
            begun: dict[int, Begun] = {}
            for i, item in items.items():
                try:
                    begun[i] = self.examiner.begun(
                        item, f"{label}, block {number}/{len(every)}, {len(items)} left"
                    )
                    self.examiner.ahead.keep(item, begun[i])
                except EngineError:
                    # its own turn, with the blocks up to this one, meets it again and records it
                    out.add(i)
                    decided.blocks[recipes[i].digest()] = number
            for i, b in begun.items():
                part = self.examiner.likelihood
                known = None if part is None else part.of(recipes[i], block)
                grades = self.scorer.by_task(
                    Examined(tuple(block), b.answers, b.wait(), {}, likelihoods=known)
                )
                found = metric_values(grades, self.study.metric)
                values[i, start : start + len(block)] = [
                    found.get(str(task.task_id), np.nan) for task in block
                ]
                decided.blocks[recipes[i].digest()] = number
            start += len(block)
            keep = max(1, self.sampler.population // 2)
            left = [i for i in begun if i not in out]
            stopped = (
                hopeless(values[left], keep, self.study.search.race_error, max(1, len(every) - 1))
                if number < len(every)
                else set()
            )
            out |= {left[i] for i in stopped}

    def _cascade(
        self,
        decided: Decided,
        judge: CascadeJudge,
        recipes: Sequence[Recipe],
        generation: int,
        mode: str,
        label: str,
    ) -> None:
        """All answer, the learned judge grades all, the llm judge block by block those who are
        undecided.
        """
        tasks = self.tasks(generation)
        part, answered, likelihoods = (
            self.examiner.likelihood,
            dict[int, Begun](),
            dict[int, list[float | None] | None](),
        )
        for i, recipe in enumerate(recipes):
            item = (recipe, tasks, mode)
            try:
                begun = self.examiner.begun(item, label, graded=False)
                self.examiner.ahead.keep(item, begun)
                likelihoods[i] = None if part is None else part.of(recipe, tasks)
                answered[i] = begun
            except EngineError:
                continue  # it fails again in its own turn, and is recorded then
        if not answered:
            return
        rows = list(answered)
        proxy = [
            [judge.proxy.grade(t, a) for t, a in zip(tasks, answered[i].answers, strict=True)]
            for i in rows
        ]
        expensive: list[list[Grade | None]] = [[None] * len(tasks) for _ in rows]

        def values(row: int) -> list[float]:
            """What the generation is ranked by, of the grades that are known: with an objective
            more than grades.
            """
            grades = [d or c for d, c in zip(expensive[row], proxy[row], strict=True)]
            examined = Examined(
                tasks, answered[rows[row]].answers, grades, {}, likelihoods=likelihoods[rows[row]]
            )
            found = metric_values(self.scorer.by_task(examined), self.study.metric)
            # a task that counts for nobody
            return [found.get(str(task.task_id), 0.0) for task in tasks]

        def ask(asked: list[int], chosen: list[int]) -> Floats:
            pending = {}
            for row in asked:
                answers = answered[rows[row]].answers
                pending[row] = judge.submit(
                    [tasks[t] for t in chosen], [answers[t] for t in chosen]
                )
            for row, waited in pending.items():
                for t, grade in zip(chosen, waited.result(), strict=True):
                    expensive[row][t] = grade
            return np.array([values(row) for row in asked])[:, chosen]

        # the same tasks for all: differences are paired
        order = task_order(self.study.search.seed, 0, len(tasks))
        looks = [[order[place] for place in places] for places in blocks(len(tasks), BLOCK // 2)]
        settle(
            np.array([values(row) for row in range(len(rows))]),
            ask,
            max(1, self.sampler.population // 2),
            judge.error,
            looks,
        )
        known = np.array(
            [[np.nan if grade is None else grade.value for grade in row] for row in expensive]
        )
        moved = completed(np.array([[grade.value for grade in row] for row in proxy]), known)
        for row, i in enumerate(rows):
            grades = composed(proxy[row], expensive[row], moved[row])
            decided.grades[recipes[i].digest()] = {
                str(t.task_id): g for t, g in zip(tasks, grades, strict=True)
            }
        self._remember_savings(generation, known.size, int((~np.isnan(known)).sum()))

    def _remember_savings(self, generation: int, graded: int, asked: int) -> None:
        """By generation, so that working it out again counts once."""
        known = self.ledger.facts.get("cascade_generations", {}) | {
            str(generation): [graded, asked]
        }
        self.ledger.remember("cascade_generations", known)
        self.ledger.remember(
            "cascade",
            {
                "graded": sum(g for g, _ in known.values()),
                "asked": sum(a for _, a in known.values()),
            },
        )
