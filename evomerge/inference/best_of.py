"""Best of n: of several answers to a task one is kept, by a judge or by their agreement.

Without a judge, or with the rules and no reference, it is minimum Bayes risk (Kumar and Byrne,
"Minimum Bayes-Risk Decoding for Statistical Machine Translation", 2004): the answer that is best
when each of the others in turn is taken as the reference.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

from evomerge.inference.selfcheck import faults, seriousness
from evomerge.judging.factory import check_tasks
from evomerge.judging.grade import BatchJudge
from evomerge.judging.rules.judge import RulesJudge

if TYPE_CHECKING:
    from evomerge.answering.engine import Answer
    from evomerge.inference.run import Run
    from evomerge.judging.grade import Judge
    from evomerge.study import GenerationSection
    from evomerge.tasks import Task

TEMPERATURE, TOP_P = 0.7, 0.95
# far from any seed that a user sets, and from the seeds of the self-check
SEED_STEP = 104_729
NO_REFERENCE = 3.0  # the value of an answer that nothing can be compared with


def sample_settings(n: int, settings: GenerationSection) -> list[GenerationSection]:
    """Settings of n answers to one prompt: the first as configured, the others sampled.

    Each sampled one has its own seed.
    """
    drawn = settings
    if not settings.do_sample:
        drawn = settings.replace(do_sample=True, temperature=TEMPERATURE, top_p=TOP_P)
    seed = settings.seed or 0
    seeds = [(seed + SEED_STEP * i) % 2**32 for i in range(1, n)]
    return [settings, *(drawn.replace(seed=other) for other in seeds)]


def best_answer(task: Task, answers: Sequence[Answer], judge: Judge | None = None) -> int:
    """The index of the best answer, the first of equals.

    An answer with a fault (selfcheck.py) loses to one that has none. A judge with references
    (learned, or the rules where the task has one) grades the answers; None, and the rules without a
    reference, mean minimum Bayes risk. Raises what the judge raises: JudgeError, and TaskError for
    a task that it does not know.
    """
    least = [seriousness(faults(answer, task.input)) for answer in answers]
    left = [i for i, serious in enumerate(least) if serious == min(least)]
    if len({answers[i].text for i in left}) == 1:
        return left[0]
    values = grade_answers(task, [answers[i] for i in left], judge)
    return left[values.index(max(values))]


def grade_answers(task: Task, answers: Sequence[Answer], judge: Judge | None = None) -> list[float]:
    """The value of each answer for `best_answer`, 1.0 to 5.0."""
    if judge is None or (isinstance(judge, RulesJudge) and not task.output.strip()):
        return mutual_grades(task, answers)
    if isinstance(judge, BatchJudge):
        return [grade.value for grade in judge.grade_all([task] * len(answers), answers)]
    return [judge.grade(task, answer).value for answer in answers]


def mutual_grades(task: Task, answers: Sequence[Answer]) -> list[float]:
    """Each answer's mean grade by the rules with the others as references.

    The highest is the minimum Bayes risk answer. This takes n (n - 1) grades of 0.3 ms. An answer
    without a letter or digit is not used as a reference; 3.0 where there is none.
    """
    rules = RulesJudge()
    references: dict[int, Task] = {}
    for i, answer in enumerate(answers):
        if re.search(r"\w", answer.text):
            references[i] = replace(task, output=answer.text, eval_aspect="")
    values = []
    for i, answer in enumerate(answers):
        grades = []
        for j, reference in references.items():
            if j != i:
                grades.append(rules.grade(reference, answer).value)
        if grades:
            values.append(fmean(grades))
        else:
            values.append(NO_REFERENCE)
    return values


@dataclass(frozen=True)
class BestOf:
    """Answers every task n times, the first answer included, and keeps the best by `judge`."""

    n: int
    judge: Judge | None = None

    def __call__(self, run: Run, chosen: dict[int, Answer]) -> str:
        """See Refining in run.py. When the time is up, the best of what exists is kept.

        Raises as `best_answer`; a TaskError comes before anything is asked.
        """
        if self.judge is not None:
            check_tasks(self.judge, run.tasks)
        found = {i: [answer] for i, answer in chosen.items()}
        for round_number in range(1, self.n):
            asked = {}
            for i in chosen:
                prompt = run.prompts[i]
                settings = sample_settings(self.n, prompt.settings)[round_number]
                asked[i] = replace(prompt, settings=settings)
            for i, answer in run.ask(asked, f"sample {round_number}").items():
                found[i].append(answer)
        changed = 0
        for i, answers in found.items():
            best = best_answer(run.tasks[i], answers, self.judge)
            changed += best > 0
            chosen[i] = answers[best]
        by = "agreement"
        if self.judge is not None:
            by = self.judge.name
        count = f"{changed} of {len(chosen)} tasks"
        return f"best of {self.n} by {by}: replaced the first answer to {count}"
