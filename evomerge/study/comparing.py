"""Which keys of a stored study a study file changes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from evomerge.errors import StudyFileError
from evomerge.study.section import join
from evomerge.study.study_file import Study

# Keys that a finished or running study may change: they say when to stop and how to reach the
# judge, not what is searched.
STOPPING_KEYS = (
    "search.trials",
    "search.time_limit",
    "search.max_cost",
    "search.hourly_price",
    "search.min_sigma",
    "search.patience",
    "judge.base_url",
    "judge.concurrency",
    "judge.requests_per_minute",
    "judge.retries",
    "judge.back_off",
    "judge.timeout",
    "judge.asks",
    "judge.max_requests",
    "judge.max_tokens",
    "judge.max_cost",
    "judge.input_price",
    "judge.output_price",
)


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two `to_dict`s, stopping keys left out."""
    with contextlib.suppress(StudyFileError):  # it may contain keys that this version does not know
        # keys that are newer than the study have their defaults
        old = Study.from_dict(old).to_dict()
    before, after = _flat(old), _flat(new)
    differing = [key for key in before | after if before.get(key) != after.get(key)]
    return sorted(key for key in differing if key not in STOPPING_KEYS)


def _flat(data: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        path = join(at, str(key))
        if isinstance(value, Mapping):
            flat |= _flat(value, path)
        else:
            flat[path] = value
    return flat
