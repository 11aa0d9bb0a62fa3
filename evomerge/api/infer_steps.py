"""`infer` in two steps, so that the command can check its options before it loads anything."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.api.inputs import (
    Overrides,
    RecipeLike,
    recipe_inputs,
    setting_texts,
    storage_url,
    study_inputs,
    to_recipe,
)
from evomerge.console import Console, duration
from evomerge.errors import RecipeError
from evomerge.inference.request import Classify, InferenceRequest, check_request
from evomerge.outputs import check_outputs

if TYPE_CHECKING:
    from evomerge.inference.result import InferenceResult
    from evomerge.inference.run import Progress
    from evomerge.judging.grade import Judge
    from evomerge.tasks import Task


def make_request(
    *,
    model: str | Path | None,
    recipe: RecipeLike | None,
    study: str | None,
    storage: str | Path | None,
    server: str | None,
    concurrency: int | None,
    knowledge: str | Path | None,
    classify: Classify,
    overrides: Overrides,
    max_new_tokens: int | None,
    best_of: int | None,
    judge: Judge | str | None,
    self_check: Sequence[str] | str,
    time_limit: float | None,
    overwrite: bool = False,
) -> InferenceRequest:
    """The parameters of `infer` as a request, not yet checked."""
    settings = setting_texts(overrides)
    if knowledge is not None:
        path = json.dumps(str(knowledge), ensure_ascii=False)
        # a study's default class is one of its own knowledge base
        settings = [f"prompt.knowledge={path}", "prompt.default_class=null", *settings]
    merged = None
    if recipe is not None:
        merged = Path(recipe) if isinstance(recipe, str | Path) else to_recipe(recipe)[0]
    return InferenceRequest(
        model=None if model is None else str(model),
        recipe=merged,
        study=study,
        storage=None if study is None else storage_url(storage, study),
        server=server,
        concurrency=concurrency,
        overrides=tuple(settings),
        max_new_tokens=max_new_tokens,
        classify=classify,
        best_of=best_of,
        judge=judge,
        self_check=_fault_names(self_check),
        time_limit=time_limit,
        overwrite=overwrite,
    )


def _fault_names(faults: Sequence[str] | str) -> tuple[str, ...]:
    """Names of faults from a list, or from "all" or "empty,cut"."""
    if not isinstance(faults, str):
        return tuple(faults)
    if faults == "all":
        from evomerge.inference.selfcheck import SERIOUS

        return tuple(SERIOUS)
    return tuple(faults.split(","))


def run_request(
    request: InferenceRequest,
    tasks: Sequence[Task],
    out: str | Path | None = None,
    console: Console | None = None,
    task_file: Path | None = None,
) -> InferenceResult:
    """Check the request, answer the tasks, and read the answers back.

    `task_file` is where the tasks come from. Raises as the steps do, and InputError where `out` or
    a file beside it is something that is read.
    """
    check_request(request)
    if out is not None:
        from evomerge.inference.part import written_files

        check_outputs(files=written_files(Path(out)), inputs=[task_file, *_inputs(request)])
    from evomerge.inference.request import answer_tasks
    from evomerge.inference.result import read_result

    console = console or Console()
    progress = answer_progress(console)
    if out is not None:
        done = answer_tasks(request, tasks, Path(out), progress, console.say)
        return read_result(Path(out), done, Path(out))
    with tempfile.TemporaryDirectory(prefix="evomerge-") as folder:
        written = Path(folder) / "answers.jsonl"
        done = answer_tasks(request, tasks, written, progress, console.say)
        return read_result(written, done, None)


def _inputs(request: InferenceRequest) -> list[str | Path | None]:
    """What a request reads besides its tasks."""
    from evomerge.recipe import Recipe, read_recipe
    from evomerge.study import read_setting

    places: list[str | Path | None] = []
    if request.server is None:
        places.append(request.model)
    recipe = request.recipe
    if isinstance(recipe, Path):
        places.append(recipe)
        with suppress(RecipeError):  # it is raised again when the recipe is opened
            recipe = read_recipe(recipe)
    if isinstance(recipe, Recipe):
        places += recipe_inputs(recipe)
    if request.study is not None and request.storage is not None:
        from evomerge.searching.ledger import open_ledger

        stored = open_ledger(request.storage, request.study).facts.study
        places += study_inputs(stored, request.storage, request.study)
    for text in request.overrides:
        key, value = read_setting(text)
        if key == "prompt.knowledge" and value is not None:
            places.append(str(value))
    if isinstance(request.judge, str):
        places.append(request.judge.partition(":")[2])
    return places


def answer_progress(console: Console) -> Progress:
    """Shows how many tasks are answered, and the time left at the pace of this run."""
    began = time.monotonic()
    first: int | None = None  # answers of an earlier run say nothing about the pace

    def progress(done: int, total: int) -> None:
        nonlocal first
        if first is None:
            first = done
        left = ""
        if first < done < total:
            pace = (time.monotonic() - began) / (done - first)
            left = f"  ETA {duration(pace * (total - done))}"
        console.status(f"answered {done}/{total}{left}")

    return progress
