"""What a study's verdict can show: its standard error, known before any work or after some."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from evomerge.searching.estimates import Z95
from evomerge.searching.generation.learning import FEW, shared_values
from evomerge.searching.records.trial_record import TrialRecord
from evomerge.study import Study

# Standard deviation, over tasks, of the difference between two models, while nothing is known: with
# right or wrong, a quarter of the tasks differ; the median of 108 models that three LLM judges
# graded from 1 to 5 on ELYZA-tasks-100 is 1.5; a score of lm-eval lies between 0 and 1.
EXPECTED = {"correct": 0.5, "grade": 1.5, "score": 0.5}


@dataclass(frozen=True)
class VerdictPower:
    """Of a paired difference between two models on `tasks` held-out tasks.

    `deviation` is the standard deviation of that difference over tasks; `measured` on references.
    """

    tasks: int
    deviation: float
    measured: bool

    @property
    def error(self) -> float:
        """The expected standard error of the mean difference, s / √n."""
        return self.deviation / math.sqrt(self.tasks)

    @property
    def smallest(self) -> float:
        """The smallest difference whose 95 % interval is expected not to hold 0."""
        return Z95 * self.error

    def sentence(self) -> str:
        """Both, in words."""
        known = "as models do"
        if self.measured:
            known = "as the parents and uniform weights differ"
        return (
            f"on {self.tasks} held-out tasks a difference has a standard error of about "
            f"{self.error:.2g}, {known}: below {self.smallest:.2g} it will not show"
        )


def verdict_power(
    held_out: int, metric: str, references: Sequence[TrialRecord] = (), scale: float = 1.0
) -> VerdictPower | None:
    """The power of a verdict on so many tasks; None where nothing is held out.

    `references` are complete trials that all answered the search tasks, from which the deviation is
    taken where there are two or more. `scale` multiplies the expected one otherwise.
    """
    if not held_out:
        return None
    values = shared_values(references, metric)
    if len(values) < 2 or len(references) < 2:
        return VerdictPower(held_out, scale * EXPECTED.get(metric, EXPECTED["grade"]), False)
    variances = []
    for one, other in combinations(range(len(references)), 2):
        differences = [row[one] - row[other] for row in values.values()]
        variances.append(np.var(differences, ddof=1))
    return VerdictPower(held_out, float(np.sqrt(np.mean(variances))), True)


def grade_scale(study: Study) -> float:
    """What an objective multiplies a grade by."""
    if study.metric == "objective":
        return abs(study.objective.grade)
    return 1.0


def advice(telling: int, answered: int, subset: int, population: int, trials: int) -> list[str]:
    """Sentences on settings that teach a search little; `subset` tasks rank a generation.

    `telling` of the `answered` search tasks tell the references apart; 0 of 0 is not known yet.
    """
    sentences = []
    if answered and telling < FEW:
        sentences.append(
            f"only {telling} of {answered} search tasks tell the parents and uniform weights "
            "apart: add tasks that are neither too easy nor too hard for them"
        )
    elif answered and subset < answered and subset * telling / answered < FEW:
        enough = min(answered, math.ceil(FEW * answered / telling))
        sentences.append(
            f"of the {subset} tasks of a generation about {subset * telling / answered:.0f} tell "
            f"models apart: set search.subset to {enough}"
        )
    if trials < 5 * population:
        sentences.append(
            f"{trials} candidates are fewer than five generations of {population}: set "
            f"search.trials to {5 * population} or more"
        )
    return sentences
