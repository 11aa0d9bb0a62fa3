"""A lease in the database: one process searches a study, wherever the others run.

The holder counts up a number every few seconds. Whoever wants the lease watches that number: while
it moves, the study is in use; when it stands still for `PATIENCE`, its holder is dead, and the
lease changes hands in one conditional UPDATE. No clocks are compared. On the holder's own machine
nothing is waited for: there the system knows whether the process lives.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import sqlalchemy
from sqlalchemy import Column, Engine, Integer, MetaData, String, Table, Text
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from evomerge.errors import StudyError
from evomerge.files import LockHeld

BEAT = 5.0  # seconds between two beats
PATIENCE = 30.0  # seconds without a beat after which a holder is dead
LEASES = Table(
    "evomerge_leases",
    MetaData(),
    Column("study", String(512), primary_key=True),
    Column("token", String(32), nullable=False),
    Column("holder", Text, nullable=False),
    Column("beats", Integer, nullable=False),
)


@dataclass(frozen=True)
class Holder:
    """A process: its id means something on its `machine` alone, and its start tells reused ids."""

    pid: int
    host: str
    machine: str
    started: str

    @classmethod
    def this_process(cls) -> Holder:
        """The process that asks."""
        machine = "/".join((_read("/proc/sys/kernel/random/boot_id"), _pid_space()))
        return cls(os.getpid(), socket.gethostname(), machine, _start_of(os.getpid()))

    @property
    def is_here(self) -> bool:
        """Whether it runs, or ran, where this process can see it."""
        here = Holder.this_process()
        return bool(here.started) and (self.host, self.machine) == (here.host, here.machine)

    @property
    def lives(self) -> bool:
        """Whether a process that is here has not ended."""
        return _start_of(self.pid) == self.started


class StorageLease:
    """The lease on one study, held until `release`; a thread keeps it alive."""

    def __init__(self, engine: Engine, study: str) -> None:
        """Take the lease. Raises LockHeld, after up to `PATIENCE` seconds, and database errors."""
        self._engine, self._study = engine, study
        self._token = uuid.uuid4().hex
        self._ended = threading.Event()
        _make_table(engine)
        self._take()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise StudyError unless the lease is still held, which the database decides."""
        if not self._beat():
            raise StudyError(
                "another process has taken the study over, because this one did not report for "
                f"{PATIENCE:.0f} s",
                where=self._study,
                remedy="Let it finish; everything up to then is stored.",
            )

    def release(self) -> None:
        """Give the lease back, where the database can be reached."""
        self._ended.set()
        self._thread.join()
        with suppress(SQLAlchemyError), self._engine.begin() as connection:
            connection.execute(sqlalchemy.delete(LEASES).where(self._mine()))
        self._engine.dispose()

    def _take(self) -> None:
        mine = json.dumps(asdict(Holder.this_process()))
        row = {"study": self._study, "token": self._token, "holder": mine, "beats": 0}
        until, seen = time.monotonic() + PATIENCE, None
        while True:
            with suppress(IntegrityError), self._engine.begin() as connection:
                connection.execute(sqlalchemy.insert(LEASES).values(row))
                return
            found = self._row()
            if found is None:  # given back meanwhile
                continue
            token, text, beats = found
            holder = Holder(**json.loads(text))
            alive = seen not in (None, (token, beats))
            if holder.is_here:
                alive = holder.lives
            if alive:
                raise LockHeld(f"pid {holder.pid} on {holder.host}")
            seen = (token, beats)
            if not holder.is_here and time.monotonic() < until:
                time.sleep(BEAT / 5)
                continue
            old = (LEASES.c.study == self._study, LEASES.c.token == token, LEASES.c.beats == beats)
            with self._engine.begin() as connection:
                if connection.execute(sqlalchemy.update(LEASES).where(*old).values(row)).rowcount:
                    return

    def _row(self) -> tuple[str, str, int] | None:
        columns = sqlalchemy.select(LEASES.c.token, LEASES.c.holder, LEASES.c.beats)
        with self._engine.connect() as connection:
            row = connection.execute(columns.where(LEASES.c.study == self._study)).first()
        return None if row is None else (row[0], row[1], row[2])

    def _mine(self) -> sqlalchemy.ColumnElement[bool]:
        return sqlalchemy.and_(LEASES.c.study == self._study, LEASES.c.token == self._token)

    def _beat(self) -> bool:
        """Whether the lease was still this process's."""
        counted = sqlalchemy.update(LEASES).where(self._mine()).values(beats=LEASES.c.beats + 1)
        with self._engine.begin() as connection:
            return bool(connection.execute(counted).rowcount)

    def _keep(self) -> None:
        while not self._ended.wait(BEAT):
            # a server that is away for a moment; before the next trial `check` decides
            with suppress(SQLAlchemyError):
                self._beat()


def _make_table(engine: Engine) -> None:
    try:
        LEASES.create(engine, checkfirst=True)
    except SQLAlchemyError:  # another process has just made it
        LEASES.create(engine, checkfirst=True)


def _start_of(pid: int) -> str:
    """When a process of this machine started, empty where there is none or it cannot be told."""
    state, *fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split() or [""]
    if state == "Z" or len(fields) < 19:  # ended, and not yet waited for by its parent
        return ""
    return fields[18]  # field 22 of proc(5)


def _pid_space() -> str:
    """Which process ids are visible: a container has its own."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _read(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    return ""
