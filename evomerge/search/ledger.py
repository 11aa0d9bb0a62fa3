"""The ledger: what a study remembers, in an Optuna storage.

A trial's user attributes hold what it was (role, generation, index) before its work starts, and what came of it
before it is told. Study attributes hold the resolved study file, the hashes of models and tasks, and the split.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from evomerge.errors import OutputError, StudyError
from evomerge.search.sampler import INTERRUPTED, Slot
from evomerge.study import changed_keys

optuna.logging.set_verbosity(optuna.logging.WARNING)

STATES = {TrialState.COMPLETE: "complete", TrialState.FAIL: "failed", TrialState.PRUNED: "failed"}


@dataclass(frozen=True)
class TrialRecord:
    """One trial as everyone sees it. `truncated` is a share; `grades` are by task_id; `seconds` by phase."""

    number: int
    generation: int | None
    index: int | None
    role: str  # candidate, parent, mean or uniform
    state: str  # complete, failed or running
    weights: tuple[float, ...]
    score: float | None
    stderr: float | None
    n: int
    truncated: float
    seconds: dict[str, float]
    reason: str | None
    grades: dict[str, dict[str, Any]]
    tokens: int | None = None  # new tokens of all answers
    tokens_per_second: float | None = None  # of those that were not paid for before
    parts: dict[str, float] = field(default_factory=dict)  # of the objective, where the study has one


@dataclass(frozen=True)
class Result:
    """What a trial's work gave."""

    score: float
    stderr: float
    n: int
    truncated: float
    seconds: dict[str, float]
    grades: dict[str, dict[str, Any]]
    tokens: int = 0  # new tokens of all answers
    tokens_per_second: float | None = None  # of those that were not paid for before
    parts: dict[str, float] = field(default_factory=dict)


class Ledger:
    """One study in its storage. Trials are started, then finished or failed; nothing else writes to them."""

    def __init__(self, study: optuna.Study) -> None:
        self.study = study

    @property
    def name(self) -> str:
        return self.study.study_name

    @property
    def facts(self) -> dict[str, Any]:
        """The study's attributes: study_file, models, tasks, split, names, verdict."""
        return dict(self.study.user_attrs)

    def remember(self, key: str, value: Any) -> None:
        with storage_errors(self.name):
            self.study.set_user_attr(key, value)

    def trials(self) -> list[FrozenTrial]:
        with storage_errors(self.name):
            return self.study.get_trials(deepcopy=False)

    def records(self) -> list[TrialRecord]:
        """Every trial that has a role, in the order of their numbers."""
        names = self.facts.get("names", [])
        return [_record(t, names) for t in self.trials() if "role" in t.user_attrs]

    def release_stale(self) -> int:
        """Mark trials of a process that ended as interrupted; how many there were."""
        stale = [t for t in self.trials() if t.state == TrialState.RUNNING]
        with storage_errors(self.name):
            for t in stale:
                self.study._storage.set_trial_user_attr(t._trial_id, "reason", INTERRUPTED)
                self.study.tell(t.number, state=TrialState.FAIL)
        return len(stale)

    def start(
        self, role: str, slot: Slot | None = None, weights: Mapping[str, float] | None = None, generation: int | None = None
    ) -> optuna.Trial:
        """A running trial: the sampler's next candidate, or the given weights."""
        with storage_errors(self.name):
            if weights is not None:
                self.study.enqueue_trial(dict(weights))
            trial = self.study.ask(self.study.sampler.infer_relative_search_space(self.study, None))  # type: ignore[arg-type]
            trial.set_user_attr("generation", slot.generation if slot else generation)
            trial.set_user_attr("index", slot.index if slot else None)
            trial.set_user_attr("role", role)
            return trial

    def finish(self, trial: optuna.Trial, result: Result) -> None:
        """Record, then tell."""
        with storage_errors(self.name):
            for key, value in vars(result).items():
                trial.set_user_attr(key, value)
            self.study.tell(trial, result.score)

    def fail(self, trial: optuna.Trial, reason: str) -> None:
        with storage_errors(self.name):
            trial.set_user_attr("reason", reason)
            self.study.tell(trial, state=TrialState.FAIL)


def open_ledger(url: str, name: str, sampler: BaseSampler | None = None, create: bool = False) -> Ledger:
    """Open a study; `create` makes it when it is not there. Raises StudyError when it is unknown."""
    path = sqlite_path(url)
    if path is not None and create:
        path.parent.mkdir(parents=True, exist_ok=True)
    if path is not None and not path.exists() and not create:
        raise StudyError(f"there is no study {name!r}", where=path, remedy="Run `evomerge search` first, or name its --storage.")
    with storage_errors(url):
        storage = optuna.storages.RDBStorage(url) if "://" in url else url
        known = [s.study_name for s in optuna.get_all_study_summaries(storage, include_best_trial=False)]
        if name not in known and not create:
            others = f"There are: {', '.join(sorted(known))}." if known else "The storage is empty."
            raise StudyError(f"there is no study {name!r}", where=url, remedy=others)
        return Ledger(optuna.create_study(storage=storage, study_name=name, sampler=sampler, direction="maximize", load_if_exists=True))


def check_unchanged(ledger: Ledger, facts: Mapping[str, Any]) -> None:
    """Remember the facts of a new study; refuse a known one whose file, models or tasks have changed."""
    old = ledger.facts
    if "study_file" in old:
        changed = changed_keys(old["study_file"], facts["study_file"])
        changed += [f"the model {ref}" for ref, digest in facts["models"].items() if old["models"].get(ref, digest) != digest]
        changed += ["the tasks"] if old["tasks"] != facts["tasks"] else []
        if changed:
            raise StudyError(
                f"the study has changed since it began: {', '.join(changed)}",
                where=ledger.name,
                remedy="Undo the change, or start anew with --study NEW_NAME.",
            )
    for key, value in facts.items():
        if old.get(key) != value:
            ledger.remember(key, value)


@contextmanager
def only_worker(url: str, name: str) -> Iterator[None]:
    """Hold the study for this process while it searches. Raises StudyError when another one does."""
    path = sqlite_path(url)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.stem}.{name}.lock"), "a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise StudyError(
                "the study is being searched by another process", where=name, found=lock.read(), remedy="Wait for it, or stop it."
            ) from None
        lock.truncate(0)
        lock.write(f"pid {os.getpid()}")
        lock.flush()
        yield


@contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """A storage's own errors as one line of ours."""
    import sqlalchemy.exc

    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = str(getattr(error, "orig", None) or error.__cause__ or error).splitlines()[0]
        raise OutputError(
            f"the storage failed: {cause}", where=where, remedy="Free space or repair it, then run the same command."
        ) from error


def sqlite_path(url: str) -> Path | None:
    """The file of an SQLite URL."""
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None


def _record(t: FrozenTrial, names: Sequence[str]) -> TrialRecord:
    a = t.user_attrs
    return TrialRecord(
        number=t.number,
        generation=a.get("generation"),
        index=a.get("index"),
        role=a["role"],
        state=STATES.get(t.state, "running"),
        weights=tuple(t.params[n] for n in names if n in t.params),
        score=t.values[0] if t.values else None,
        stderr=a.get("stderr"),
        n=a.get("n", 0),
        truncated=a.get("truncated", 0.0),
        seconds=a.get("seconds", {}),
        reason=a.get("reason"),
        grades=a.get("grades", {}),
        tokens=a.get("tokens"),
        tokens_per_second=a.get("tokens_per_second"),
        parts=a.get("parts", {}),
    )
