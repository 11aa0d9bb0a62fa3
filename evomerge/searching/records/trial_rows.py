"""A trial's rows in Optuna's tables, written in one transaction when it begins and when it ends.

Optuna's own storage writes each number and attribute of a trial by several queries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import optuna
from optuna.distributions import FloatDistribution, distribution_to_json
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import TrialState
from sqlalchemy.orm import Session


def insert_trial(
    storage: RDBStorage,
    study_id: int,
    params: Mapping[str, float],
    space: Mapping[str, tuple[float, float]],
    attributes: Mapping[str, Any],
) -> int:
    """Store a running trial with its numbers and attributes; its number in the study."""
    with Session(storage.engine) as session, session.begin():
        # the lock keeps the trials' numbers apart
        models.StudyModel.find_or_raise_by_id(study_id, session, for_update=True)
        trial = models.TrialModel(
            study_id=study_id, state=TrialState.RUNNING, datetime_start=datetime.now()
        )
        session.add(trial)
        session.flush()
        number: int = trial.count_past_trials(session)
        trial.number = number
        for name, value in params.items():
            row = models.TrialParamModel(
                trial_id=trial.trial_id,
                param_name=name,
                param_value=value,
                distribution_json=distribution_to_json(FloatDistribution(*space[name])),
            )
            session.add(row)
        for key, value in attributes.items():
            session.add(_attribute(trial, key, value))
    return number


def end_trial(
    storage: RDBStorage, study_id: int, number: int, key: str, value: Any, score: float | None
) -> None:
    """Store an attribute and a trial's end: without a score it has failed.

    Raises optuna's UpdateFinishedTrialError for one that has ended.
    """
    with Session(storage.engine) as session, session.begin():
        trial = session.query(models.TrialModel).filter_by(study_id=study_id, number=number).one()
        if trial.state.is_finished():
            raise optuna.exceptions.UpdateFinishedTrialError(f"trial {number} has ended")
        session.query(models.TrialUserAttributeModel).filter_by(
            trial_id=trial.trial_id, key=key
        ).delete()
        session.add(_attribute(trial, key, value))
        trial.state, trial.datetime_complete = TrialState.FAIL, datetime.now()
        if score is not None:
            trial.state = TrialState.COMPLETE
            kept, kind = models.TrialValueModel.value_to_stored_repr(score)
            row = models.TrialValueModel(
                trial_id=trial.trial_id, objective=0, value=kept, value_type=kind
            )
            session.add(row)


def _attribute(trial: models.TrialModel, key: str, value: Any) -> models.TrialUserAttributeModel:
    return models.TrialUserAttributeModel(
        trial_id=trial.trial_id, key=key, value_json=json.dumps(value)
    )
