"""The studies of a storage in short, without their trials one by one, and their deletion."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import TrialModel, TrialUserAttributeModel, TrialValueModel
from optuna.study._frozen import FrozenStudy
from optuna.trial import TrialState
from sqlalchemy import and_, func, select

from evomerge.searching.records.database import open_database
from evomerge.searching.records.storage_errors import storage_errors
from evomerge.searching.records.storage_place import storage_place


@dataclass(frozen=True)
class StoredSummary:
    """A study of a storage; the trials that are counted are candidates that have a score."""

    name: str
    attributes: Mapping[str, Any]
    candidates: int
    best: float | None  # highest score of any trial, as a search's progress shows it
    last: datetime | None  # when its newest trial began or ended, in local time


def stored_studies(url: str) -> list[StoredSummary]:
    """Every study of a storage by name; none where there is no file. Raises OutputError."""
    place = storage_place(url)
    if place.file is not None and not place.file.exists():
        return []
    with storage_errors(place, "NAME"):
        storage = open_database(place, write=False)
        found = [_summary(storage, study) for study in storage.get_all_studies()]
    return sorted(found, key=lambda summary: summary.name)


def _summary(storage: RDBStorage, study: FrozenStudy) -> StoredSummary:
    of_trial = TrialValueModel.trial_id == TrialModel.trial_id
    role = and_(
        TrialUserAttributeModel.trial_id == TrialModel.trial_id,
        TrialUserAttributeModel.key == "role",
    )
    query = (
        select(
            TrialModel.state,
            TrialUserAttributeModel.value_json,
            func.count(),
            func.max(TrialValueModel.value),
            func.max(TrialModel.trial_id),
        )
        .outerjoin(TrialValueModel, of_trial)
        .outerjoin(TrialUserAttributeModel, role)
        .where(TrialModel.study_id == study._study_id)
        .group_by(TrialModel.state, TrialUserAttributeModel.value_json)
    )
    count, newest = 0, []
    best: float | None = None
    with storage.engine.connect() as connection:
        for state, kind, number, highest, trial_id in connection.execute(query):
            newest.append(trial_id)
            if state != TrialState.COMPLETE:
                continue
            if highest is not None and (best is None or highest > best):
                best = highest
            if kind == json.dumps("candidate"):
                count = number
    last = None
    if newest:
        trial = storage.get_trial(max(newest))
        last = trial.datetime_complete or trial.datetime_start
    return StoredSummary(study.study_name, study.user_attrs, count, best, last)


def delete_stored(url: str, name: str) -> bool:
    """Delete a study's rows. Returns whether the storage holds other studies."""
    place = storage_place(url)
    with storage_errors(place, name):
        storage = open_database(place, write=True)
        optuna.delete_study(study_name=name, storage=storage)
        return bool(optuna.get_all_study_names(storage))
