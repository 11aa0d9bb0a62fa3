"""The verdict, and the held-out answers that are stored for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from evomerge.searching.records.front_record import Front
from evomerge.searching.records.trial_record import known_error

LEAD = "winner-"  # begins the keys of `Verdict.paired`
FOUND = "found"  # names the search's own merge where a reference has won


@dataclass(frozen=True)
class HeldOutScore:
    """One candidate on the held-out tasks; `truncated` is a share of its answers.

    Of a model that thinks, an answer has `thought_tokens` and then `answer_tokens` on average.
    """

    mean: float
    stderr: float | None  # None: there is a single value
    truncated: float
    thought_tokens: float | None = None
    answer_tokens: float | None = None


@dataclass(frozen=True)
class PairedDifference:
    """The winner minus another candidate, paired by task, with its 95 % interval.

    There is no interval of a single task: `low` and `high` are None.
    """

    diff: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Verdict:
    """The winner compared with its parents and the best uniform weight.

    `candidates` are by name, "winner" among them; `paired` by "winner-NAME". `n` counts the
    held-out tasks that have a value. `unbeaten` names the reference that won because no merge was
    found that beats it: base, instruct or uniform 0.5, for example; it has no difference from
    itself, and "found" is then the merge that the search arrived at. With several objectives the
    winner is the compromise on the `front`, which is None with one.
    """

    metric: str
    n: int
    candidates: Mapping[str, HeldOutScore]
    paired: Mapping[str, PairedDifference]
    unbeaten: str | None = None
    front: Front | None = None

    @property
    def leads(self) -> dict[str, PairedDifference]:
        """The winner's lead over each other candidate, by its name."""
        return {key.removeprefix(LEAD): pair for key, pair in self.paired.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts: the stored form, and what verdict.json holds."""
        data = asdict(self)
        for candidate in data["candidates"].values():
            if candidate["thought_tokens"] is None:  # as older versions write it
                del candidate["thought_tokens"], candidate["answer_tokens"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Verdict:
        """The inverse of `to_dict`."""
        candidates = {}
        for name, c in data["candidates"].items():
            candidates[name] = HeldOutScore(**c | {"stderr": known_error(c["stderr"], data["n"])})
        paired = {name: PairedDifference(**p) for name, p in data["paired"].items()}
        if data["n"] == 1:  # older studies stored one of no width
            paired = {name: PairedDifference(p.diff, None, None) for name, p in paired.items()}
        front = data.get("front")
        return cls(
            metric=data["metric"],
            n=data["n"],
            candidates=candidates,
            paired=paired,
            unbeaten=data.get("unbeaten"),
            front=None if front is None else Front.from_dict(front),
        )


@dataclass(frozen=True)
class Decision:
    """The verdict, the trials it compares, and how many verdicts the study has had.

    `compared` holds trial numbers by the candidates' names. The three are written as one.
    """

    verdict: Verdict
    compared: Mapping[str, int]
    look: int = 1

    def to_dict(self) -> dict[str, Any]:
        """The stored form, where `compared` has an older name."""
        verdict = self.verdict.to_dict()
        return {"verdict": verdict, "finalists": dict(self.compared), "look": self.look}


@dataclass(frozen=True)
class ValidationChoice:
    """The choice of the winner on `n` validation tasks: (mean, standard error) by trial number."""

    n: int
    means: Mapping[int, tuple[float, float | None]]
    winner: int

    def to_dict(self) -> dict[str, Any]:
        """The stored form; JSON has no numbers as keys."""
        means = {str(number): list(figures) for number, figures in self.means.items()}
        return {"n": self.n, "means": means, "winner": self.winner}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ValidationChoice:
        """The inverse of `to_dict`."""
        means = {}
        for number, (mean, error) in data["means"].items():
            means[int(number)] = (mean, known_error(error, data["n"]))
        return cls(data["n"], means, data["winner"])


@dataclass(frozen=True)
class SampleAnswer:
    """A candidate's answer to a held-out task, cut to a length, and its grade."""

    text: str
    grade: float


@dataclass(frozen=True)
class Sample:
    """A held-out task with the candidates' answers side by side, for the report."""

    task_id: int | str
    input: str
    reference: str
    answers: Mapping[str, SampleAnswer]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sample:
        """The inverse of `to_dict`."""
        answers = {name: SampleAnswer(**answer) for name, answer in data["answers"].items()}
        return cls(data["task_id"], data["input"], data["reference"], answers)
