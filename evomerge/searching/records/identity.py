"""What makes a study the same study: the contents of its files, wherever they are now.

Models are compared by their place in the study file, so that a folder may move or be renamed, and
by their tensors; tasks by what they say.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evomerge.errors import StudyError
from evomerge.searching.records.study_facts import StudyFacts
from evomerge.study import BEFORE, changed_keys, model_refs

NAMED = 3  # changed files or tasks that a message names


def changes(old: StudyFacts, new: StudyFacts) -> list[str]:
    """What differs between a stored study and the same study as its files are now."""
    assert old.study_file is not None
    assert new.study_file is not None
    changed = changed_keys(old.study_file, new.study_file, old.environment, new.environment)
    digests = list(old.models.values())
    for i, (before, (ref, now)) in enumerate(zip(digests, new.models.items(), strict=False)):
        if before != now:
            changed.append(f"the model {ref}{_changed_files(old, new, i)}")
    if len(digests) != len(new.models):
        changed.append("genome.models")
    if old.tasks not in (None, new.tasks):
        changed.append(_changed_tasks(old, new))
    if old.knowledge != new.knowledge:
        changed.append("the knowledge base")
    if old.own_method != new.own_method:
        changed.append("the merge method's file")
    return list(dict.fromkeys(changed))


def refused(facts: StudyFacts, changed: Sequence[str], name: str) -> StudyError:
    """The error of a study that has changed since it began."""
    undo = _undo(facts.study_file or {}, changed)
    return StudyError(
        f"the study has changed since it began: {', '.join(changed)}",
        where=name,
        remedy=f"{undo}, or start a new study with --study NEW_NAME.",
    )


def _undo(stored_file: Mapping[str, Mapping[str, object]], changed: Sequence[str]) -> str:
    """The remedy for a change. A default that is newer than the study was not changed."""
    settings = []
    for key in changed:
        section, _, name = key.partition(".")
        younger = BEFORE.get(section, {})
        if name in younger and name not in stored_file.get(section, {}):
            settings.append(f"--set {key}={json.dumps(younger[name])}")
    if not settings:
        return "Undo the change"
    rest = ", and undo the rest" if len(settings) < len(changed) else ""
    return f"Resume it as it began with {' '.join(settings)}{rest}"


def _changed_files(old: StudyFacts, new: StudyFacts, place: int) -> str:
    """The files of a model that differ, where the study knows them."""
    before, now = _prints(old, place), _prints(new, place)
    if not before:
        return ""
    differing = []
    for name in sorted(before | now):
        if before.get(name) != now.get(name):
            differing.append(name)
    return f" ({_some(differing)})" if differing else ""


def _prints(facts: StudyFacts, place: int) -> dict[str, str]:
    """File name -> its hash, of the model at a place."""
    refs = model_refs(facts.study_file or {})
    files: Mapping[str, Mapping[str, Any]] = {}
    if place < len(refs):
        files = facts.files.get(refs[place], {})
    return {name: entry["sha256"] for name, entry in files.items()}


def _changed_tasks(old: StudyFacts, new: StudyFacts) -> str:
    """The tasks that differ, where the study knows each of them."""
    before, now = dict(old.task_prints), dict(new.task_prints)
    if not before:
        return "the tasks"
    parts = []
    for word, keys in (
        ("", [key for key in before if key in now and before[key] != now[key]]),
        ("new: ", [key for key in now if key not in before]),
        ("missing: ", [key for key in before if key not in now]),
    ):
        if keys:
            parts.append(word + _some(keys))
    return f"the tasks ({'; '.join(parts) or 'their order'})"


def _some(names: Iterable[str]) -> str:
    every = list(names)
    more = len(every) - NAMED
    return ", ".join(every[:NAMED]) + (f" and {more} more" if more > 0 else "")
