"""Optuna as a plain store of trials and attributes; its private names are used in this file alone.

tests/test_adapters.py is the contract that a version of Optuna must keep.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from evomerge import sqlite_file
from evomerge.errors import StudyError

optuna.logging.set_verbosity(optuna.logging.WARNING)

STATES = {TrialState.COMPLETE: "complete", TrialState.FAIL: "failed", TrialState.PRUNED: "failed"}


class StoredStudy:
    """One study in its storage. Every error of the storage is raised as an EvomergeError."""

    def __init__(self, study: optuna.Study, url: str = "") -> None:
        self.study, self.url = study, url
        self.name: str = study.study_name

    def attributes(self) -> dict[str, Any]:
        """The study's own attributes."""
        with storage_errors(self.url, self.name):
            return dict(self.study.user_attrs)

    def set_attribute(self, key: str, value: Any) -> None:
        """Write one attribute of the study; `value` is JSON."""
        with storage_errors(self.url, self.name):
            self.study.set_user_attr(key, value)

    def trials(self) -> list[FrozenTrial]:
        """Every trial by number; they must not be changed."""
        with storage_errors(self.url, self.name):
            return self.study.get_trials(deepcopy=False)

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
        with storage_errors(self.url, self.name):
            storage = self.study._storage
            return storage.get_trial(storage.create_new_trial(self.study._study_id, running))

    def end_trial(self, number: int, key: str, value: Any, score: float | None = None) -> None:
        """Write an attribute, then the trial's end: without a score it has failed."""
        with storage_errors(self.url, self.name):
            storage, study_id = self.study._storage, self.study._study_id
            trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
            storage.set_trial_user_attr(trial_id, key, value)
            self.study.tell(number, score, state=TrialState.FAIL if score is None else None)


def open_stored(url: str, name: str, create: bool = False) -> StoredStudy:
    """Open a study; `create` makes a new one. Raises StudyError when it is unknown."""
    path = sqlite_path(url)
    if path is not None and not path.exists() and not create:
        raise StudyError(
            f"there is no study {name!r}",
            where=path,
            remedy="Run `evomerge search` first, or name its --storage.",
        )
    with storage_errors(url, name):
        if not create:
            storage: optuna.storages.RDBStorage | str = open_to_read(url)
        else:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                sqlite_file.check_integrity(path)
            storage = _storage(url)
        summaries = optuna.get_all_study_summaries(storage, include_best_trial=False)
        known = sorted(summary.study_name for summary in summaries)
        if name not in known and not create:
            others = f"There are: {', '.join(known)}." if known else "The storage is empty."
            raise StudyError(f"there is no study {name!r}", where=shown_url(url), remedy=others)
        if name in known:  # loading writes nothing, so that a read-only copy can be shown
            study = optuna.load_study(storage=storage, study_name=name)
        else:
            study = optuna.create_study(
                storage=storage, study_name=name, direction="maximize", load_if_exists=True
            )
    return StoredStudy(study, url)


@contextmanager
def storage_errors(url: str, name: str) -> Iterator[None]:
    """Raise a storage's errors as one-line EvomergeErrors."""
    import sqlalchemy.exc

    kinds = (
        sqlalchemy.exc.SQLAlchemyError,
        optuna.exceptions.StorageInternalError,
        sqlite3.Error,
        OSError,
        UnicodeError,
        json.JSONDecodeError,
    )
    try:
        yield
    except kinds as error:
        beneath = getattr(error.__cause__, "orig", None) or error.__cause__
        cause = getattr(error, "orig", None) or beneath or error
        path = sqlite_path(url)
        remedy = "Repair it, then run the same command."
        if path is not None:
            remedy = (
                f"The generated answers are stored in another file, {name}.answers.sqlite: "
                f"move {path.name} away, and `evomerge search` starts over with them."
            )
        where = path or shown_url(url)
        raise sqlite_file.explained(cause, f"the study {name}", where, remedy) from error


def shown_url(url: str) -> str:
    """A storage's URL without its password."""
    import sqlalchemy.engine

    return sqlalchemy.engine.make_url(url).render_as_string() if "://" in url else url


def sqlite_path(url: str) -> Path | None:
    """The file of an SQLite URL; None for another storage."""
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite:///") else None


@dataclass(frozen=True)
class StoredSummary:
    """A study of a storage in short; the counted trials are candidates that have a score."""

    name: str
    attributes: Mapping[str, Any]
    candidates: int
    best: float | None  # highest score of these
    last: datetime | None  # when a trial began or ended, in the local time of its machine


def stored_studies(url: str) -> list[StoredSummary]:
    """Every study of a storage by name; none where there is no file. Reads no trial's result."""
    path = sqlite_path(url)
    if path is not None and not path.exists():
        return []
    with storage_errors(url, "of the list"):
        storage = open_to_read(url)
        found = [_summary(storage, study) for study in storage.get_all_studies()]
    return sorted(found, key=lambda summary: summary.name)


def _summary(storage: optuna.storages.RDBStorage, study: Any) -> StoredSummary:
    from optuna.storages._rdb import models
    from sqlalchemy import and_, func, select

    trial, value, role = models.TrialModel, models.TrialValueModel, models.TrialUserAttributeModel
    of_role = and_(role.trial_id == trial.trial_id, role.key == "role")
    query = (
        select(
            trial.state,
            role.value_json,
            func.count(),
            func.max(value.value),
            func.max(trial.datetime_start),
            func.max(trial.datetime_complete),
        )
        .outerjoin(value, value.trial_id == trial.trial_id)
        .outerjoin(role, of_role)
        .where(trial.study_id == study._study_id)
        .group_by(trial.state, role.value_json)
    )
    count, best, times = 0, None, []
    with storage.engine.connect() as connection:
        for state, kind, number, highest, *moments in connection.execute(query):
            times += [moment for moment in moments if moment is not None]
            if state == TrialState.COMPLETE and kind is not None and json.loads(kind) == "candidate":
                count, best = number, highest
    return StoredSummary(study.study_name, study.user_attrs, count, best, max(times, default=None))


def delete_stored(url: str, name: str) -> bool:
    """Delete a study's rows. Returns whether the storage holds other studies."""
    with storage_errors(url, name):
        storage = _storage(url)
        optuna.delete_study(study_name=name, storage=storage)
        return bool(optuna.get_all_study_names(storage))


def open_to_read(url: str) -> optuna.storages.RDBStorage:
    """The storage for commands that only read; an SQLite file may be one that cannot be written."""
    path = sqlite_path(url)
    if path is None:
        return optuna.storages.RDBStorage(url, skip_table_creation=True)
    connect = sqlite_file.reader(path)
    sqlite_file.check_integrity(path, connect)
    return optuna.storages.RDBStorage(
        url, engine_kwargs={"creator": connect}, skip_table_creation=True
    )


def _storage(url: str) -> str | optuna.storages.RDBStorage:
    if "://" not in url:
        return url
    wait = {"connect_args": {"timeout": sqlite_file.WAIT}} if sqlite_path(url) else None
    return optuna.storages.RDBStorage(url, engine_kwargs=wait)
