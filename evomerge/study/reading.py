"""YAML in, one validated, frozen study out. A mergekit-evolve configuration is read as it is."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from evomerge.errors import InputError, StudyFileError
from evomerge.study.convert import build, flatten, join
from evomerge.study.rules import check_genome, check_judge, check_lm_eval, check_study_file
from evomerge.study.sections import LM_EVAL_KEYS, JudgeSection, Study

# Keys that a finished or running study may change: they say when to stop and how to reach the
# judge, not what is searched.
STOPPING_KEYS = (
    *(
        f"search.{key}"
        for key in ("trials", "time_limit", "max_cost", "hourly_price", "min_sigma", "patience")
    ),
    *(
        f"judge.{key}"
        for key in (
            "base_url",
            "concurrency",
            "requests_per_minute",
            "retries",
            "back_off",
            "timeout",
            "asks",
        )
    ),
    *(
        f"judge.{key}"
        for key in ("max_requests", "max_tokens", "max_cost", "input_price", "output_price")
    ),
)


def read_study(
    path: str | Path, overrides: Sequence[str] = (), environ: Mapping[str, str] = os.environ
) -> Study:
    """Read, override, resolve and check a study file.

    `overrides` are "a.b=value" texts. Paths become absolute; `${NAME}` is taken from `environ`.
    Raises StudyFileError.
    """
    path = Path(path)
    if not path.is_file():
        raise StudyFileError(
            "no such study file", where=path, remedy="The files that ship lie in search_spaces/."
        )
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise StudyFileError(
            f"not valid YAML: {error}", where=path, remedy="Mend the line named."
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
    data.setdefault("study", path.stem)
    return study_from_mapping(data, path.resolve().parent, overrides, environ, str(path))


def study_from_mapping(
    content: Mapping[str, Any],
    folder: Path,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
    where: str = "study",
) -> Study:
    """As `read_study`, from a study file's content; paths are relative to `folder`."""
    data = copy.deepcopy(dict(content))
    for override in overrides:
        _override(data, override)
    data = _expand(data, environ, where, "")
    data.setdefault("study", "study")
    read_mergekit_evolve(data, where)
    study = typing.cast(Study, build(Study, data, "", where))
    study = resolve_paths(study, folder)
    check_study_file(study, where)
    check_genome(study, where)
    check_lm_eval(study, where)
    check_judge(study.judge, where)
    return study


def overridden(study: Study, overrides: Sequence[str], allowed: Sequence[str]) -> Study:
    """A study with "a.b=value" texts on top, checked as a file is; keys that begin with none of
    `allowed` are refused.

    Paths are relative to the working directory. Raises InputError, StudyFileError.
    """
    data = study.to_dict()
    for override in overrides:
        key = override.partition("=")[0]
        if not any(key == known or key.startswith(f"{known}.") for known in allowed):
            raise InputError(
                "--set: the key changes nothing here",
                found=override,
                remedy=f"Keys are those of {', '.join(allowed)}.",
            )
        _override(data, override)
    changed = typing.cast(Study, build(Study, data, "", "--set"))
    if overrides:
        changed = dataclasses.replace(changed, prompt=resolve_paths(changed, Path.cwd()).prompt)
        check_study_file(changed, "--set")
    return changed


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two `to_dict`s, stopping keys left out."""
    with contextlib.suppress(StudyFileError):  # it may hold what this version does not know
        # keys that are younger than the study have their defaults
        old = Study.from_dict(old).to_dict()
    a, b = flatten(old), flatten(new)
    return [
        key
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and key not in STOPPING_KEYS
    ]


def read_judge(settings: Mapping[str, Any], where: str) -> JudgeSection:
    """A judge's keys, outside a study, checked as in one. Raises StudyFileError."""
    section = typing.cast(JudgeSection, build(JudgeSection, dict(settings), "judge", where))
    check_judge(section, where)
    return section


def read_setting(text: str) -> tuple[str, Any]:
    """KEY=VALUE of --set, the value as YAML. Raises InputError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(
            "--set wants KEY=VALUE", found=text, remedy="For example --set search.trials=24."
        )
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(
            "--set: the value is no YAML", found=text, remedy="Quote it, and close what is open."
        ) from error


def read_mergekit_evolve(data: dict[str, Any], where: str) -> None:
    """Task names and paths as plain texts become what we hold; keys that would change nothing are
    refused.
    """
    if isinstance(data.get("tasks"), list):
        data["tasks"] = [
            {"name": entry} if isinstance(entry, str) else entry for entry in data["tasks"]
        ]
    if isinstance(data.get("task_search_path"), str):
        data["task_search_path"] = [data["task_search_path"]]
    listed = data.get("tasks") if isinstance(data.get("tasks"), list) else []
    sources = [entry for entry in listed or [] if isinstance(entry, dict)]
    if any("name" in entry for entry in sources):
        for key in ("judge", "prompt", "generation", "objective"):
            if key in data:
                raise StudyFileError(
                    f"`{key}` changes nothing: lm-eval tasks bring their own",
                    where=where,
                    remedy="Remove it.",
                )
        data["judge"] = {"kind": "lm-eval", "metric": "score"}
        # metrics are over all documents
        for section, key, value in (("search", "ranking", "all"), ("split", "validation", 0.0)):
            if isinstance(data.setdefault(section, {}), dict):
                data[section].setdefault(key, value)
        return
    wrong = [key for key in LM_EVAL_KEYS if key in data]
    wrong += [f"tasks[{i}].metric" for i, entry in enumerate(sources) if "metric" in entry]
    # of several, it says what each counts
    wrong += ["tasks[0].weight"] if len(sources) == 1 and "weight" in sources[0] else []
    judge = data["judge"] if isinstance(data.get("judge"), dict) else {}
    wrong += [f"judge.{key}" for key, value in judge.items() if value in ("lm-eval", "score")]
    if wrong:
        raise StudyFileError(
            f"`{wrong[0]}` goes with lm-eval tasks, and there are none",
            where=where,
            remedy="Remove it.",
        )


def resolve_paths(study: Study, folder: Path) -> Study:
    """Paths become absolute, relative to the study file's folder; hub names stay as they are."""

    def place(ref: str) -> str:
        looks_local = ref.startswith((".", "/", "~")) or (folder / ref).exists()
        return str((folder / Path(ref).expanduser()).resolve()) if looks_local else ref

    def model(ref: str) -> str:
        # MODEL+ADAPTER
        return place(ref) if (folder / ref).exists() else "+".join(map(place, ref.split("+")))

    g = study.genome
    genome = dataclasses.replace(
        g,
        base_model=None if g.base_model is None else model(g.base_model),
        models=tuple(map(model, g.models)),
        tokenizer_source=g.tokenizer_source
        if g.tokenizer_source in (None, "base", "union")
        else model(g.tokenizer_source),
    )
    tasks = tuple(
        dataclasses.replace(source, file=str((folder / Path(source.file).expanduser()).resolve()))
        if source.file
        else source
        for source in study.tasks
    )
    folders = tuple(
        str((folder / Path(path).expanduser()).resolve()) for path in study.task_search_path
    )
    j = study.judge
    judge = dataclasses.replace(
        j,
        file=None if j.file is None else str((folder / Path(j.file).expanduser()).resolve()),
        model=place(j.model) if j.kind == "local" and j.model is not None else j.model,
    )
    p = study.prompt
    prompt = dataclasses.replace(
        p,
        knowledge=None
        if p.knowledge is None
        else str((folder / Path(p.knowledge).expanduser()).resolve()),
    )
    recipes = tuple(
        str((folder / Path(path).expanduser()).resolve()) for path in study.search.recipes
    )
    search = dataclasses.replace(study.search, recipes=recipes)
    return dataclasses.replace(
        study,
        genome=genome,
        tasks=tasks,
        task_search_path=folders,
        judge=judge,
        search=search,
        prompt=prompt,
    )


def _override(data: dict[str, Any], override: str) -> None:
    key, value = read_setting(override)
    *parents, last = key.split(".")
    target = data
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise InputError(
                f"--set: `{parent}` holds no keys",
                found=override,
                remedy="Name a key such as search.trials.",
            )
    target[last] = value


def _expand(value: Any, environ: Mapping[str, str], where: str, at: str) -> Any:
    if isinstance(value, dict):
        return {k: _expand(v, environ, where, join(at, str(k))) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, environ, where, f"{at}[{i}]") for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match[str]) -> str:
        if match[1] not in environ:
            raise StudyFileError(
                f"`{at}` uses ${{{match[1]}}}, which is not set",
                where=where,
                remedy=f"Set the environment variable {match[1]}.",
            )
        return environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", lookup, value)
