"""Whatever can go wrong with a storage, as one line with the remedy that fits."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
import sqlalchemy.exc

from evomerge import sqlite_file
from evomerge.errors import OutputError
from evomerge.masking import without_secrets
from evomerge.searching.records.storage_place import StoragePlace

KINDS = (
    sqlalchemy.exc.SQLAlchemyError,
    optuna.exceptions.StorageInternalError,
    sqlite3.Error,
    OSError,
    UnicodeError,
    json.JSONDecodeError,
    TypeError,
)
# words of a server's driver -> what went wrong, and what helps; the first that is found counts
SERVER = (
    (
        ("unexpected keyword", "invalid connection option"),
        "the storage's URL has an option that its driver does not know",
        "Check what follows the ?.",
    ),
    (
        ("authentication failed", "access denied", "no password supplied", "permission denied"),
        "the storage's server refuses access",
        "Check the URL's user and password.",
    ),
    (
        ("does not exist", "unknown database"),
        "the storage's server does not have what the URL names",
        "Create it, or check the URL's user and database.",
    ),
    (
        ("invalid port", "port number", "out of range"),
        "the storage's URL has no valid port",
        "Write a number from 1 to 65535.",
    ),
    (
        ("translate host", "resolve host", "name or service", "unknown mysql server host"),
        "the storage's server is not known",
        "Check the URL's host.",
    ),
    (
        ("no space left", "disk full", "is full"),
        "the storage's server has no space",
        "Free some space there, then run the same command.",
    ),
    (
        ("lock wait", "deadlock"),
        "the storage is in use by another process",
        "Run the same command again.",
    ),
    (
        ("connection", "connect", "server", "gone away", "timeout", "timed out"),
        "the storage's server cannot be reached",
        "Start it, or check the URL's host and port; everything recorded is kept, and the same "
        "command resumes.",
    ),
)


@contextmanager
def storage_errors(place: StoragePlace, name: str) -> Iterator[None]:
    """Raise a storage's errors as one-line EvomergeErrors."""
    try:
        yield
    except KINDS as error:
        if isinstance(error, TypeError) and "unexpected keyword" not in str(error):
            raise  # our own fault, and not the URL's
        beneath = getattr(error.__cause__, "orig", None) or error.__cause__
        cause = getattr(error, "orig", None) or beneath or error
        if place.file is None:
            raise _server_error(cause, place) from error
        raise _file_error(cause, place, name) from error


def _file_error(cause: BaseException, place: StoragePlace, name: str) -> OutputError:
    assert place.file is not None
    remedy = (
        f"The generated answers are stored in another file, {name}.answers.sqlite: "
        f"move {place.file.name} away, and `evomerge search` starts over with them."
    )
    return sqlite_file.explained(cause, f"the study {name}", place.file, remedy)


def _server_error(cause: BaseException, place: StoragePlace) -> OutputError:
    # drivers repeat what they were told, a password that was not encoded included
    whole = " ".join(str(cause).split()).partition(" Is the server running")[0]
    said = without_secrets(whole, place.url)[:200] or type(cause).__name__
    for words, what, remedy in SERVER:
        if any(word in said.lower() for word in words):
            return OutputError(f"{what}: {said}", where=place.shown, remedy=remedy)
    if isinstance(cause, ValueError):
        remedy = "Restore the database from a copy, or name another storage."
        return OutputError(f"the study is damaged: {said}", where=place.shown, remedy=remedy)
    remedy = "Check the server, then run the same command."
    return OutputError(f"the storage failed: {said}", where=place.shown, remedy=remedy)
