"""The five public functions, which the commands call too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.api.inputs import (
    Overrides,
    RecipeLike,
    StudyFile,
    Tasks,
    gpu_memories,
    recipe_inputs,
    result_files,
    results_folder,
    searched_study,
    storage_url,
    to_recipe,
    to_tasks,
)
from evomerge.api.loaded_study import LoadedStudy, build_model_folder
from evomerge.errors import InputError
from evomerge.outputs import check_outputs

if TYPE_CHECKING:
    from evomerge.console import Console
    from evomerge.inference.request import Classify
    from evomerge.inference.result import InferenceResult
    from evomerge.judging.grade import Judge
    from evomerge.searching.preflight import PreflightFinding
    from evomerge.study import Study


def search(
    study_file: StudyFile,
    *,
    storage: str | Path | None = None,
    results: str | Path | None = None,
    study: str | None = None,
    trials: int | None = None,
    seed: int | None = None,
    overrides: Overrides = None,
    console: Console | None = None,
) -> LoadedStudy:
    """Run a study, or resume it, and write its results.

    Parameters
    ----------
    study_file: a YAML file; or its content as a mapping, with paths relative to the working
        directory; or a Study.
    storage: any Optuna storage URL, or the path of an SQLite file (default: $EVOMERGE_STORAGE, or
        storage/NAME.db).
    results: the folder that NAME/best.yaml, report.html, … go to (default: $EVOMERGE_RESULTS, or
        results/).
    study: the study's name (default: `study:` in the file, or the file's stem; "study" for a
        mapping without a name).
    trials, seed: short for the overrides search.trials and search.seed.
    overrides: settings of the study file by dotted keys: {"search.trials": 24}.
    console: where progress goes (default: stderr): evomerge.console.Console(stream).

    Returns
    -------
    The finished study. Calling again with more trials resumes it.

    Raises
    ------
    StudyFileError, StudyError, ModelError, TaskError, KnowledgeError: something in the study is
    wrong or has changed since it began. EngineError, JudgeError: the run failed; everything up to
    then is stored, and the same call resumes.

    >>> found = evomerge.search("search_spaces/demo.yaml", trials=24)
    >>> found.winner.score, found.recipe_yaml
    """
    checked = searched_study(study_file, overrides, study, trials, seed)
    # these imports take seconds; a mistake in the file is reported before them
    from evomerge.console import Console
    from evomerge.searching.open_search import open_search

    url = storage_url(storage, checked.study)
    _check_search_outputs(study_file, checked, url, results)
    with open_search(checked, url, console or Console()) as running:
        running.run()
    found = load_study(checked.study, storage=url)
    return replace(found, written=tuple(found.write_results(results)))


def _check_search_outputs(
    study_file: StudyFile, study: Study, url: str, results: str | Path | None
) -> None:
    """Raise InputError where storage or results would overwrite what the search reads."""
    from evomerge.searching.records.storage_place import storage_place
    from evomerge.study import files_read

    own = Path(study_file) if isinstance(study_file, str | Path) else None
    written = result_files(results_folder(results, study.study))
    check_outputs(files=[storage_place(url).file, *written], inputs=[own, *files_read(study)])


def check(
    study_file: StudyFile,
    *,
    base_config: str | Path | None = None,
    storage: str | Path | None = None,
    results: str | Path | None = None,
    study: str | None = None,
    trials: int | None = None,
    seed: int | None = None,
    overrides: Overrides = None,
    gpus: str | Sequence[str] = (),
) -> list[PreflightFinding]:
    """Report what a study needs and what `search` would refuse, before any work.

    Models, shapes, tokenizer, prompts, judge (its server is asked for its models), disk, memory,
    cost, and whether a study that has begun can resume. Nothing is written.

    Parameters
    ----------
    study_file, storage, results, study, trials, seed, overrides: as for `search`.
    base_config: a config.json to use if the base model cannot be reached.
    gpus: memory of GPUs, such as 24GB, for which to plan what is kept where.

    Returns
    -------
    Findings with a `level` (ok, low: it may not suffice, unknown: it could not be reached, wrong),
    a `subject` and a `text`.

    Raises
    ------
    StudyFileError: the study file itself is wrong. InputError: a GPU's memory is no size.

    >>> [finding.text for finding in evomerge.check("study.yaml") if finding.level == "wrong"]
    []
    """
    checked = searched_study(study_file, overrides, study, trials, seed)
    memories = gpu_memories(gpus)
    from evomerge.searching.preflight import PreflightFinding, check_study

    config = None if base_config is None else Path(base_config)
    url, folder = storage_url(storage, checked.study), results_folder(results, checked.study)
    findings = check_study(checked, config, url, folder, memories)
    try:
        _check_search_outputs(study_file, checked, url, results)
    except InputError as error:
        findings.append(PreflightFinding("wrong", "outputs", str(error)))
    return findings


def merge(
    recipe: RecipeLike,
    out: str | Path,
    *,
    shard_size: str | int = "5GB",
    random_seed: int = 0,
    console: Console | None = None,
) -> Path:
    """Merge a mergekit configuration to a new model folder.

    mergekit itself, when installed, merges what evomerge does not support.

    Parameters
    ----------
    recipe: a YAML file, its content as a mapping, or a Recipe. Only a file can go to mergekit.
    out: a new folder.
    shard_size: the largest weight file: "5GB", "200M" or bytes.
    random_seed: decides which numbers DARE drops, as in mergekit.
    console: where progress goes (default: stderr): evomerge.console.Console(stream).

    Returns
    -------
    The folder, written whole or not at all.

    Raises
    ------
    RecipeError, ModelError, InputError (the folder exists), OutputError (full disk).

    >>> evomerge.merge("best.yaml", "merged/")
    """
    from evomerge.console import Console
    from evomerge.errors import InputError, UnsupportedRecipe
    from evomerge.merging.mergekit import is_installed, merge_with_mergekit

    console = console or Console()
    if not 0 <= random_seed < 2**32:
        raise InputError(
            "is out of range",
            where="random_seed",
            found=random_seed,
            remedy=f"Use a whole number from 0 to {2**32 - 1}.",
        )
    try:
        own = Path(recipe) if isinstance(recipe, str | Path) else None
        check_outputs(folders=[out], inputs=[own])
        parsed, text = to_recipe(recipe)
        if parsed.note is not None:
            console.say(parsed.note if own is None else f"{own}: {parsed.note}")
        check_outputs(folders=[out], inputs=recipe_inputs(parsed))
        return build_model_folder(parsed, Path(out), text, shard_size, random_seed, console)
    except UnsupportedRecipe as error:  # found before anything is written
        if not is_installed() or not isinstance(recipe, str | Path):
            raise
        found = "" if error.found is None else f" ({error.found})"
        console.say(f"{error.where or recipe}: {error.what}{found}; mergekit merges it instead")
        return merge_with_mergekit(Path(recipe), Path(out), shard_size, random_seed, console.status)


def infer(
    tasks: Tasks,
    *,
    out: str | Path | None = None,
    model: str | Path | None = None,
    recipe: RecipeLike | None = None,
    study: str | None = None,
    server: str | None = None,
    storage: str | Path | None = None,
    concurrency: int | None = None,
    knowledge: str | Path | None = None,
    classify: Classify = "neighbours",
    max_new_tokens: int | None = None,
    overrides: Overrides = None,
    best_of: int | None = None,
    judge: Judge | str | None = None,
    self_check: Sequence[str] | str = (),
    time_limit: float | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> InferenceResult:
    """Answer tasks with a model, a recipe merged in memory, a study's winner, or a server.

    Parameters
    ----------
    tasks: a task file, or records with a field `input`.
    out: a file for the answers, which a later call resumes (default: none is kept).
    overwrite: give up answers that `out` holds of another model, task file or settings.
    model: a folder or hub name; with `server` (a URL), the server's name for the model.
    recipe: as for `merge`. study, storage: as for `load_study`.
    concurrency: concurrent requests to the server.
    knowledge, classify: a knowledge base, and how tasks get their class: "neighbours", "model" or
        "both".
    max_new_tokens: the longest answer. overrides: settings of a study file, for this run.
    best_of, judge: answer that often, keep the best by "rules", "learned:FILE", …, or agreement.
    self_check: faults for which a task is retried: "all", or empty, repetitive, language, cut.
    time_limit: in seconds; then what exists is returned. console: as for `merge`.

    Returns
    -------
    The answers in the order of the tasks. Raises InputError, ModelError, TaskError, EngineError, …

    >>> [a.output for a in evomerge.infer([{"input": "逆順:あいう"}], model="demo/base")]
    """
    from evomerge.api.infer_steps import make_request, run_request

    request = make_request(
        model=model, recipe=recipe, study=study, storage=storage, server=server,
        concurrency=concurrency, knowledge=knowledge, classify=classify, overrides=overrides,
        max_new_tokens=max_new_tokens, best_of=best_of, judge=judge, self_check=self_check,
        time_limit=time_limit, overwrite=overwrite,
    )  # fmt: skip
    task_file = Path(tasks) if isinstance(tasks, str | Path) else None
    return run_request(request, to_tasks(tasks), out, console, task_file)


def load_study(name: str, *, storage: str | Path | None = None) -> LoadedStudy:
    """A study by its name, finished or still running: trials, verdict, winner, plots.

    Parameters
    ----------
    name: the study's name.
    storage: as for `search`. A read-only copy of an SQLite file suffices.

    Returns
    -------
    What the storage holds now; load it again to see later trials.

    Raises
    ------
    StudyError: there is no such study, or none of its candidates is finished.

    >>> evomerge.load_study("demo").trials.nlargest(3, "score")
    """
    from evomerge.searching.snapshot import load_snapshot

    url = storage_url(storage, name)
    return LoadedStudy(load_snapshot(url, name), url)
