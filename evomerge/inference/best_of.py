"""Best of n: several answers to a task, of which a judge keeps one, or the answers themselves where
there is nothing to judge by.

Without a judge, or with the rules and no reference, it is minimum Bayes risk (Kumar and Byrne,
"Minimum Bayes-Risk Decoding for Statistical Machine Translation", 2004): the answer that is best
when each of the others in turn is held to be the reference.
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
SEED_STEP = 104_729  # far from any seed that somebody sets, and from those of the self-check


def samples(n: int, settings: GenerationSection) -> list[GenerationSection]:
    """Settings of n answers to one prompt: the first as configured, the others sampled, each with a
    seed of its own.
    """
    drawn = (
        settings
        if settings.do_sample
        else settings.replace(do_sample=True, temperature=TEMPERATURE, top_p=TOP_P)
    )
    return [
        settings,
        *(drawn.replace(seed=(settings.seed or 0) + SEED_STEP * i) for i in range(1, n)),
    ]


def choose(task: Task, answers: Sequence[Answer], judge: Judge | None = None) -> int:
    """The place of the best answer, the first of equals. An answer with a fault (selfcheck.py)
    loses to one that has none.

    A judge with references (learned, or the rules where the task has one) grades as it is; None,
    and the rules without a reference, are minimum Bayes risk. Raises what the judge raises:
    JudgeError, TaskError for a task that it does not know.
    """
    least = [seriousness(faults(answer, task.input)) for answer in answers]
    left = [i for i, serious in enumerate(least) if serious == min(least)]
    if len({answers[i].text for i in left}) == 1:
        return left[0]
    values = grade(task, [answers[i] for i in left], judge)
    return left[max(range(len(left)), key=lambda at: values[at])]  # max keeps the first of equals


def grade(task: Task, answers: Sequence[Answer], judge: Judge | None = None) -> list[float]:
    """What each answer is worth to `choose`, 1.0 to 5.0."""
    if judge is None or (isinstance(judge, RulesJudge) and not task.output.strip()):
        return agreement(task, answers)
    if isinstance(judge, BatchJudge):
        return [grade.value for grade in judge.grade_all([task] * len(answers), answers)]
    return [judge.grade(task, answer).value for answer in answers]


def agreement(task: Task, answers: Sequence[Answer]) -> list[float]:
    """Each answer's mean grade by the rules with the others as references: argmax is the minimum
    Bayes risk answer.

    n (n - 1) grades of 0.3 ms. An answer without a letter or digit is no reference; 3.0 where there
    is none.
    """
    rules = RulesJudge()
    references = [
        replace(task, output=answer.text, eval_aspect="") if re.search(r"\w", answer.text) else None
        for answer in answers
    ]
    values = []
    for i, answer in enumerate(answers):
        grades = [
            rules.grade(other, answer).value
            for j, other in enumerate(references)
            if j != i and other is not None
        ]
        values.append(fmean(grades) if grades else 3.0)
    return values


@dataclass(frozen=True)
class BestOf:
    """Answers every task n times, the first answer included, and keeps the best by `judge`."""

    n: int
    judge: Judge | None = None

    def __call__(self, run: Run, chosen: dict[int, Answer]) -> str:
        """As inference/run.py's Refining. Where the time was too short, the best of those that are
        there.

        Raises as `choose`; TaskError before anything is asked.
        """
        if self.judge is not None:
            check_tasks(self.judge, run.tasks)
        found = {i: [answer] for i, answer in chosen.items()}
        for place in range(1, self.n):
            asked = {
                i: replace(prompt, settings=samples(self.n, prompt.settings)[place])
                for i, prompt in enumerate(run.prompts)
            }
            for i, answer in run.ask(asked, f"sample {place}").items():
                found[i].append(answer)
        others = 0
        for i, answers in found.items():
            best = choose(run.tasks[i], answers, self.judge)
            others += best > 0
            chosen[i] = answers[best]
        by = "agreement" if self.judge is None else self.judge.name
        return f"best of {self.n} by {by}: another than the first answer to {others} of {len(chosen)} tasks"
