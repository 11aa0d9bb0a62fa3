"""YAML in, one validated, frozen study out. A mergekit-evolve configuration is read unchanged."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.errors import InputError, StudyFileError
from evomerge.files import is_there
from evomerge.study.environment import expanded, texts_with_variables
from evomerge.study.judge_keys import JudgeSection
from evomerge.study.mergekit_evolve import read_mergekit_evolve
from evomerge.study.messages import validated
from evomerge.study.prompt_keys import PromptSection
from evomerge.study.section import STORED
from evomerge.study.study_file import Study
from evomerge.yaml_json import parse_yaml, read_yaml


def read_study(
    path: str | Path, overrides: Sequence[str] = (), environ: Mapping[str, str] = os.environ
) -> Study:
    """Read, override, resolve and check a study file.

    `overrides` are "a.b=value" texts. Paths become absolute, relative to the file's folder;
    `${NAME}` is taken from `environ`, and stored and shown as it is written. Raises
    StudyFileError, InputError.
    """
    path = Path(path)
    data = _read_file(path)
    data.setdefault("study", path.stem)
    return study_from_mapping(data, path.resolve().parent, overrides, environ, str(path))


def study_from_mapping(
    content: Mapping[str, Any],
    folder: Path,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
    where: str = "study file",
) -> Study:
    """Read a study from the content of a study file; its paths are relative to `folder`."""
    data = copy.deepcopy(dict(content))
    for override in overrides:
        _override(data, override)
    written = dict(texts_with_variables(data))
    data = expanded(data, environ, where)
    data.setdefault("study", "study")
    read_mergekit_evolve(data, where)
    study = validated(Study, data, where, folder=folder).with_variables(written, environ, folder)
    for place in study.task_search_path:
        if not Path(place).is_dir():
            raise StudyFileError(
                "no such folder",
                where=f"{where}: task_search_path",
                found=place,
                remedy="Name folders with task YAMLs.",
            )
    return study


def overridden(study: Study, overrides: Sequence[str], allowed: Sequence[str]) -> Study:
    """A study with "a.b=value" texts on top, checked as a file is.

    Keys that begin with none of `allowed` are refused. Paths are relative to the working
    directory. Raises InputError, StudyFileError.
    """
    data = study.filled()
    for override in overrides:
        key = override.partition("=")[0]
        if not any(key == known or key.startswith(f"{known}.") for known in allowed):
            raise InputError(
                "--set: the key has no effect here",
                found=override,
                remedy=f"Keys are those of {', '.join(allowed)}.",
            )
        _override(data, override)
    same = data["study"] == study.study and data["search"] == study.filled()["search"]
    changed = validated(Study, data, "--set", folder=STORED if same else None)
    changed = changed.with_variables_of(study)
    if not overrides:
        return changed
    prompt = validated(PromptSection, data["prompt"], "--set", "prompt", Path.cwd())
    return changed.replace(prompt=prompt)


def read_judge(settings: Mapping[str, Any], where: str) -> JudgeSection:
    """A judge's keys, outside a study, checked as in one. Raises StudyFileError."""
    return validated(JudgeSection, settings, where, "judge")


def read_setting(text: str) -> tuple[str, Any]:
    """KEY=VALUE of --set, the value as YAML. Raises InputError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(
            "--set needs KEY=VALUE", found=text, remedy="For example --set search.trials=24."
        )
    try:
        return key, parse_yaml(value, "--set")
    except InputError as error:
        raise InputError(
            f"--set: the value is {error.what}",
            found=text,
            remedy="Quote it, and close every bracket.",
        ) from error


def _read_file(path: Path) -> dict[str, Any]:
    if not is_there(path):
        raise StudyFileError(
            "no such study file", where=path, remedy="Examples are in search_spaces/."
        )
    data = read_yaml(path, StudyFileError)
    if not isinstance(data, dict):
        raise StudyFileError(
            "is not a mapping of keys",
            where=path,
            found=data,
            remedy="See search_spaces/demo.yaml.",
        )
    return data


def _override(data: dict[str, Any], override: str) -> None:
    key, value = read_setting(override)
    *parents, last = key.split(".")
    target = data
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise InputError(
                f"--set: `{parent}` has no keys",
                found=override,
                remedy="Name a key such as search.trials.",
            )
    target[last] = value
