"""The ledger: the stored state of a study, in an Optuna storage.

A trial begins in one write, with its numbers and its slot; its outcome is one more write before
the trial ends. A run that is killed therefore leaves complete or interrupted trials.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from optuna.trial import FrozenTrial

from evomerge import sqlite_file
from evomerge.errors import StudyError
from evomerge.files import ExclusiveLock, LockHeld
from evomerge.searching.history import History
from evomerge.searching.records.optuna_adapter import STATES, StoredStudy, open_stored, sqlite_path
from evomerge.searching.records.study_facts import STORED_KEYS, StudyFacts, read_facts, stored
from evomerge.searching.records.trial_record import INTERRUPTED, Result, TrialRecord, read_trial
from evomerge.study import BEFORE, changed_keys


class Ledger:
    """One study. Trials are started, then finished or failed; nothing else writes to them."""

    def __init__(
        self, storage: StoredStudy, space: Mapping[str, tuple[float, float]] | None = None
    ) -> None:
        """`space`: the range of each of the genome's numbers; only a search needs it."""
        self.storage, self.space = storage, dict(space or {})
        self._ended: dict[int, TrialRecord] = {}  # trials that cannot change any more

    @property
    def name(self) -> str:
        """The study's name."""
        return self.storage.name

    @property
    def facts(self) -> StudyFacts:
        """What the study stores besides its trials. Raises StudyError for a newer format."""
        return read_facts(self.storage.attributes(), self.name)

    def remember(self, key: str, value: object) -> None:
        """Store one of the facts durably; `key` is a field of StudyFacts."""
        self.storage.set_attribute(STORED_KEYS.get(key, key), stored(value))

    def records(self) -> list[TrialRecord]:
        """Every trial that has a role, in the order of their numbers."""
        return list(self.history().trials)

    def history(self) -> History:
        """The history of the records."""
        facts, records = self.facts, []
        for t in self.storage.trials():
            if "role" not in t.user_attrs:
                continue
            record = self._ended.get(t.number)
            if record is None:
                record = _record(t, tuple(self.space) or facts.names)
                if t.state.is_finished():
                    self._ended[t.number] = record
            records.append(record)
        return History(tuple(records), facts.start)

    def mark_interrupted(self) -> int:
        """Mark trials of a process that ended as interrupted. Returns how many there were."""
        stale = self.storage.running()
        for number in stale:
            self.storage.end_trial(number, "reason", INTERRUPTED)
        return len(stale)

    def start(
        self,
        role: str,
        weights: Sequence[float],
        generation: int | None = None,
        index: int | None = None,
    ) -> TrialRecord:
        """Start a trial with these weights, stored whole or not at all."""
        params = dict(zip(self.space, map(float, weights), strict=True))
        slot = {"generation": generation, "index": index, "role": role}
        return _record(self.storage.start_trial(params, self.space, slot), tuple(self.space))

    def finish(self, trial: TrialRecord, result: Result) -> None:
        """Record a trial's result and end it."""
        self.storage.end_trial(trial.number, "result", stored(result), result.score)

    def fail(self, trial: TrialRecord, reason: str) -> None:
        """Record why a trial failed and end it."""
        self.storage.end_trial(trial.number, "reason", reason)


def open_ledger(
    url: str,
    name: str,
    space: Mapping[str, tuple[float, float]] | None = None,
    create: bool = False,
) -> Ledger:
    """Open a study; `create` makes a new one. Raises StudyError when it is unknown."""
    ledger = Ledger(open_stored(url, name, create), space)
    names = ledger.facts.names
    if space is not None and len(names) == len(space):  # a study keeps the names it began with
        ledger.space = dict(zip(names, space.values(), strict=True))
    return ledger


def check_unchanged(ledger: Ledger, facts: StudyFacts) -> None:
    """Remember the facts of a new study; refuse a known one that has changed since it began.

    Only the file, the models, the tasks and the knowledge base are compared. Raises StudyError.
    """
    old = ledger.facts
    if old.study_file is not None:
        assert facts.study_file is not None
        changed = changed_keys(old.study_file, facts.study_file)
        for ref, digest in facts.models.items():
            if old.models.get(ref, digest) != digest:
                changed.append(f"the model {ref}")
        if old.tasks not in (None, facts.tasks):
            changed.append("the tasks")
        if old.knowledge != facts.knowledge:
            changed.append("the knowledge base")
        if changed:
            undo = _undo(old.study_file, changed)
            raise StudyError(
                f"the study has changed since it began: {', '.join(changed)}",
                where=ledger.name,
                remedy=f"{undo}, or start a new study with --study NEW_NAME.",
            )
    else:
        ledger.remember("version", facts.version)
    for key in BEGINNING:
        value = getattr(facts, key)
        if getattr(old, key) != value:
            ledger.remember(key, value)


# what is known before the first trial; a study has begun once its last one is written
BEGINNING = ("models", "tasks", "split", "names", "n_layers", "files", "knowledge", "study_file")


def _undo(stored_file: Mapping[str, Mapping[str, object]], changed: Sequence[str]) -> str:
    """The remedy for a change. A default that is newer than the study was not changed."""
    settings = []
    for key in changed:
        section, _, name = key.partition(".")
        younger = BEFORE.get(section, {})
        if name in younger and name not in stored_file.get(section, {}):
            settings.append(f"--set {key}={json.dumps(younger[name])}")
    if not settings:
        return "Undo the change"
    rest = ", and undo the rest" if len(settings) < len(changed) else ""
    return f"Resume it as it began with {' '.join(settings)}{rest}"


@contextmanager
def only_worker(url: str, name: str) -> Iterator[None]:
    """Hold the study for this process while it searches.

    Raises StudyError when another process does.
    """
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


def cache_path(url: str, name: str) -> Path:
    """The answer cache of a study: next to its SQLite file, else in storage/."""
    path = sqlite_path(url)
    return (path.parent if path else Path("storage")) / f"{name}.answers.sqlite"


def grades_path(url: str, name: str) -> Path:
    """The llm judge's grades of a study, next to its answers."""
    return cache_path(url, name).with_name(f"{name}.grades.sqlite")


def _record(t: FrozenTrial, names: Sequence[str]) -> TrialRecord:
    score = t.values[0] if t.values else None
    state = STATES.get(t.state, "running")
    return read_trial(t.number, state, score, t.params, names, t.user_attrs)
