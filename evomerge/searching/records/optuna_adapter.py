"""Optuna as a plain store of trials and attributes.

Its private names are used here, in database.py and in trial_rows.py alone; tests/test_adapters.py
is the contract that a version of Optuna must keep.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage, _CachedStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from evomerge.errors import OutputError, StudyError
from evomerge.searching.records.database import (
    insert_study,
    make_database,
    open_database,
    remove_unfinished,
)
from evomerge.searching.records.storage_errors import storage_errors
from evomerge.searching.records.storage_place import StoragePlace, storage_place
from evomerge.searching.records.trial_rows import end_trial, insert_trial

optuna.logging.set_verbosity(optuna.logging.WARNING)

STATES = {TrialState.COMPLETE: "complete", TrialState.FAIL: "failed", TrialState.PRUNED: "failed"}


class StoredStudy:
    """One study in its storage. Every error of the storage is raised as an EvomergeError.

    A new study exists in memory alone until its first trial starts: then it is stored together
    with its attributes, whole or not at all.
    """

    def __init__(
        self,
        place: StoragePlace,
        name: str,
        storage: RDBStorage | None = None,
        study: optuna.Study | None = None,
    ) -> None:
        """`storage` is None where there is no file yet; without a `study` it is a new one."""
        self.place, self.name = place, name
        self._storage, self._study = storage, study
        self._drafted: dict[str, Any] = {}  # attributes of a study that is not stored yet
        self.only_writer = False
        # all trials as they were read and written, where nobody else writes
        self._kept: list[FrozenTrial] | None = None
        # called before each write: raises where another process has taken the study over
        self.guard: Callable[[], None] = lambda: None

    @property
    def study(self) -> optuna.Study:
        """Optuna's study, which is stored now if it was not."""
        if self._study is None:
            self._study = self._store()
        return self._study

    @property
    def is_new(self) -> bool:
        """Whether nothing of it is stored yet."""
        return self._study is None

    def claim(self) -> None:
        """From now on no other process writes, so that no trial is read twice."""
        self.only_writer, self._kept = True, None

    def begin_again(self) -> None:
        """Make it a new study, which takes the place of the stored one with its first trial."""
        self._study, self._drafted, self._kept = None, {}, None

    def attributes(self) -> dict[str, Any]:
        """The study's own attributes."""
        if self._study is None:
            return dict(self._drafted)
        with storage_errors(self.place, self.name):
            return dict(self._study.user_attrs)

    def set_attribute(self, key: str, value: Any) -> None:
        """Write one attribute of the study; `value` is JSON."""
        if self._study is None:
            self._drafted[key] = json.loads(json.dumps(value))
            return
        with storage_errors(self.place, self.name):
            self.guard()
            self._study.set_user_attr(key, value)

    def trials(self, first: int = 0) -> list[FrozenTrial]:
        """The trials from number `first` on; they must not be changed."""
        if self._study is None:
            return []
        if self._kept is not None:
            return self._kept[first:]
        with storage_errors(self.place, self.name):
            found = self._study.get_trials(deepcopy=False)
        if self.only_writer:
            self._kept = found
        return found[first:]

    def running(self) -> list[int]:
        """The numbers of the trials that have begun and not ended."""
        return [t.number for t in self.trials() if t.state == TrialState.RUNNING]

    def start_trial(
        self,
        params: Mapping[str, float],
        space: Mapping[str, tuple[float, float]],
        attributes: Mapping[str, Any],
    ) -> FrozenTrial:
        """A running trial with its numbers and attributes, stored whole or not at all."""
        with storage_errors(self.place, self.name):
            self.guard()
            study, storage = self.study, self._rows()
            number = insert_trial(storage, study._study_id, params, space, attributes)
        running = create_trial(
            state=TrialState.RUNNING,
            params=dict(params),
            distributions={name: FloatDistribution(*space[name]) for name in params},
            user_attrs=json.loads(json.dumps(dict(attributes))),
        )
        running.number = number
        if self._kept is not None and len(self._kept) == number:
            self._kept.append(running)
        else:
            self._kept = None  # somebody else has added a trial
        return running

    def end_trial(self, number: int, key: str, value: Any, score: float | None = None) -> None:
        """Write an attribute and the trial's end in one: without a score it has failed."""
        if score is not None and math.isnan(score):
            score = None
        with storage_errors(self.place, self.name):
            self.guard()
            end_trial(self._rows(), self.study._study_id, number, key, value, score)
        if self._kept is not None and number < len(self._kept):
            ended = copy.copy(self._kept[number])
            ended.user_attrs = {**ended.user_attrs, key: json.loads(json.dumps(value))}
            ended.state = TrialState.FAIL
            if score is not None:
                ended.state, ended.values = TrialState.COMPLETE, [score]
            self._kept[number] = ended

    def _rows(self) -> RDBStorage:
        """What writes to the tables."""
        storage = self.study._storage
        if isinstance(storage, _CachedStorage):
            storage = storage._backend
        assert isinstance(storage, RDBStorage)
        return storage

    def _store(self) -> optuna.Study:
        """The study with its attributes in one transaction, in a new file where there is none."""
        with storage_errors(self.place, self.name):
            if self._storage is None:
                made = make_database(self.place, self.name, self._drafted)
                self._storage = open_database(self.place, write=True)
                if not made:  # another study has just made the file
                    insert_study(self._storage, self.name, self._drafted)
            else:
                insert_study(self._storage, self.name, self._drafted)
            return optuna.load_study(storage=self._storage, study_name=self.name)


def open_stored(url: str, name: str, create: bool = False) -> StoredStudy:
    """Open a study; `create` makes a new one. Raises StudyError when it is unknown."""
    place = storage_place(url)
    if place.file is not None and not place.file.exists():
        if not create:
            raise StudyError(
                f"there is no study {name!r}",
                where=place.file,
                remedy="Run `evomerge search` first, or name its --storage.",
            )
        return StoredStudy(place, name)
    with storage_errors(place, name):
        if place.file is not None and create:
            remove_unfinished(place, name)
        storage = open_database(place, write=create)
        summaries = optuna.get_all_study_summaries(storage, include_best_trial=False)
        known = sorted(summary.study_name for summary in summaries)
        if known.count(name) > 1:
            raise OutputError(
                f"the storage holds {known.count(name)} studies of one name",
                where=place.shown,
                found=name,
                remedy="Run its `evomerge search` again, which removes those without trials.",
            )
        if name in known:  # loading writes nothing, so that a read-only copy can be shown
            study = optuna.load_study(storage=storage, study_name=name)
            return StoredStudy(place, name, storage, study)
    if not create:
        others = "The storage is empty."
        if known:
            others = f"There are: {', '.join(known)}."
        raise StudyError(f"there is no study {name!r}", where=place.shown, remedy=others)
    return StoredStudy(place, name, storage)
