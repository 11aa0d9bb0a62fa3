"""The studies of a storage: what there is, and how one is deleted with all that belongs to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from evomerge.answering.cache import cache_files
from evomerge.errors import OutputError
from evomerge.files import is_locked
from evomerge.searching.ledger import cache_path, grades_path, lock_path, only_worker, open_ledger
from evomerge.searching.records.storage_place import storage_place
from evomerge.searching.records.study_list import StoredSummary, delete_stored, stored_studies

# the files of a results folder
RESULTS = ("best.yaml", "README.md", "verdict.json", "trials.csv", "report.html")


@dataclass(frozen=True)
class StudyEntry:
    """A study in a list. `trials` counts finished candidates, `planned` those it is to have.

    `state` is running, finished (it has a verdict), or unfinished. `best` is the highest score of a
    candidate on the search tasks. `last_activity` is when the newest trial began or ended, in local
    time.
    """

    name: str
    storage: str  # its URL
    trials: int
    planned: int | None  # None: the study has not begun
    state: str
    best: float | None
    last_activity: datetime | None

    def to_json(self) -> dict[str, Any]:
        """The stable form of `evomerge list --json`."""
        last = None
        if self.last_activity is not None:
            last = self.last_activity.isoformat()
        return {**vars(self), "last_activity": last}


def entries(url: str) -> list[StudyEntry]:
    """Every study of a storage by name. Raises OutputError, StudyError."""
    return [_entry(url, summary) for summary in stored_studies(url)]


def _entry(url: str, summary: StoredSummary) -> StudyEntry:
    known = summary.attributes
    state, lock = "unfinished", lock_path(url, summary.name)
    if lock is not None and is_locked(lock):
        state = "running"
    # a search that goes on after its verdict has no reason to have stopped
    elif known.get("verdict") and known.get("stopped", "") is not None:
        state = "finished"
    file: Mapping[str, Any] = known.get("study_file") or {}
    planned = file.get("search", {}).get("trials")
    if planned is not None:  # a study that was asked for fewer later on keeps what it has
        planned = max(planned, summary.candidates)
    return StudyEntry(
        name=summary.name,
        storage=url,
        trials=summary.candidates,
        planned=planned,
        state=state,
        best=summary.best,
        last_activity=summary.last,
    )


@dataclass(frozen=True)
class Belongings:
    """All that is deleted with a study, and what stays."""

    trials: int
    answers: dict[Path, int] = field(default_factory=dict)  # answers and grades -> bytes
    results: tuple[Path, ...] = ()
    kept: Path | None = None  # the results folder where it holds other files too


def belongings(url: str, name: str, results: Path) -> Belongings:
    """What belongs to a study; `results` is its folder of results.

    Of that only files that `evomerge search` or `report` writes belong to it, and only if the card
    among them is evomerge's card of a study of this name. Raises StudyError for an unknown study.
    """
    trials = len(open_ledger(url, name).storage.trials())
    answers = {**cache_files(cache_path(url, name)), **cache_files(grades_path(url, name))}
    own = _own_files(results, name)
    kept = None
    if results.is_dir() and set(results.iterdir()) - set(own):
        kept = results
    return Belongings(trials, answers, own, kept)


def _own_files(results: Path, name: str) -> tuple[Path, ...]:
    try:
        card = (results / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ()
    plain = card.replace("\\", "")  # Markdown's escapes
    if f"\n# {name}\n" not in plain or "found with evomerge" not in plain:
        return ()
    return tuple(results / file for file in RESULTS if (results / file).is_file())


def delete(url: str, name: str, results: Path) -> Belongings:
    """Delete a study with its `belongings`, which are returned.

    Raises StudyError for an unknown study, and for one that is being searched; OutputError where
    something cannot be deleted.
    """
    with only_worker(url, name):
        found = belongings(url, name, results)
        others = delete_stored(url, name)
        files = [*found.results, *found.answers]
        path = storage_place(url).file
        if path is not None and path.stem == name and not others:
            files += cache_files(path)
        try:
            for file in files:
                file.unlink(missing_ok=True)
            if found.results and found.kept is None:
                results.rmdir()
        except OSError as error:
            raise OutputError(
                f"the study is deleted, but not this file of it: {error.strerror}",
                where=error.filename,
                remedy="Delete it yourself.",
            ) from error
    return found
