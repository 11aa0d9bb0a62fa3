"""Which keys of a stored study a study file changes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.errors import StudyFileError
from evomerge.study.environment import VARIABLE, dotted, texts_with_variables
from evomerge.study.older_defaults import FORMER
from evomerge.study.section import join
from evomerge.study.study_file import Study

# Keys that a finished or running study may change: they say when to stop, how to reach the judge
# and how to use the machine, not what is searched. `engine.batch_size` is not among them: which
# prompts share a batch decides how they are padded, and with that may decide a word.
STOPPING_KEYS = (
    "engine.residency",
    "engine.threads",
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

# Paths, whose contents are compared instead: those of `search.recipes` are known candidates.
CONTENT_KEYS = (
    "genome.base_model",
    "genome.models",
    "genome.tokenizer_source",
    "tasks",
    "prompt.knowledge",
    "judge.file",
    "search.recipes",
    "task_search_path",
)


def changed_keys(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    old_values: Mapping[str, str] | None = None,
    new_values: Mapping[str, str] | None = None,
) -> list[str]:
    """Dotted keys whose values differ between two `to_dict`s.

    Stopping keys are left out, and so is where a file lies. `old_values` and `new_values` are
    prints of the environment's variables, as of `value_prints`.
    """
    values = new_values or {}
    other = set()
    for name, value in (old_values or {}).items():
        if values.get(name, value) != value:
            other.add(name)
    affected = set()
    for at, text in texts_with_variables(old):
        if other & set(VARIABLE.findall(text)):
            affected.add(dotted(at))
    before, after = _flat(_positions(_filled(old))), _flat(_positions(_filled(new)))
    differing = {key for key in affected if not key.startswith(CONTENT_KEYS)}
    for key in before | after:
        if before.get(key) != after.get(key):
            differing.add(key)
    return sorted(differing - set(STOPPING_KEYS))


def as_begun(study: Study, stored: Mapping[str, Any] | None) -> Study:
    """The study as its file is now, with the defaults that it began with where these have changed.

    `stored` is the study file of its storage, None of a new study.
    """
    if stored is None:
        return study
    for section, former in FORMER.items():
        own = getattr(study, section)
        kept = {}
        for key, value in former.items():
            default = type(own).model_fields[key].default
            if getattr(own, key) == default and stored.get(section, {}).get(key, value) == value:
                kept[key] = value
        if kept:
            study = study.replace(**{section: own.replace(**kept)})
    return study


def model_refs(data: Mapping[str, Any]) -> list[str]:
    """The models of a study's `to_dict`, the base first."""
    genome = data.get("genome", {})
    first = []
    if genome.get("base_model"):
        first = [genome["base_model"]]
    return list(dict.fromkeys([*first, *genome.get("models", ())]))


def _filled(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """With its variables' values, and defaults for the keys that are newer than the study."""
    with contextlib.suppress(StudyFileError):  # it may contain keys that this version does not know
        return Study.from_dict(data).filled()
    return data


def _positions(data: Mapping[str, Any]) -> dict[str, Any]:
    """The file with places instead of paths: each model is its number."""
    genome, refs = dict(data.get("genome", {})), model_refs(data)

    def number(ref: str | None) -> object:
        if ref in refs:
            return refs.index(ref)
        return ref

    genome |= {key: number(genome.get(key)) for key in ("base_model", "tokenizer_source")}
    genome["merge_method"] = Path(str(genome.get("merge_method"))).name  # of a user's own file
    genome["models"] = [number(ref) for ref in genome.get("models", ())]
    sections = dict(data) | {"genome": genome, "task_search_path": None}
    for section, key in (("prompt", "knowledge"), ("judge", "file"), ("search", "recipes")):
        content = dict(data.get(section, {}))
        if key in content:
            content[key] = bool(content[key])
        sections[section] = content
    if sections["judge"].get("kind") == "local":
        del sections["judge"]["model"]  # the judge's version holds its tensors
    sections["tasks"] = [_weights(source) for source in data.get("tasks", ())]
    return sections


def _weights(source: Any) -> Any:
    """A task source without its place: what its tasks count, and which of lm-eval's it names."""
    if not isinstance(source, Mapping):
        return source
    rest = {}
    for key, value in source.items():
        if key not in ("file", "dataset", "split"):
            rest[key] = value
    return rest


def _flat(data: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        path = join(at, str(key))
        if isinstance(value, Mapping):
            flat |= _flat(value, path)
        else:
            flat[path] = value
    return flat
