"""What the warm start climbs without references: minus the divergence from the better parents.

Each parent has answered every search task by then, as a reference. The parent whose answer to a
task has the better grade teaches it: its next-token distributions over its own answer are the
target, and KL(parent || merge) is lowered, the mean per token (Hinton et al. 2015, arXiv
1503.02531, on the teacher's texts as in Kim & Rush 2016, arXiv 1606.07947).

Nothing of it is stored: answers are in their cache, grades in the trials, and the distributions are
computed again when a run resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from evomerge.answering.engine import Answer, Engine, LikelihoodGradient, NextTokens, items_at
from evomerge.answering.prompts import Prompter
from evomerge.genome.genome import Genome
from evomerge.recipe import Recipe
from evomerge.searching.records.trial_record import TaskGrade, TrialRecord
from evomerge.tasks import Task

# a recipe's answers to some tasks
Answering = Callable[[Recipe, Sequence[Task]], Sequence[Answer]]


@dataclass(frozen=True)
class Lessons:
    """Called with a vector and which tasks: minus the mean divergence, and its gradient.

    Raises EngineError, StudyFileError as the engine's gradient.
    """

    engine: Engine
    genome: Genome
    tasks: Sequence[Task]
    prompter: Prompter
    parents: Sequence[TrialRecord]  # complete
    metric: str  # a grade's value to compare them by
    answers: Answering

    def __call__(self, vector: list[float], chosen: list[int]) -> LikelihoodGradient:
        """See the class. The distributions of all tasks are computed when it is called first."""
        assert self.engine.gradient is not None
        pairs, teachers = self._learnt
        return self.engine.gradient(
            self.genome, vector, items_at(pairs, chosen), items_at(teachers, chosen)
        )

    @cached_property
    def _learnt(self) -> tuple[list[tuple[str, str]], list[NextTokens]]:
        """Each task's prompt and answer, and the distributions of the one who gave it."""
        gradient = self.engine.gradient
        assert gradient is not None
        chosen = better_parents(self.tasks, self.parents, self.metric)
        pairs: dict[int, tuple[str, str]] = {}
        teachers: dict[int, NextTokens] = {}
        for number, parent in enumerate(self.parents):
            taught = [i for i, teacher in enumerate(chosen) if teacher == number]
            if not taught:
                continue
            recipe = self.genome.decode(parent.weights)
            answers = self.answers(recipe, self.tasks)  # all of them: as they are kept
            own = [(self.prompter.render(self.tasks[i].input), answers[i].whole) for i in taught]
            pairs.update(zip(taught, own, strict=True))
            teachers.update(zip(taught, gradient.teachers(recipe, own), strict=True))
        count = range(len(self.tasks))
        return [pairs[i] for i in count], [teachers[i] for i in count]


def better_parents(tasks: Sequence[Task], parents: Sequence[TrialRecord], metric: str) -> list[int]:
    """Which parent teaches each task: the one with the better value.

    Of equal ones it is the one with the better grade, which knows partial credit; then the one
    with the higher score; then the later one, a sibling before the base.
    """
    chosen = []
    for task in tasks:
        merits = []
        for number, parent in enumerate(parents):
            value, credit = (
                _value(parent.grades, task, metric),
                _value(parent.grades, task, "grade"),
            )
            merits.append((value, credit, parent.score or 0.0, number))
        chosen.append(max(merits)[-1])
    return chosen


def _value(grades: Mapping[str, TaskGrade], task: Task, metric: str) -> float:
    """A grade's value by a metric, below all others where it has none."""
    value = grades[task.key].value(metric)
    return float("-inf") if value is None else value
