"""YAML in, one validated, frozen study out. A mergekit-evolve configuration is read unchanged."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from evomerge.errors import InputError, StudyFileError
from evomerge.study.environment import expanded, texts_with_variables
from evomerge.study.judge_keys import JudgeSection
from evomerge.study.mergekit_evolve import read_mergekit_evolve
from evomerge.study.messages import validated
from evomerge.study.prompt_keys import PromptSection
from evomerge.study.study_file import Study


def read_study(
    path: str | Path, overrides: Sequence[str] = (), environ: Mapping[str, str] = os.environ
) -> Study:
    """Read, override, resolve and check a study file.

    `overrides` are "a.b=value" texts. Paths become absolute, relative to the file's folder;
    `${NAME}` is taken from `environ`, and stored and shown as it is written. Raises
    StudyFileError, InputError.
    """
    path = Path(path)
    data = _read_yaml(path)
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
    changed = validated(Study, data, "--set").with_variables_of(study)
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
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(
            "--set: the value is not valid YAML",
            found=text,
            remedy="Quote it, and close every bracket.",
        ) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise StudyFileError(
            "no such study file", where=path, remedy="Examples are in search_spaces/."
        )
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        if "expected a single document" in str(error):
            raise StudyFileError(
                "holds several YAML documents", where=path, remedy="Split it: one study a file."
            ) from None
        raise StudyFileError(
            f"not valid YAML: {error}", where=path, remedy="Fix the line named."
        ) from error
    except UnicodeDecodeError as error:
        raise StudyFileError("is not UTF-8", where=path, remedy="Save it as UTF-8.") from error
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
