"""A generation graded by the cascade judge: which answers its expensive judge grades."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from evomerge.errors import EngineError
from evomerge.judging.cascade import CascadeJudge, Floats, completed, composed, settle
from evomerge.judging.grade import Grade
from evomerge.recipe import Recipe
from evomerge.searching.evaluate import Evaluation, JudgedEvaluator
from evomerge.searching.generation.racing import BLOCK, blocks, task_order
from evomerge.searching.generation.task_draw import DrawnTasks
from evomerge.searching.records.study_facts import CascadeSavings
from evomerge.searching.scoring import Scorer
from evomerge.study import Study
from evomerge.tasks import Task


@dataclass
class CascadeRow:
    """One candidate of the generation: answers and grades in the tasks' order."""

    recipe: Recipe
    evaluation: Evaluation  # with the learned judge's grades
    expensive: list[Grade | None] = field(default_factory=list)  # the llm judge's


@dataclass(frozen=True)
class CascadeOutcome:
    """The candidates' grades by recipe digest and task key, and how many the llm judge gave."""

    grades: Mapping[str, Mapping[str, Grade]]
    savings: CascadeSavings


@dataclass
class CascadeRound:
    """All candidates answer, the learned judge grades all, and the llm judge the undecided ones.

    It grades, block by block, the candidates that may or may not be in the better half.
    """

    judge: CascadeJudge
    study: Study
    evaluator: JudgedEvaluator
    scorer: Scorer

    def run(
        self, recipes: Sequence[Recipe], drawn: DrawnTasks, keep: int, mode: str, label: str
    ) -> CascadeOutcome | None:
        """The outcome of a generation; None when no candidate could answer. Raises JudgeError.

        The tasks are graded in the same blocks for all candidates, because differences are paired.
        """
        tasks, weights = drawn.tasks, drawn.weights()
        rows = self._answered(recipes, tasks, mode, label)
        if not rows:
            return None
        order = task_order(self.study.search.seed, 0, len(tasks))
        looks = []
        for block in blocks(len(tasks), BLOCK // 2):
            looks.append(order[block.start : block.stop])

        def ask(asked: list[int], chosen: list[int]) -> Floats:
            values: Floats = self._ask([rows[row] for row in asked], chosen) * weights[chosen]
            return values

        settle(self._values(rows) * weights, ask, keep, self.judge.error, looks)
        return self._outcome(rows)

    def _answered(
        self, recipes: Sequence[Recipe], tasks: tuple[Task, ...], mode: str, label: str
    ) -> list[CascadeRow]:
        """The candidates that answer; the others fail again in their own turn, and are recorded."""
        rows = []
        for recipe in recipes:
            item = (recipe, tasks, mode)
            try:
                pending = self.evaluator.take_or_begin(item, label, graded=False)
                self.evaluator.prefetcher.keep(item, pending)
                likelihoods = self.evaluator.likelihoods(recipe, tasks)
            except EngineError:
                continue
            answers, grades = pending.answers, []
            for task, answer in zip(tasks, answers, strict=True):
                grades.append(self.judge.proxy.grade(task, answer))
            evaluation = Evaluation(tasks, answers, grades, {}, likelihoods=likelihoods)
            rows.append(CascadeRow(recipe, evaluation, [None] * len(tasks)))
        return rows

    def _values(self, rows: Sequence[CascadeRow]) -> Floats:
        """What the generation is ranked by, of the grades that are known so far: [rows, tasks]."""
        values = []
        for row in rows:
            grades = list(row.evaluation.grades)
            for t, grade in enumerate(row.expensive):
                grades[t] = grade or grades[t]
            known = replace(row.evaluation, grades=grades)
            values.append(self.scorer.task_values(known, missing=0.0))
        return np.array(values)

    def _ask(self, rows: Sequence[CascadeRow], chosen: Sequence[int]) -> Floats:
        """The llm judge's view of some rows on some tasks: [rows, tasks] of what is ranked by."""
        pending = []
        for row in rows:
            tasks = [row.evaluation.tasks[t] for t in chosen]
            answers = [row.evaluation.answers[t] for t in chosen]
            pending.append(self.judge.submit(tasks, answers))
        for row, waited in zip(rows, pending, strict=True):
            for t, grade in zip(chosen, waited.result(), strict=True):
                row.expensive[t] = grade
        return self._values(rows)[:, chosen]

    def _outcome(self, rows: Sequence[CascadeRow]) -> CascadeOutcome:
        """The rows' grades: the llm judge's, and the learned one's moved to its level."""
        proxy = np.empty((len(rows), len(rows[0].expensive)))
        known = np.full(proxy.shape, np.nan)
        for i, row in enumerate(rows):
            proxy[i] = [grade.value for grade in row.evaluation.grades]
            for t, grade in enumerate(row.expensive):
                if grade is not None:
                    known[i, t] = grade.value
        moved = completed(proxy, known)
        by_recipe = {}
        for i, row in enumerate(rows):
            grades = composed(row.evaluation.grades, row.expensive, moved[i])
            keys = [task.key for task in row.evaluation.tasks]
            by_recipe[row.recipe.digest()] = dict(zip(keys, grades, strict=True))
        asked = int((~np.isnan(known)).sum())
        return CascadeOutcome(by_recipe, CascadeSavings(known.size, asked))
