"""The studies of a storage for programs: list them, delete one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.api.inputs import given_url, results_folder, storage_url
from evomerge.errors import EvomergeError

if TYPE_CHECKING:
    from evomerge.searching.catalogue import Belongings, StudyEntry

FOLDER = Path("storage")  # of the default storages


def list_studies(
    storage: str | Path | None = None, say: Callable[[str], None] = lambda line: None
) -> list[StudyEntry]:
    """The studies of a storage, by name: trials, state, best score, last activity.

    Parameters
    ----------
    storage: as for `search` (default: $EVOMERGE_STORAGE, or every file storage/*.db).
    say: is told about a file of the default that cannot be read.

    Raises
    ------
    OutputError, StudyError: the storage cannot be read.

    >>> [study.name for study in evomerge.list_studies() if study.state == "finished"]
    """
    from evomerge.searching.catalogue import entries

    storage = storage or os.environ.get("EVOMERGE_STORAGE")
    if storage:
        return entries(given_url(storage))
    found = []
    for file in sorted(FOLDER.glob("*.db")):
        try:
            found += entries(given_url(file))
        except EvomergeError as error:
            say(f"warning: {error}")
    return found


def study_belongings(
    name: str, *, storage: str | Path | None = None, results: str | Path | None = None
) -> Belongings:
    """What `delete_study` would delete. Raises StudyError for an unknown study."""
    from evomerge.searching.catalogue import belongings

    return belongings(storage_url(storage, name), name, results_folder(results, name))


def delete_study(
    name: str, *, storage: str | Path | None = None, results: str | Path | None = None
) -> Belongings:
    """Delete a study: its trials, its stored answers and grades, and the results that it wrote.

    Parameters
    ----------
    name, storage, results: as for `search`.

    Returns
    -------
    What was deleted, and what was kept: a results folder that holds other files.

    Raises
    ------
    StudyError: there is no such study, or it is being searched. OutputError: a file cannot be
    deleted.

    >>> evomerge.delete_study("demo").trials
    24
    """
    from evomerge.searching.catalogue import delete

    return delete(storage_url(storage, name), name, results_folder(results, name))
