"""The ledger: the stored state of a study, in an Optuna storage.

A trial begins in one write, with its numbers and its slot; its outcome is one more write before
the trial ends. A run that is killed therefore leaves complete or interrupted trials.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from optuna.trial import FrozenTrial

from evomerge.errors import StudyError
from evomerge.files import ExclusiveLock, LockHeld
from evomerge.searching.history import History
from evomerge.searching.records.database import sql_engine
from evomerge.searching.records.optuna_adapter import STATES, StoredStudy, open_stored
from evomerge.searching.records.storage_errors import storage_errors
from evomerge.searching.records.storage_lease import StorageLease
from evomerge.searching.records.storage_place import storage_place
from evomerge.searching.records.study_facts import STORED_KEYS, StudyFacts, read_facts, stored
from evomerge.searching.records.trial_record import INTERRUPTED, Result, TrialRecord, read_trial


class Ledger:
    """One study. Trials are started, then finished or failed; nothing else writes to them."""

    def __init__(
        self, storage: StoredStudy, space: Mapping[str, tuple[float, float]] | None = None
    ) -> None:
        """`space`: the range of each of the genome's numbers; only a search needs it."""
        self.storage, self.space = storage, dict(space or {})
        self._ended: dict[int, TrialRecord] = {}  # trials that cannot change any more
        self._settled = History()  # of the first trials, all of which have ended
        self._read = 0  # how many stored trials `_settled` covers
        self._known: StudyFacts | None = None  # until a fact changes
        self._history: History | None = None  # until a fact or a trial changes

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
        self._known = self._history = None
        self.storage.set_attribute(STORED_KEYS.get(key, key), stored(value))

    def records(self) -> list[TrialRecord]:
        """Every trial that has a role, in the order of their numbers."""
        return list(self.history().trials)

    def history(self) -> History:
        """The history of the records."""
        if self._history is None or not self.storage.only_writer:
            self._history = self._read_history()
        return self._history

    def _read_history(self) -> History:
        """The same from the storage; of trials, only those that had not ended."""
        if self._known is None:
            self._known = self.facts
        following = self.storage.trials(self._read)
        names = tuple(self.space) or self._known.names
        records = [self._as_record(t, names) for t in following]
        ended = len([*takewhile(lambda t: t.state.is_finished(), following)])
        settled = [record for record in records[:ended] if record is not None]
        self._settled = self._settled.extended(settled)
        self._read += ended
        rest = [record for record in records[ended:] if record is not None]
        facts = self._known
        settled_so_far = replace(
            self._settled, start=facts.start, credit_breaks_ties=facts.credit_breaks_ties
        )
        return settled_so_far.extended(rest)

    def _as_record(self, t: FrozenTrial, names: Sequence[str]) -> TrialRecord | None:
        """A stored trial; None for one without a role, which is not ours."""
        if "role" not in t.user_attrs:
            return None
        record = self._ended.get(t.number) or _record(t, names)
        if t.state.is_finished():
            self._ended[t.number] = record
        return record

    def mark_interrupted(self) -> int:
        """Mark trials of a process that ended as interrupted. Returns how many there were."""
        self._history = None
        stale = self.storage.running()
        for number in stale:
            self.storage.end_trial(number, "reason", INTERRUPTED)
        return len(stale)

    def start(
        self,
        role: str,
        vector: Sequence[float],
        generation: int | None = None,
        index: int | None = None,
    ) -> TrialRecord:
        """Start a trial of this vector, stored whole or not at all."""
        self._history = None
        params = dict(zip(self.space, map(float, vector), strict=True))
        slot = {"generation": generation, "index": index, "role": role}
        return _record(self.storage.start_trial(params, self.space, slot), tuple(self.space))

    def finish(self, trial: TrialRecord, result: Result) -> None:
        """Record a trial's result and end it."""
        self._history = None
        self.storage.end_trial(trial.number, "result", stored(result), result.score)

    def fail(self, trial: TrialRecord, reason: str) -> None:
        """Record why a trial failed and end it."""
        self._history = None
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


@contextmanager
def only_worker(url: str, name: str) -> Iterator[Callable[[], None]]:
    """Hold the study for this process, and only this one, while it searches.

    What is yielded raises StudyError where another process has taken the study over. Raises
    StudyError when another process holds it.
    """
    place = storage_place(url)
    try:
        with storage_errors(place, name):
            lock: ExclusiveLock | StorageLease
            file = lock_path(url, name)
            if file is None:
                lock = StorageLease(sql_engine(place), name)
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                lock = ExclusiveLock(file)
    except LockHeld as held:
        raise StudyError(
            "the study is being searched by another process",
            where=name,
            found=held.holder,
            remedy="Wait for it, or stop it.",
        ) from None
    try:
        yield lock.check
    finally:
        lock.release()


def lock_path(url: str, name: str) -> Path | None:
    """The file that is locked while a study is searched; None where the storage is no file."""
    file = storage_place(url).file
    if file is None:
        return None
    file = Path(os.path.realpath(file))  # the file itself, however many links lead to it
    return file.with_name(f"{file.stem}.{name}.lock")


def cache_path(url: str, name: str) -> Path:
    """The answer cache of a study: next to its SQLite file, else in storage/."""
    file = storage_place(url).file
    return (file.parent if file else Path("storage")) / f"{name}.answers.sqlite"


def grades_path(url: str, name: str) -> Path:
    """The llm judge's grades of a study, next to its answers."""
    return cache_path(url, name).with_name(f"{name}.grades.sqlite")


def _record(t: FrozenTrial, names: Sequence[str]) -> TrialRecord:
    score = t.values[0] if t.values else None
    state = STATES.get(t.state, "running")
    return read_trial(t.number, state, score, t.params, names, t.user_attrs)
