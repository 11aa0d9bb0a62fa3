"""How far a search is, and when it ends: candidates, time, money, or convergence."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.console import duration, plus_minus, seconds
from evomerge.errors import EngineError, StudyFileError
from evomerge.judging.grade import Judge
from evomerge.searching.estimates import draw_variance
from evomerge.searching.history import History
from evomerge.searching.ledger import Ledger
from evomerge.searching.records.trial_record import TrialRecord, metric_values
from evomerge.searching.samplers.cma import CmaSampler
from evomerge.study import SearchSection, Study

MAX_ATTEMPTS = 3  # failures in one slot of a generation before the run stops
NOISE = 2.0  # standard errors that a generation's mean must gain to count as better


@dataclass(frozen=True)
class Spending:
    """What all runs of a study have cost; `money` is the judge's, in the currency of its prices."""

    seconds: float = 0.0
    money: float = 0.0


class StudyClock:
    """The time that a study has taken in all its runs."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._before, self._began = ledger.facts.elapsed, time.monotonic()

    def elapsed(self) -> float:
        """Seconds."""
        return self._before + time.monotonic() - self._began

    def remember(self) -> None:
        """Record the time so far."""
        self.ledger.remember("elapsed", round(self.elapsed(), 3))


def why_stop(
    study: Study, sampler: CmaSampler, ledger: Ledger, clock: StudyClock, judge: Judge | None
) -> str | None:
    """The reason to start no further candidate, in words; None: continue.

    Convergence is checked between generations only.
    """
    s, history = study.search, ledger.history()
    spending = Spending(clock.elapsed(), float(getattr(judge, "cost", 0.0)))
    reason = why_limited(s, len(history.candidates), spending)
    if reason is not None or (s.min_sigma is None and s.patience is None):
        return reason
    complete = history.complete_generations(sampler.population)
    if not complete or sampler.next_slot(history).index:
        return None
    generations = [history.generation(number) for number in range(complete)]
    sigma = sampler.sigma(history, complete)
    return why_converged(s, generations, sigma, history.task_baselines(study.metric), study.metric)


def why_limited(s: SearchSection, candidates: int, spending: Spending) -> str | None:
    """The limit of candidates, time or money that is reached."""
    if candidates > s.trials:
        return f"{candidates} candidates are done, more than the {s.trials} asked for"
    if candidates == s.trials:
        return f"all {s.trials} candidates are done"
    limit = None if s.time_limit is None else seconds(s.time_limit)
    after = f"after {candidates} of {s.trials} candidates"
    if limit is not None and spending.seconds >= limit:
        taken = duration(spending.seconds)
        return f"the time limit of {s.time_limit} is reached {after} ({taken})"
    money = spending.money + spending.seconds / 3600 * s.hourly_price
    if s.max_cost is not None and money >= s.max_cost:
        return f"{money:.2f} of {s.max_cost:g} are spent {after}"
    return None


def why_converged(
    s: SearchSection,
    generations: Sequence[Sequence[TrialRecord]],
    sigma: float,
    task_baselines: Mapping[str, float],
    metric: str,
) -> str | None:
    """The sign of convergence, from the complete generations and the next step size.

    `task_baselines` are the tasks' mean values by the references.
    """
    if s.min_sigma is not None and sigma < s.min_sigma:
        return f"converged: the step size is {sigma:.3g}, below {s.min_sigma:g}"
    if s.patience is None or len(generations) <= s.patience:
        return None
    if _gained(generations, s.patience, task_baselines, metric):
        return None
    return f"converged: no gain beyond noise in {s.patience} generations"


def _gained(
    generations: Sequence[Sequence[TrialRecord]],
    patience: int,
    task_baselines: Mapping[str, float],
    metric: str,
) -> bool:
    """Whether a late generation is better than the best before by more than NOISE standard errors.

    A generation's variance is that of its candidates' scores over their number, and where it
    answered n of the N tasks that of the tasks it happened to get, s_d² (1/n - 1/N), s_d² the
    variance of grade - baseline: tasks that all candidates answer add no noise.
    """
    means = []
    for generation in generations:
        means.append(float(np.mean([r.score for r in generation])))
    before = int(np.argmax(means[:-patience]))
    best = _error(generations[before], task_baselines, metric)
    for mean, generation in zip(means[-patience:], generations[-patience:], strict=True):
        error = _error(generation, task_baselines, metric)
        if mean - means[before] > NOISE * float(np.hypot(error, best)):
            return True
    return False


def _error(
    generation: Sequence[TrialRecord], task_baselines: Mapping[str, float], metric: str
) -> float:
    scores = np.array([r.score for r in generation], dtype=float)
    scatter = 0.0
    if len(scores) > 1:
        scatter = float(scores.var(ddof=1)) / len(scores)
    drawn = []
    for r in generation:
        if r.draw_variance is not None:
            drawn.append(r.draw_variance)
            continue
        values = metric_values(r.grades, metric)  # of an older study, or of all search tasks
        above = np.array([values[t] - task_baselines[t] for t in values if t in task_baselines])
        drawn.append(draw_variance(above, len(task_baselines)))
    return float(np.sqrt(scatter + np.mean(drawn)))


def check_attempts(failures: int, history: History) -> None:
    """Raise EngineError where so many candidates have failed in one slot of a generation."""
    if failures >= MAX_ATTEMPTS:
        raise EngineError(
            f"{failures} candidates in a row failed: {history.last_failure()}",
            remedy="Fix the cause and run the same command again.",
        )


def check_searched(history: History, reason: str) -> None:
    """Raise StudyFileError for a search that ends, for this reason, before its first candidate."""
    if not history.candidates:
        raise StudyFileError(
            f"the search ended before its first candidate: {reason}",
            where="search",
            remedy="Raise the limit.",
        )


def progress_line(study: Study, history: History, label: str) -> str:
    """A line about the trial that has just ended, and the time that the rest will take."""
    paces = [sum(trial.seconds.values()) for trial in history.complete[-20:]]
    left = study.search.trials - len(history.candidates) + 5  # the mean and the verdict
    last, best = history.complete[-1], history.index.best
    assert best is not None
    assert best.score is not None
    return (
        f"{label}  {last.score:.3f} in {paces[-1]:.1f} s  "
        f"best {plus_minus(best.score, best.stderr)} (trial {best.number})  "
        f"ETA {duration(left * float(np.mean(paces)))}"
    )
