"""The ledger: what a study remembers, in an Optuna storage.

A trial begins in one write, with its numbers and the user attributes role, generation and index;
what came of it is the attribute `result`, one write before it is told. In older studies each figure
of the result is an attribute. Study attributes hold the resolved study file, the hashes of models
and tasks, and the split.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from evomerge import sqlite_file
from evomerge.errors import StudyError
from evomerge.files import ExclusiveLock, LockHeld
from evomerge.searching.sampler import INTERRUPTED, ReplayedCmaEs, Slot
from evomerge.study import BEFORE, changed_keys

optuna.logging.set_verbosity(optuna.logging.WARNING)

STATES = {TrialState.COMPLETE: "complete", TrialState.FAIL: "failed", TrialState.PRUNED: "failed"}


@dataclass(frozen=True)
class TrialRecord:
    """One trial as everyone sees it. `truncated` is a share; `grades` are by task_id; `seconds` by
    phase.
    """

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
    # of the objective, where the study has one
    parts: dict[str, float] = field(default_factory=dict)


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
    """One study in its storage. Trials are started, then finished or failed; nothing else writes to
    them.
    """

    def __init__(self, study: optuna.Study, url: str = "") -> None:
        self.study, self.url = study, url

    @property
    def name(self) -> str:
        return self.study.study_name

    @property
    def facts(self) -> dict[str, Any]:
        """The study's attributes: study_file, models, tasks, split, names, verdict."""
        with self._errors():
            found = dict(self.study.user_attrs)
        verdict = found.get("verdict")
        # older studies wrote them one by one
        return found | verdict if isinstance(verdict, dict) and "verdict" in verdict else found

    def _errors(self) -> AbstractContextManager[None]:
        return storage_errors(self.url, self.name)

    def remember(self, key: str, value: Any) -> None:
        with self._errors():
            self.study.set_user_attr(key, value)

    def trials(self) -> list[FrozenTrial]:
        with self._errors():
            return self.study.get_trials(deepcopy=False)

    def records(self) -> list[TrialRecord]:
        """Every trial that has a role, in the order of their numbers."""
        names = self.facts.get("names", [])
        return [_record(t, names) for t in self.trials() if "role" in t.user_attrs]

    def release_stale(self) -> int:
        """Mark trials of a process that ended as interrupted; how many there were."""
        stale = [t for t in self.trials() if t.state == TrialState.RUNNING]
        with self._errors():
            for t in stale:
                self._tell(t, "reason", INTERRUPTED)
        return len(stale)

    def start(
        self,
        role: str,
        slot: Slot | None = None,
        weights: Mapping[str, float] | None = None,
        generation: int | None = None,
    ) -> FrozenTrial:
        """A running trial: the sampler's candidate for a slot, or the given weights. It is there
        whole, or not at all.
        """
        sampler = self.study.sampler
        assert isinstance(sampler, ReplayedCmaEs)
        if weights is None:
            assert slot is not None
            weights = dict(
                zip(sampler.names, sampler.draw(self.trials(), slot).tolist(), strict=True)
            )
        place = {
            "generation": slot.generation if slot else generation,
            "index": slot.index if slot else None,
        }
        running = create_trial(
            state=TrialState.RUNNING,
            params=dict(weights),
            distributions=sampler.space,
            user_attrs=place | {"role": role},
        )
        with self._errors():
            storage = self.study._storage
            return storage.get_trial(storage.create_new_trial(self.study._study_id, running))

    def finish(self, trial: FrozenTrial, result: Result) -> None:
        with self._errors():
            self._tell(trial, "result", vars(result), result.score)

    def fail(self, trial: FrozenTrial, reason: str) -> None:
        with self._errors():
            self._tell(trial, "reason", reason)

    def _tell(self, trial: FrozenTrial, key: str, value: Any, score: float | None = None) -> None:
        """Record, then tell: a trial without a score has failed."""
        self.study._storage.set_trial_user_attr(trial._trial_id, key, value)
        self.study.tell(trial.number, score, state=TrialState.FAIL if score is None else None)


def open_ledger(
    url: str, name: str, sampler: BaseSampler | None = None, create: bool = False
) -> Ledger:
    """Open a study; `create` makes it when it is not there. Raises StudyError when it is unknown."""
    path = sqlite_path(url)
    if path is not None and not path.exists() and not create:
        raise StudyError(
            f"there is no study {name!r}",
            where=path,
            remedy="Run `evomerge search` first, or name its --storage.",
        )
    with storage_errors(url, name):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            sqlite_file.check_integrity(path)
        wait = {"connect_args": {"timeout": sqlite_file.WAIT}} if path is not None else None
        storage = optuna.storages.RDBStorage(url, engine_kwargs=wait) if "://" in url else url
        known = [
            s.study_name for s in optuna.get_all_study_summaries(storage, include_best_trial=False)
        ]
        if name not in known and not create:
            others = f"There are: {', '.join(sorted(known))}." if known else "The storage is empty."
            raise StudyError(f"there is no study {name!r}", where=_shown(url), remedy=others)
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            sampler=sampler,
            direction="maximize",
            load_if_exists=True,
        )
    return Ledger(study, url)


def _undo(stored: Mapping[str, Any], changed: Sequence[str]) -> str:
    """What undoes a change; where a default is younger than the study, nobody has changed anything."""
    younger = {
        f"{section}.{key}": value
        for section, values in BEFORE.items()
        for key, value in values.items()
    }
    young = [
        key
        for key in changed
        if key in younger and key.split(".")[1] not in stored.get(key.split(".")[0], {})
    ]
    if not young:
        return "Undo the change"
    settings = " ".join(f"--set {key}={json.dumps(younger[key])}" for key in young)
    return f"Go on as it began with {settings}" + (
        ", and undo the rest" if len(young) < len(changed) else ""
    )


def check_unchanged(ledger: Ledger, facts: Mapping[str, Any]) -> None:
    """Remember the facts of a new study; refuse a known one whose file, models or tasks have
    changed.
    """
    old = ledger.facts
    if "study_file" in old:
        changed = changed_keys(old["study_file"], facts["study_file"])
        changed += [
            f"the model {ref}"
            for ref, digest in facts["models"].items()
            if old["models"].get(ref, digest) != digest
        ]
        changed += ["the tasks"] if old["tasks"] != facts["tasks"] else []
        changed += ["the knowledge base"] if old.get("knowledge") != facts.get("knowledge") else []
        if changed:
            raise StudyError(
                f"the study has changed since it began: {', '.join(changed)}",
                where=ledger.name,
                remedy=f"{_undo(old['study_file'], changed)}, or start anew with --study NEW_NAME.",
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
    file = path.with_name(f"{path.stem}.{name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = ExclusiveLock(file)
    except LockHeld as held:
        raise StudyError(
            "the study is being searched by another process",
            where=name,
            found=held.holder,
            remedy="Wait for it, or stop it.",
        ) from None
    except OSError as error:
        raise sqlite_file.explained(error, "the study", path) from error
    with lock:
        yield


@contextmanager
def storage_errors(url: str, name: str) -> Iterator[None]:
    """A storage's own errors as one line of ours."""
    import sqlalchemy.exc

    try:
        yield
    except (
        sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, sqlite3.Error, OSError, UnicodeError, json.JSONDecodeError
    ) as error:  # fmt: skip
        cause = (
            getattr(error, "orig", None)
            or getattr(error.__cause__, "orig", None)
            or error.__cause__
            or error
        )
        path = sqlite_path(url)
        raise sqlite_file.explained(
            cause, f"the study {name}", path or _shown(url), _when_damaged(path, name)
        ) from error


def _when_damaged(path: Path | None, name: str) -> str:
    if path is None:
        return "Repair it, then run the same command."
    kept = f"The answers already paid for are kept in another file, {name}.answers.sqlite"
    return f"{kept}: move {path.name} away, and `evomerge search` starts anew with them."


def _shown(url: str) -> str:
    """A storage's URL without its password."""
    import sqlalchemy.engine

    return sqlalchemy.engine.make_url(url).render_as_string() if "://" in url else url


def sqlite_path(url: str) -> Path | None:
    """The file of an SQLite URL."""
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None


def _record(t: FrozenTrial, names: Sequence[str]) -> TrialRecord:
    a = t.user_attrs | t.user_attrs.get("result", {})
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
