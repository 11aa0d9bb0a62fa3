"""Several objectives: CMA-ES distributions of different weights that share their candidates.

Each distribution ranks a generation by a weighted sum of the objectives, in units of their spread
within the generation, and its mean becomes a point of the front. The candidates are drawn from the
distributions in turn, and every distribution is told all of them: those of another one no further
from its mean than CMA-ES could have drawn them (injection, Hansen 2011, arXiv 1110.4181). A front
of k points therefore costs hardly more candidates than a single one. docs/SEARCH.md compares it
with NSGA-II and expected hypervolume improvement.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from cmaes import CMA

from evomerge.searching.history import History
from evomerge.searching.records.trial_record import TrialRecord
from evomerge.searching.samplers.cma import CmaSampler, within_reach
from evomerge.searching.samplers.cmaes_adapter import state

# objectives -> steps from 0 to 1 of their weights: 5, 6 and 10 distributions
STEPS = {2: 4, 3: 2, 4: 2}


class ParetoSampler(CmaSampler):
    """As `CmaSampler`, of several distributions."""

    def __init__(self, signs: Mapping[str, float], **settings: Any) -> None:
        """`signs`: objective -> 1 to maximize it, -1 to minimize it; `settings` of CmaSampler."""
        super().__init__(**settings)
        self.signs = dict(signs)
        self.weights = simplex(len(signs))
        self.distributions = len(self.weights)

    def _tell(
        self, optimizers: Sequence[CMA], history: History, generations: Iterable[int]
    ) -> None:
        known = self.known(history)
        for generation in generations:
            trials = self.ranked(history, generation)
            values = standardized(trials, self.signs)
            for turn, optimizer in enumerate(optimizers):
                reach, told = state(optimizer), []
                for trial, value in zip(trials, values @ self.weights[turn], strict=True):
                    assert trial.index is not None
                    if self.turn(generation, trial.index) == turn:
                        x = self._told(optimizer, known, trial)
                    else:
                        x = within_reach(np.array(trial.vector), reach, self.bounds)
                    told.append((x, -float(value)))
                optimizer.tell(told)


def simplex(objectives: int) -> np.ndarray:
    """(k, objectives) weights that add up to 1, evenly spread (Das and Dennis 1998).

    The first is all of the first objective, the last all of the last.
    """
    steps = STEPS[objectives]
    rows = []
    for chosen in combinations_with_replacement(range(objectives), steps):
        rows.append(np.bincount(chosen, minlength=objectives) / steps)
    return np.array(rows)


def standardized(trials: Sequence[TrialRecord], signs: Mapping[str, float]) -> np.ndarray:
    """(trials, objectives): more is better, in standard deviations over the trials.

    An objective that a trial does not know, as its tasks say nothing of it, is 0 for all.
    """
    columns = []
    for name, sign in signs.items():
        column = np.zeros(len(trials))
        if all(name in trial.parts for trial in trials):
            column = sign * np.array([trial.parts[name] for trial in trials])
        spread = float(column.std())
        columns.append(column / spread if spread > 0 else np.zeros(len(trials)))
    return np.array(columns).T
