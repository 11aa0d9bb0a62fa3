"""What a study stores besides its trials: the attributes of its storage, typed.

Format 1 is that of evomerge 0.1, which wrote no `version`. In format 0 (before 0.1) `verdict`,
`finalists` and `look` are attributes of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

from evomerge.errors import StudyError
from evomerge.masking import has_secret
from evomerge.searching.records.judge_report import JudgeReport
from evomerge.searching.records.verdict_record import Sample, ValidationChoice, Verdict
from evomerge.study import Study

VERSION = 1  # of the format that is written


@dataclass(frozen=True)
class Start:
    """The distribution of the first generation where it comes from elsewhere.

    mean (d,), cov (d, d). With `mean_is_first` the mean is the first candidate too.
    """

    mean: tuple[float, ...]
    sigma: float
    cov: tuple[tuple[float, ...], ...]
    mean_is_first: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The stored form."""
        stored = asdict(self)
        stored["first"] = stored.pop("mean_is_first")
        return stored

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Start:
        """The inverse of `to_dict`."""
        cov = tuple(tuple(row) for row in data["cov"])
        return cls(tuple(data["mean"]), data["sigma"], cov, data.get("first", False))


@dataclass(frozen=True)
class GradientStep:
    """One step of the warm start: where it was, and what it found there."""

    number: int  # from 0
    vector: tuple[float, ...]  # (d,)
    loss: float  # nats per token: of references, or of the divergence from parents
    gradient: tuple[float, ...]  # (d,), of the loss
    tasks: int
    seconds: float

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GradientStep:
        """The inverse of `to_dict`, also after JSON."""
        vector, gradient = tuple(data["vector"]), tuple(data["gradient"])
        return cls(**{**data, "vector": vector, "gradient": gradient})


@dataclass(frozen=True)
class SplitKeys:
    """Which tasks each part of the split holds, by their stored ids."""

    search: tuple[int | str, ...]
    validation: tuple[int | str, ...]
    held_out: tuple[int | str, ...]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SplitKeys:
        """The inverse of `to_dict`; a study from before the validation tasks has none."""
        parts = ("search", "validation", "held_out")
        return cls(*(tuple(data.get(part, ())) for part in parts))


@dataclass(frozen=True)
class CascadeSavings:
    """The cascade judge had its expensive judge grade `asked` of `graded` answers."""

    graded: int
    asked: int


@dataclass(frozen=True)
class StudyFacts:
    """A study's facts; a field's name is its key in the storage, except for STORED_KEYS."""

    version: int = VERSION
    study_file: Mapping[str, Any] | None = None  # resolved, as `Study.to_dict` wrote it
    # names that the study began with -> hash, in the study file's order; answers are kept by them
    models: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Any] = field(
        default_factory=dict
    )  # name now -> `fingerprint` of its folder
    tasks: str | None = None  # hash
    task_prints: Mapping[str, str] = field(default_factory=dict)  # task's key -> its hash, cut
    # variable of the study file -> some digits of its value's hash
    environment: Mapping[str, str] = field(default_factory=dict)
    split: SplitKeys | None = None
    # objective -> keys of its tasks, of each objective that is a group of tasks
    task_groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    names: tuple[str, ...] = ()  # of the genome's numbers
    n_layers: int | None = None
    # of the base, as in `Architecture`: where the recipes keep what is outside the text path
    modules: tuple[str, ...] | None = None
    knowledge: str | None = None  # hash of the knowledge base
    own_method: str | None = None  # hash of the file of a user's own merge method
    judge: str | None = None  # name and version
    prompts: str | None = None  # hash of lm-eval's prompts
    known_candidates: tuple[tuple[float, ...], ...] | None = None  # in the order of their slots
    start: Start | None = None
    warm_start: tuple[GradientStep, ...] = ()
    threads: int | None = None  # of the CPU, chosen by trial where the study file names none
    # keys of `engine:` that have changed -> their first values, by which answers are kept
    first_engine: Mapping[str, Any] = field(default_factory=dict)
    # batch sizes that a lack of memory has forced
    limits: Mapping[str, int] = field(default_factory=dict)
    elapsed: float = 0.0  # seconds of all runs
    stopped: str | None = None  # why the search ended
    cascade: CascadeSavings | None = None
    # generation -> (answers graded, answers that the expensive judge graded)
    cascade_generations: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    # whether parents and uniform weights can win, as in every study that began after 0.2
    references_win: bool = False
    # whether partial credit orders candidates of equal score; the same studies
    credit_breaks_ties: bool = False
    validation: ValidationChoice | None = None
    compared: Mapping[str, int] = field(default_factory=dict)  # name -> trial number
    verdict: Verdict | None = None
    look: int = 1  # how many verdicts the study has had
    samples: tuple[Sample, ...] = ()
    judge_report: JudgeReport | None = None

    @property
    def begun(self) -> bool:
        """Whether the study has stored its study file."""
        return self.study_file is not None

    @property
    def study(self) -> Study:
        """The study file; the study must have begun."""
        assert self.study_file is not None
        return Study.from_dict(self.study_file)


def read_facts(attributes: Mapping[str, Any], name: str = "study") -> StudyFacts:
    """A study's facts from its attributes. Raises StudyError for a newer format."""
    a = dict(attributes)
    if a.get("version", VERSION) > VERSION:
        raise StudyError(
            "the study was written by a newer version of evomerge",
            where=name,
            found=f"format {a['version']}",
            remedy="Update evomerge.",
        )
    verdict = a.get("verdict")
    if isinstance(verdict, dict) and "verdict" in verdict:  # format 1: written as one
        a |= verdict
    for key, read in READERS.items():
        if a.get(key) is not None:
            a[key] = read(a[key])
    for name, key in STORED_KEYS.items():
        a[name] = a.pop(key, None)
    known = {}
    for key, value in a.items():
        if key in FIELDS and value is not None:
            known[key] = value
    return StudyFacts(**known)


def stored(value: Any) -> Any:
    """A fact in its stored form: plain JSON values."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, list | tuple):
        return [stored(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): stored(item) for key, item in value.items()}
    return value


def _each(read: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    return lambda data: tuple(map(read, data))


def _generations(data: Mapping[str, list[int]]) -> dict[int, tuple[int, int]]:
    return {int(number): (graded, asked) for number, (graded, asked) in data.items()}


def _without_secrets(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """A study file without the password that older versions stored in a judge's address."""
    judge = data.get("judge", {})
    if not has_secret(judge.get("base_url") or ""):
        return data
    return {**data, "judge": {**judge, "base_url": None}}


READERS: dict[str, Callable[[Any], Any]] = {
    "study_file": _without_secrets,
    "split": SplitKeys.from_dict,
    "names": tuple,
    "modules": tuple,
    "first": _each(tuple),
    "start": Start.from_dict,
    "warm_start": _each(GradientStep.from_dict),
    "cascade": lambda data: CascadeSavings(**data),
    "cascade_generations": _generations,
    "validation": ValidationChoice.from_dict,
    "verdict": Verdict.from_dict,
    "samples": _each(Sample.from_dict),
    "judge_report": JudgeReport.from_dict,
}
# fields of StudyFacts with another key in the storage
STORED_KEYS = {"known_candidates": "first", "compared": "finalists"}
FIELDS = frozenset(StudyFacts.__dataclass_fields__)
