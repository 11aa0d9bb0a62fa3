"""A study's figures in words: the page's headline and remarks, and notes on the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evomerge.console import counted
from evomerge.searching.records.verdict_record import FOUND

if TYPE_CHECKING:
    from evomerge.searching.records.study_facts import StudyFacts
    from evomerge.searching.records.trial_record import TrialRecord
    from evomerge.searching.records.verdict_record import Verdict

METRICS = {
    "grade": "mean grade, 1 to 5",
    "correct": "share of answers that are right",
    "score": "weighted mean of lm-eval's metrics",
    "objective": "weighted sum of the objective's parts",
}
HEADLINES = {
    "correct": "The winner answers a share of {figure} of the {n} held-out tasks correctly.",
    "objective": "The winner reaches an objective of {figure} on the {n} held-out tasks.",
    "score": "The winner has a score of {figure} on the {n} held-out documents.",
    "grade": "The winner has a mean grade of {figure} on the {n} held-out tasks.",
}
MINUS, NONE = "−", "–"


@dataclass(frozen=True)
class Remark:
    """One sentence; `kind` is better, worse or open (no difference is shown)."""

    kind: str
    text: str


def number(value: float | None, digits: int = 3) -> str:
    """A figure with a true minus sign; an en dash where there is none."""
    return _formatted(value, f".{digits}f")


def signed(value: float | None, digits: int = 3) -> str:
    """The same, with its sign always shown."""
    return _formatted(value, f"+.{digits}f")


def with_error(value: float | None, error: float | None, sign: bool = False) -> str:
    """A figure and its standard error; a single value has none."""
    text = signed(value) if sign else number(value)
    if value is not None and error is None:
        return f"{text} (n = 1)"
    return f"{text} ± {number(error)}"


def share(value: float | None) -> str:
    """A share as a percentage."""
    return NONE if value is None else f"{100 * value:.1f} %"


def model_title(name: str) -> str:
    """The verdict's name of a candidate, in words."""
    if name == "uniform":
        return "best uniform weight"
    if name == FOUND:
        return "search's own merge"
    return name.removeprefix("sibling:")


def short_title(name: str) -> str:
    """The same for a column of a terminal: "uniform", "own merge"."""
    if name == FOUND:
        return "own merge"
    return name.removeprefix("sibling:")


def with_article(name: str) -> str:
    """The same within a sentence: "base", but "the best uniform weight"."""
    title = model_title(name)
    return f"the {title}" if name in ("uniform", FOUND) else title


def listed(names: Sequence[str]) -> str:
    """Names in words: "a", "a and b", "a, b and c"."""
    *others, last = map(with_article, names)
    return f"{', '.join(others)} and {last}" if others else last


def unbeaten_title(name: str) -> str:
    """`Verdict.unbeaten` in words: "instruct", "the uniform weight 0.5"."""
    kind, _, weight = name.partition(" ")
    if kind == "uniform":
        return f"the uniform weight {weight}".strip()
    return model_title(name)


def unbeaten_sentence(name: str) -> str:
    """That a reference has won, in plain words."""
    other = " other" if name.startswith("uniform") else ""  # which is a merge itself
    title = unbeaten_title(name)
    return f"No{other} merge was found that beats {title} by more than chance, so {title} wins."


def conclusion(verdict: Verdict) -> str:
    """What the verdict comes to, in plain words, for people who read one sentence."""
    if verdict.unbeaten is not None:
        return unbeaten_sentence(verdict.unbeaten)
    beaten, open_, ahead = [], [], []
    for name, pair in verdict.leads.items():
        if pair.low is not None and pair.low > 0:
            beaten.append(name)
        elif pair.high is not None and pair.high < 0:
            ahead.append(name)
        else:
            open_.append(name)
    said = []
    if beaten:
        said.append(f"beats {listed(beaten)}")
    if open_:
        said.append(f"is not shown to differ from {listed(open_)}")
    if ahead:
        said.append(f"is worse than {listed(ahead)}")
    if not said:
        return "The winner is compared with nothing."
    return f"On the held-out tasks the winner {'; it '.join(said)}."


def headline(
    verdict: Verdict | None, trials: Sequence[TrialRecord], winner: TrialRecord | None
) -> str:
    """The first sentence: the winner on the held-out tasks, or how far the search has come."""
    if verdict is not None:
        mean = verdict.candidates["winner"]
        figure = with_error(mean.mean, mean.stderr).replace(" ", "\u00a0")
        sentence = HEADLINES.get(verdict.metric, HEADLINES["grade"])
        said = sentence.format(figure=figure, n=verdict.n)
        if verdict.unbeaten is None:
            return said
        return f"{conclusion(verdict)} {said}"
    done = sum(t.state == "complete" for t in trials)
    text = f"The search is not finished: {done} trials are complete, and there is no verdict yet."
    if winner is not None and winner.score is not None:
        figure = with_error(winner.score, winner.stderr)
        if winner.stderr is not None:
            figure += f" (n = {winner.n})"
        text += f" Best on the search tasks so far: trial {winner.number}, {figure}."
    return text


def remarks(verdict: Verdict | None) -> list[Remark]:
    """One sentence per paired difference, which tells when the interval includes zero."""
    if verdict is None:
        return []
    found = []
    for candidate, pair in verdict.leads.items():
        name = with_article(candidate)
        interval = f"{signed(pair.low)} to {signed(pair.high)}"
        figures = f"{signed(pair.diff)}, 95 % interval {interval}, n = {verdict.n}"
        if pair.low is None or pair.high is None:
            text = f"One task tells nothing about the difference from {name}: {signed(pair.diff)}."
            found.append(Remark("open", text))
        elif pair.low > 0:
            found.append(Remark("better", f"Better than {name}: {figures}."))
        elif pair.high < 0:
            found.append(Remark("worse", f"Worse than {name}: {figures}."))
        else:
            text = f"No difference from {name} is shown: {figures}, which includes zero."
            found.append(Remark("open", text))
    return found


def notes(facts: StudyFacts) -> list[str]:
    """What a reader of the verdict must know besides its figures, one sentence each."""
    lines = []
    look = facts.look
    if facts.stopped:
        lines.append(f"The search ended because {facts.stopped.removeprefix('converged: ')}.")
    chosen = facts.validation
    if chosen is not None:
        tasks = counted(chosen.n, "validation task")
        lines.append(
            f"The winner was chosen among {len(chosen.means)} finalists on {tasks}, which ranked "
            "no generation."
        )
        if facts.references_win:
            lines.append(
                "The search's mean and the references were also compared on the search tasks."
            )
        if look == 1:
            lines.append("The held-out tasks played no part in the choice.")
    if FOUND in facts.compared:
        own = facts.compared[FOUND]
        lines.append(f"The search's own merge is trial {own}, its mean or its best candidate.")
    if look > 1:
        lines.append(
            f"The held-out tasks have now been used {look} times: the search was resumed after a "
            "verdict, so the intervals are too narrow."
        )
    if facts.verdict is not None:
        lines += token_notes(facts.verdict)
    saved = facts.cascade
    if saved is not None and saved.graded:
        lines.append(
            f"The cascade judge had the language model grade {saved.asked:,} of "
            f"{saved.graded:,} candidate answers ({saved.asked / saved.graded:.0%})."
        )
    return lines


def token_notes(verdict: Verdict) -> list[str]:
    """How many tokens the models think and answer with; nothing where they do not think."""
    figures = []
    for name, c in verdict.candidates.items():
        if c.thought_tokens is not None and c.answer_tokens is not None:
            counts = f"{c.thought_tokens:,.0f} and {c.answer_tokens:,.0f}"
            figures.append(f"{model_title(name)} {counts}")
    if not figures:
        return []
    return [f"Tokens of thoughts and of the answer, per held-out task: {', '.join(figures)}."]


def _formatted(value: float | None, spec: str) -> str:
    if value is None:
        return NONE
    return format(value, spec).replace("-", MINUS)
