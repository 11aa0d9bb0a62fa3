"""Optuna as a plain store of trials and attributes.

Its private names are used here and in database.py alone; tests/test_adapters.py is the contract
that a version of Optuna must keep.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
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

    def begin_again(self) -> None:
        """Make it a new study, which takes the place of the stored one with its first trial."""
        self._study, self._drafted = None, {}

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
        """The trials from number `first` on; they must not be changed.

        Optuna keeps what it has read, but sorts all of it each time that it is asked.
        """
        if self._study is None:
            return []
        with storage_errors(self.place, self.name):
            storage, study_id = self._study._storage, self._study._study_id
            if not first or not isinstance(storage, _CachedStorage):
                return self._study.get_trials(deepcopy=False)[first:]
            storage._read_trials_from_remote_storage(study_id)
            known = storage._studies[study_id].trials
            return [known[number] for number in range(first, len(known))]

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
        distributions: dict[str, BaseDistribution] = {}
        for name, (low, high) in space.items():
            distributions[name] = FloatDistribution(low, high)
        running = create_trial(
            state=TrialState.RUNNING,
            params=dict(params),
            distributions=distributions,
            user_attrs=dict(attributes),
        )
        with storage_errors(self.place, self.name):
            self.guard()
            storage = self.study._storage
            trial_id = storage.create_new_trial(self.study._study_id, running)
            if isinstance(storage, _CachedStorage):  # it knows the number; any other reads it
                _, running.number = storage._trial_id_to_study_id_and_number[trial_id]
            else:
                running.number = storage.get_trial_number_from_id(trial_id)
        return running

    def end_trial(self, number: int, key: str, value: Any, score: float | None = None) -> None:
        """Write an attribute, then the trial's end: without a score it has failed."""
        with storage_errors(self.place, self.name):
            self.guard()
            storage, study_id = self.study._storage, self.study._study_id
            trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
            storage.set_trial_user_attr(trial_id, key, value)
            # Study.tell would read the trial three times
            if score is None or math.isnan(score):
                storage.set_trial_state_values(trial_id, TrialState.FAIL)
            else:
                storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [score])

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
