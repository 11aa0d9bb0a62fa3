"""What the public functions accept: study files, recipes, tasks, settings, places."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from evomerge.console import parse_size
from evomerge.errors import InputError, StudyError

if TYPE_CHECKING:
    from evomerge.recipe import Recipe
    from evomerge.study import Study
    from evomerge.tasks import Task

LONGEST_OLD_NAME = 240  # bytes: more than new studies may have
LONGEST_STUDY_FILE = 1 << 20  # bytes that are looked at
LEAST_GPU, MOST_GPU = 10**9, 10**15  # bytes

Overrides: TypeAlias = Mapping[str, object] | Sequence[str] | None
StudyFile: TypeAlias = "str | Path | Mapping[str, Any] | Study"
RecipeLike: TypeAlias = "str | Path | Mapping[str, Any] | Recipe"
Tasks: TypeAlias = "str | Path | Iterable[Mapping[str, Any] | Task]"


def setting_texts(overrides: Overrides) -> list[str]:
    """Overrides as "a.b=value" texts, which is how the command line writes them."""
    if overrides is None:
        return []
    if not isinstance(overrides, Mapping):
        return list(overrides)
    texts = []
    for key, value in overrides.items():
        plain = str(value) if isinstance(value, Path) else value
        try:
            texts.append(f"{key}={json.dumps(plain, ensure_ascii=False)}")
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"cannot be written as JSON: {error}",
                where=f"overrides, {key}",
                remedy="Use texts, numbers, lists and mappings.",
            ) from error
    return texts


def to_study(study_file: StudyFile, overrides: Sequence[str]) -> Study:
    """A validated study; the paths of a mapping are relative to the working directory."""
    from evomerge.study import overridden, read_study
    from evomerge.study.reading import study_from_mapping

    if isinstance(study_file, str | Path):
        return read_study(study_file, overrides)
    if isinstance(study_file, Mapping):
        return study_from_mapping(study_file, Path.cwd(), overrides)
    return overridden(study_file, overrides, allowed=tuple(study_file.to_dict()))


def searched_study(
    study_file: StudyFile,
    overrides: Overrides,
    study: str | None,
    trials: int | None,
    seed: int | None,
) -> Study:
    """The study that `search` runs and `check` looks at."""
    settings = setting_texts(overrides)
    for key, value in (("study", study), ("search.trials", trials), ("search.seed", seed)):
        if value is not None:
            settings.append(f"{key}={json.dumps(value, ensure_ascii=False)}")
    return to_study(study_file, settings)


def to_recipe(recipe: RecipeLike) -> tuple[Recipe, str]:
    """A recipe, and its configuration as it was written."""
    from evomerge.recipe import Recipe, read_recipe

    if isinstance(recipe, str | Path):
        return read_recipe(recipe), Path(recipe).read_text(encoding="utf-8")
    if isinstance(recipe, Mapping):
        recipe = Recipe.from_dict(recipe)
    return recipe, recipe.to_yaml()


def to_tasks(tasks: Tasks) -> tuple[Task, ...]:
    """Tasks from a file, or from records with a field `input`. Raises TaskError."""
    from evomerge.tasks import load_tasks, tasks_from_rows

    if isinstance(tasks, str | Path):
        return load_tasks(tasks)
    rows = []
    for i, task in enumerate(tasks):
        row = task if isinstance(task, Mapping) else vars(task)
        rows.append((f"task {i}", row))
    return tasks_from_rows(rows, where="tasks")


def storage_url(storage: str | Path | None, name: str) -> str:
    """The URL of a study's storage: any of Optuna's, or the path of an SQLite file.

    None: $EVOMERGE_STORAGE, else sqlite:///storage/NAME.db. Raises StudyError for what no study
    can be called.
    """
    if not re.fullmatch(r"[\w.-]+", name) or len(name.encode()) > LONGEST_OLD_NAME:
        raise StudyError("is not a study's name", found=name, remedy="Name a study.")
    return given_url(storage or os.environ.get("EVOMERGE_STORAGE") or f"storage/{name}.db")


def given_url(storage: str | Path) -> str:
    """The URL of a storage that is given as one, or as the path of an SQLite file."""
    given = str(storage)
    if "://" in given:
        return given
    if set("?%") & set(given):  # they mean something in a URL
        from evomerge.searching.records.storage_place import file_url

        return file_url(Path(given))
    return f"sqlite:///{given}"


def study_inputs(study: Study, url: str, name: str) -> list[str | Path | None]:
    """Everything that a study reads, and where it is stored: what no output may overwrite."""
    from evomerge.searching.ledger import cache_path, grades_path
    from evomerge.searching.records.storage_place import storage_place
    from evomerge.study import files_read

    stored = storage_place(url).file
    kept = [cache_path(url, name), grades_path(url, name)]
    if stored is not None:
        kept.append(stored)
    return [*files_read(study), *kept]


def results_folder(results: str | Path | None, name: str) -> Path:
    """The folder of a study's results; None: $EVOMERGE_RESULTS, else results/; NAME is added.

    Older studies may have names such as `..`, which are no names of folders.
    """
    from evomerge.study.section import is_study_name

    folder = name if is_study_name(name) else f"study_{name}"
    return Path(results or os.environ.get("EVOMERGE_RESULTS") or "results") / folder


def recipe_inputs(recipe: Recipe) -> list[str]:
    """The models that a recipe reads."""
    lender = recipe.tokenizer and recipe.tokenizer.source
    if lender in (None, "base", "union"):
        return list(recipe.models)
    return [*recipe.models, str(lender)]


def result_files(folder: Path) -> list[Path]:
    """The files that a study's results may have."""
    from evomerge.reporting.export import RESULT_FILES

    return [folder / name for name in RESULT_FILES]


def check_no_study_file(out: Path) -> None:
    """Raise InputError where the file is a study file, which a study does not know by its name."""
    if not out.is_file():  # a device or a pipe may never end
        return
    try:
        with out.open("rb") as file:
            text = file.read(LONGEST_STUDY_FILE)
    except OSError:
        return
    if re.search(rb"^[\"']?genome[\"']?[ \t]*:", text, re.MULTILINE):
        raise InputError(
            "is a study file, which would be overwritten",
            where=out,
            remedy="Name another file to write.",
        )


def gpu_memories(gpus: str | Sequence[str]) -> list[int]:
    """Bytes of each GPU, written as `24GB`. Raises InputError below a gigabyte, or for no size."""
    memories = []
    for text in [gpus] if isinstance(gpus, str) else gpus:
        memory = 0
        with suppress(InputError):
            memory = parse_size(text)
        if not LEAST_GPU <= memory <= MOST_GPU:
            raise InputError(
                "is not the memory of a GPU", where="--gpu", found=text, remedy="Write 24GB."
            )
        memories.append(memory)
    return memories
