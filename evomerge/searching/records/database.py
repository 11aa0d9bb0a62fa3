"""The database of a storage: made whole or not at all, checked when it is opened, repaired.

The tables are Optuna's; a study is inserted together with its first facts, in one transaction.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

import optuna
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _VersionManager
from optuna.study import StudyDirection
from sqlalchemy.orm import Session

from evomerge import sqlite_file
from evomerge.errors import OutputError, StudyError
from evomerge.files import name_file
from evomerge.masking import masked_url
from evomerge.searching.records.storage_place import StoragePlace, file_url, storage_place

CONNECT = 30  # seconds to wait for a server
# drivers that take `connect_timeout`
PATIENT = ("psycopg", "psycopg2", "pymysql", "mysqldb")
Connect: TypeAlias = Callable[[], sqlite3.Connection]
NO_STUDIES = "Run `evomerge search` first, or name its --storage."


def open_database(place: StoragePlace, write: bool) -> RDBStorage:
    """Optuna's storage in an existing database.

    To `write`, what is missing of its tables is added; otherwise nothing is changed, and nothing
    need be writable. Raises StudyError where the tables are missing, or of another version of
    Optuna.
    """
    connect = None
    if place.file is not None and place.plain_sqlite:
        if not write:
            connect = sqlite_file.reader(place.file)
        sqlite_file.check_integrity(place.file, connect)
    engine = sql_engine(place, connect)
    try:
        _check_revision(engine, place)
        tables, indices = _missing(engine)
    finally:
        engine.dispose()
    if not write:
        if tables:
            raise StudyError("the storage holds no studies", where=place.shown, remedy=NO_STUDIES)
        return _storage(place, skip=True, connect=connect)
    storage = _storage(place, skip=not tables)
    if indices:
        _drop_empty_twins(storage.engine, place)
        for index in _missing(storage.engine)[1]:
            index.create(storage.engine)
    return storage


def sql_engine(place: StoragePlace, connect: Connect | None = None) -> sqlalchemy.Engine:
    """SQLAlchemy's engine; it connects when it is used."""
    return sqlalchemy.create_engine(place.url, **_options(place, connect))


def make_database(place: StoragePlace, name: str, attributes: Mapping[str, Any]) -> bool:
    """Make an SQLite file that holds a study, whole or not at all.

    Returns whether this process made it; False: another has made one meanwhile.
    """
    assert place.file is not None
    place.file.parent.mkdir(parents=True, exist_ok=True)
    hidden = remove_unfinished(place, name)
    storage = _storage(storage_place(file_url(hidden)))
    try:
        insert_study(storage, name, attributes)
    finally:
        storage.remove_session()
        storage.engine.dispose()
    return name_file(hidden, place.file)


def remove_unfinished(place: StoragePlace, name: str) -> Path:
    """Remove the file that a run left which was killed while it made the database; its path."""
    assert place.file is not None
    digest = sha256(name.encode()).hexdigest()[:12]
    hidden = place.file.with_name(f".{place.file.name[:100]}.{digest}.new")
    for leftover in (hidden, hidden.with_name(f"{hidden.name}-journal")):
        leftover.unlink(missing_ok=True)
    return hidden


def insert_study(storage: RDBStorage, name: str, attributes: Mapping[str, Any]) -> None:
    """Store a new study with its attributes, in one transaction.

    It takes the place of a study of that name, whose trials are lost.
    """
    with Session(storage.engine) as session, session.begin():
        before = models.StudyModel.find_by_name(name, session)
        if before is not None:
            session.delete(before)
            session.flush()  # before the new one: a name is unique
        study = models.StudyModel(study_name=name)
        direction = models.StudyDirectionModel(objective=0, direction=StudyDirection.MAXIMIZE)
        study.directions = [direction]
        for key, value in attributes.items():
            text = json.dumps(value)
            study.user_attributes.append(models.StudyUserAttributeModel(key=key, value_json=text))
        session.add(study)


def _storage(place: StoragePlace, skip: bool = False, connect: Connect | None = None) -> RDBStorage:
    """Optuna's storage; to `skip` making its tables writes nothing where they are complete."""
    return RDBStorage(
        place.optuna_url,
        engine_kwargs=_options(place, connect),
        skip_compatibility_check=True,  # `_check_revision` has been there
        skip_table_creation=skip,
    )


def _options(place: StoragePlace, connect: Connect | None = None) -> dict[str, Any]:
    """Of SQLAlchemy's engine."""
    if connect is not None:
        return {"creator": connect}
    if place.file is not None:
        if "timeout" in place.parsed.query:
            return {"connect_args": {}}
        return {"connect_args": {"timeout": sqlite_file.WAIT}}
    # a server drops connections that wait for hours while a candidate answers
    options: dict[str, Any] = {"pool_pre_ping": True}
    patient = place.parsed.get_driver_name() in PATIENT
    if patient and "connect_timeout" not in place.parsed.query:
        options["connect_args"] = {"connect_timeout": CONNECT}
    return options


def _check_revision(engine: sqlalchemy.Engine, place: StoragePlace) -> None:
    """Raise StudyError for tables of another version of Optuna, before anything is changed."""
    newest, *older = _revisions()
    found = _revision(engine)
    if found in (None, newest):
        return
    remedy = "Install the version of Optuna that wrote it, or name another storage."
    if found in older:
        upgrade = f"optuna storage upgrade --storage '{masked_url(place.url)}'"
        remedy = f"Copy it, then run {upgrade}."
    raise StudyError(
        f"the storage has the tables of another version of Optuna than {optuna.__version__}",
        where=place.shown,
        found=found,
        remedy=remedy,
    )


@cache
def _revisions() -> list[str]:
    """Of the tables that this Optuna knows, the newest first; reading its scripts takes a while."""
    manager = _VersionManager.__new__(_VersionManager)  # its __init__ would write
    manager.url = "sqlite://"
    return manager.get_all_versions()


def _revision(engine: sqlalchemy.Engine) -> str | None:
    """Of the tables; None where they are not complete."""
    if not sqlalchemy.inspect(engine).has_table("alembic_version"):
        return None
    with engine.connect() as connection:
        found = connection.execute(sqlalchemy.text("SELECT version_num FROM alembic_version"))
        return found.scalar()


def _missing(engine: sqlalchemy.Engine) -> tuple[list[str], list[sqlalchemy.Index]]:
    """Tables that are not there or lack their version, and indices of the others.

    A process that is killed between two statements leaves such a schema.
    """
    inspector = sqlalchemy.inspect(engine)
    present = set(inspector.get_table_names())
    tables, indices = [], []
    for table in models.BaseModel.metadata.sorted_tables:
        if table.name not in present:
            tables.append(table.name)
            continue
        known = {index["name"] for index in inspector.get_indexes(table.name)}
        indices += [index for index in table.indexes if index.name not in known]
    if _revision(engine) is None:
        tables.append("alembic_version")
    return tables, indices


def _drop_empty_twins(engine: sqlalchemy.Engine, place: StoragePlace) -> None:
    """Without its index, a name may stand for two studies: keep the one that has trials.

    Raises OutputError where several have.
    """
    with Session(engine) as session, session.begin():
        studies = session.query(models.StudyModel).order_by(models.StudyModel.study_id).all()
        counts = Counter(study.study_name for study in studies)
        for name in [name for name, count in counts.items() if count > 1]:
            twins = [study for study in studies if study.study_name == name]
            used = [study for study in twins if study.trials]
            if len(used) > 1:
                raise OutputError(
                    f"the storage holds {len(used)} studies of one name",
                    where=place.shown,
                    found=name,
                    remedy="Move it away: a search starts over, with the answers that are kept.",
                )
            kept = (used or twins)[0]
            for study in twins:
                if study is not kept:
                    session.delete(study)
