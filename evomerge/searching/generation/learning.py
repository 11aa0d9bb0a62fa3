"""Signs in the grades that a search has nothing to learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evomerge.console import Console
from evomerge.searching.records.trial_record import TrialRecord, metric_values

CUT = 0.95  # share of answers; the rest may have ended by chance
FEW = 8  # tasks that tell trials apart, below which their order is mostly luck


class LearningWarnings:
    """Says once in a run what keeps a search from learning."""

    def __init__(self, metric: str, console: Console) -> None:
        """`metric`: what is maximised."""
        self.metric, self.console = metric, console
        self.said: set[str] = set()

    def about(self, trials: Sequence[TrialRecord], who: str) -> dict[str, str]:
        """Say, and return, what is new about these complete trials."""
        found = nothing_to_learn(trials, self.metric, who)
        new = {}
        for sign, sentence in found.items():
            if sign not in self.said:
                self.console.say(f"warning: {sentence}")
                new[sign] = sentence
        self.said |= new.keys()
        return new

    def about_references(self, trials: Sequence[TrialRecord]) -> None:
        """The same of the parents and uniform weights, and whether the tasks tell them apart."""
        telling, answered = telling_tasks(trials, self.metric)
        if not self.about(trials, "the parents and uniform weights") and answered:
            few = "warning: only " if telling < min(FEW, answered) else ""
            tell = "search tasks tell the parents and uniform weights apart"
            self.console.say(f"{few}{telling} of {answered} {tell}")


def telling_tasks(trials: Sequence[TrialRecord], metric: str) -> tuple[int, int]:
    """How many tasks tell the trials apart, and how many they all answered."""
    values = shared_values(trials, metric)
    telling = 0
    for row in values.values():
        telling += len(set(row)) > 1
    return telling, len(values)


def shared_values(trials: Sequence[TrialRecord], metric: str) -> Mapping[str, list[float]]:
    """Task -> the value of each trial, of the tasks that all of them have a value for."""
    graded = [metric_values(trial.grades, metric) for trial in trials]
    if not graded:
        return {}
    shared = set(graded[0]).intersection(*graded[1:])
    values = {}
    for task in graded[0]:
        if task in shared:
            values[task] = [grades[task] for grades in graded]
    return values


def nothing_to_learn(trials: Sequence[TrialRecord], metric: str, who: str) -> dict[str, str]:
    """Why these complete trials, `who`, teach a search nothing: sign -> sentence with a remedy."""
    if len(trials) < 2:
        return {}
    found = {}
    truncated = sum(trial.truncated for trial in trials) / len(trials)
    if truncated >= CUT:
        found["cut"] = (
            f"{truncated:.0%} of the answers of {who} were cut off: grades of unfinished answers "
            "say little. Raise generation.max_new_tokens, or check the prompt's format and the "
            "model's end token."
        )
    by_task = [metric_values(trial.grades, metric) for trial in trials]
    values: set[float] = set()
    for grades in by_task:
        values.update(grades.values())
    if len(values) == 1 and any(len(grades) > 1 for grades in by_task):
        found["constant"] = (
            f"every answer of {who} has the same grade, {values.pop():g}: nothing can be learned "
            "from it. Use another judge, or tasks that are neither too easy nor too hard."
        )
    elif len({trial.score for trial in trials}) == 1:
        found["equal"] = (
            f"{who} all have the same score, {trials[0].score:g}: nothing can be learned from "
            "them. Use more tasks, a metric with partial credit, or a larger search.sigma."
        )
    return found
