"""The tasks that each generation is ranked on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.searching.generation.informative import (
    inclusion_chances,
    spreads,
    systematic_sample,
)
from evomerge.searching.generation.racing import draw_offset, subset_size, task_order
from evomerge.searching.history import History
from evomerge.searching.ledger import Ledger
from evomerge.searching.prepare import Problem
from evomerge.searching.records.trial_record import TrialRecord, metric_values
from evomerge.study import SUBSET
from evomerge.tasks import Task

Before = tuple[int, tuple[TrialRecord, ...], tuple[TrialRecord, ...]]


@dataclass(frozen=True)
class DrawnTasks:
    """The tasks of a generation, in random order, drawn from `total`.

    `chances` are theirs to be drawn, by key; None: all had the same.
    """

    tasks: tuple[Task, ...]
    total: int
    chances: Mapping[str, float] | None = None

    def weights(self) -> np.ndarray:
        """What a value on each task counts, (n,): its mean chance over its own."""
        if self.chances is None:
            return np.ones(len(self.tasks))
        mean = len(self.tasks) / self.total
        return np.array([mean / self.chances[task.key] for task in self.tasks])


class TaskDraw:
    """Draws a generation's tasks: a function of the study and of the trials before it."""

    def __init__(self, problem: Problem, ledger: Ledger) -> None:
        self.study, self.sampler = problem.study, problem.sampler
        self.search_tasks, self.ledger = problem.split.search, ledger
        search = self.study.search
        self.informative = search.ranking != "all" and search.sampling == "informative"
        self._last: tuple[Before, DrawnTasks] | None = None

    def of(self, generation: int) -> DrawnTasks:
        """The tasks of a generation; those before it must be complete."""
        if self.study.search.ranking == "all":
            return DrawnTasks(self.search_tasks, len(self.search_tasks))
        history = self.ledger.history()
        told = history.index.in_order[: generation * self.sampler.population]
        before = generation, history.references, told
        if self._last is None or self._last[0] != before:
            self._last = before, self._draw(history, generation, told)
        return self._last[1]

    def _draw(self, history: History, generation: int, told: Sequence[TrialRecord]) -> DrawnTasks:
        search, metric = self.study.search, self.study.metric
        baselines = history.task_baselines(metric)
        # an open task, which is neither right nor wrong, has no baseline
        eligible = [task for task in self.search_tasks if task.key in baselines]
        if not eligible:
            eligible = list(self.search_tasks)
        n = len(eligible)
        ratio = self.sampler.sigma(history, generation) / self.sampler.start(history).sigma
        size = subset_size(n, min(n, search.subset or SUBSET), ratio)
        order = task_order(search.seed, generation, n)
        if self.informative and size < n:
            groups = [history.references]
            for start in range(0, len(told), self.sampler.population):
                groups.append(tuple(told[start : start + self.sampler.population]))
            graded = []
            for group in groups:
                graded.append([metric_values(trial.grades, metric) for trial in group])
            spread = spreads(graded, [task.key for task in eligible])
            if spread.any():
                chances = inclusion_chances(spread, size)
                drawn = systematic_sample(chances, order, draw_offset(search.seed, generation))
                known = {eligible[i].key: float(chances[i]) for i in drawn}
                return DrawnTasks(tuple(eligible[i] for i in drawn), n, known)
        return DrawnTasks(tuple(eligible[i] for i in order[:size]), n)
