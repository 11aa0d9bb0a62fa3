"""Signs in the grades that a search has nothing to learn from."""

from __future__ import annotations

from collections.abc import Sequence

from evomerge.searching.records.trial_record import TrialRecord, metric_values

CUT = 0.95  # share of answers; the rest may have ended by chance


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
    values = {value for grades in by_task for value in grades.values()}
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
