"""From a study file to a search that is ready to run: prepare, open, resume.

`prepare` (prepare.py) touches nothing. `open_study` opens the ledger and checks that the study has
not changed since it began. `resume` loads the model and the judge. Everything that a user can get
wrong is raised before the first trial.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from evomerge.answering.cache import AnswerCache, cache_scope
from evomerge.answering.engine import Engine, EngineSpec
from evomerge.answering.lm_eval.harness import LmEvalRunner
from evomerge.answering.make_engine import make_engine
from evomerge.answering.prompts import make_prompter
from evomerge.console import Console
from evomerge.errors import StudyError, StudyFileError
from evomerge.judging.factory import check_tasks, make_judge
from evomerge.judging.grade import Judge, WaitingJudge
from evomerge.merging.adapters.lora import AdaptedModel
from evomerge.merging.checkpoints.fingerprint import combined, fingerprint
from evomerge.merging.checkpoints.model_folder import ModelFolder
from evomerge.searching.assemble import judged_search, lm_eval_search
from evomerge.searching.ledger import (
    Ledger,
    cache_path,
    check_unchanged,
    grades_path,
    only_worker,
    open_ledger,
)
from evomerge.searching.loop import Search
from evomerge.searching.prepare import Prepared, held_out_examples, prepare
from evomerge.searching.records.study_facts import SplitKeys, StudyFacts
from evomerge.searching.starting.source_study import start_from_source
from evomerge.searching.starting.warm_start import check_warm_start
from evomerge.study import Study
from evomerge.tasks import stored_ids, tasks_hash


@contextmanager
def open_search(study: Study, url: str, console: Console) -> Iterator[Search]:
    """A search ready to run or to resume. Raises InputError, EngineError, JudgeError."""
    prepared = prepare(study, console.say)
    with only_worker(url, study.study):
        ledger = open_study(prepared, url, console)
        with resume(prepared, ledger, url, console) as search:
            yield search


def open_study(prepared: Prepared, url: str, console: Console) -> Ledger:
    """Step two: the study's ledger, new or as it was left.

    Raises StudyError when the study has changed since it began.
    """
    study, genome, sampler = prepared.study, prepared.genome, prepared.sampler
    ledger = open_ledger(url, study.study, sampler.space, create=True)
    check_unchanged(ledger, _facts(prepared, ledger.facts))
    known = tuple(tuple(vector.tolist()) for vector in sampler.known_candidates)
    if ledger.facts.known_candidates not in (None, known):
        raise StudyError(
            "a file of search.recipes has changed",
            where=ledger.name,
            remedy="Undo the change, or start a new study with --study NEW_NAME.",
        )
    ledger.remember("known_candidates", known)
    start_from_source(study, url, genome, ledger)
    _introduce(prepared, console)
    return ledger


@contextmanager
def resume(prepared: Prepared, ledger: Ledger, url: str, console: Console) -> Iterator[Search]:
    """Step three: engine, judge and cache, ready where the ledger stops.

    They are closed at the end. Raises InputError, EngineError, JudgeError.
    """
    study, judge = prepared.study, None
    if prepared.lm_eval is None:
        judge = _open_judge(prepared, url, ledger)
    engine = make_engine(EngineSpec.of_study(study, prepared.base, prepared.siblings))
    cache = AnswerCache(cache_path(url, study.study), cache_scope(study, dict(ledger.facts.models)))
    drain = True
    try:
        if judge is None:
            yield _resume_lm_eval(prepared, ledger, console, engine, cache)
        else:
            if study.search.warm_start is not None:
                check_warm_start(prepared.genome, prepared.split.search, engine)
            prompter = make_prompter(
                engine.tokenizer, study.prompt, study.generation, prepared.chooser, engine.context
            )
            yield judged_search(
                prepared, ledger, console, engine, prompter=prompter, judge=judge, cache=cache
            )
    except KeyboardInterrupt:
        drain = False  # do not wait for a server
        raise
    finally:
        if isinstance(judge, WaitingJudge):
            judge.close(drain)
        cache.close()


def _resume_lm_eval(
    prepared: Prepared, ledger: Ledger, console: Console, engine: Engine, cache: AnswerCache
) -> Search:
    """Build lm-eval's prompts; refuse a study whose prompts have changed since it began."""
    assert prepared.lm_eval is not None
    if engine.likelihood is None:
        raise StudyFileError(
            "lm-eval needs a transformers model",
            where="engine.kind",
            found=prepared.study.engine.kind,
            remedy="Leave it out.",
        )
    runner = LmEvalRunner(prepared.lm_eval, engine)
    for warning in runner.warnings:
        console.say(f"warning: {warning}")
    if ledger.facts.prompts not in (None, runner.prompts):
        raise StudyError(
            "the prompts have changed since the study began",
            where=ledger.name,
            remedy="Start a new study with --study NEW_NAME.",
        )
    ledger.remember("prompts", runner.prompts)
    return lm_eval_search(prepared, ledger, console, engine, runner=runner, cache=cache)


def _open_judge(prepared: Prepared, url: str, ledger: Ledger) -> Judge:
    """The study's judge.

    Raises TaskError when it does not know the tasks, StudyError when another judge graded so far.
    """
    study = prepared.study
    judge = make_judge(
        study.judge, grades_path(url, study.study), study.search.seed, engine=study.engine
    )
    check_tasks(judge, prepared.tasks)
    named = f"{judge.name} {judge.version}"
    before = ledger.facts.judge or named
    if before != named:
        if isinstance(judge, WaitingJudge):
            judge.close()
        raise StudyError(
            "the judge is not the one that the study began with",
            where=ledger.name,
            found=f"{named}, before: {before}",
            remedy="Undo the change, or start a new study with --study NEW_NAME.",
        )
    ledger.remember("judge", named)
    return judge


def _facts(prepared: Prepared, known: StudyFacts) -> StudyFacts:
    """The facts of the study from its files, which are compared when it resumes."""
    study, split, chooser = prepared.study, prepared.split, prepared.chooser
    models = [prepared.base, *prepared.siblings]
    files = {}
    for ref, model in zip(study.genome.all_models, models, strict=True):
        files[ref] = _prints(model, known.files.get(ref, {}))
    return StudyFacts(
        study_file=study.to_dict(),
        models={ref: combined(prints) for ref, prints in files.items()},
        files=files,
        tasks=tasks_hash(prepared.tasks),
        split=SplitKeys(
            stored_ids(split.search), stored_ids(split.validation), stored_ids(split.held_out)
        ),
        names=known.names or tuple(prepared.genome.names),
        n_layers=prepared.genome.slices[-1][1],
        knowledge=None if chooser is None else chooser.knowledge.digest(),
    )


def _prints(model: ModelFolder, known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The fingerprint of the folder's files, and for MODEL+ADAPTER of the adapter's after them."""
    prints = fingerprint(model.path, known)
    if isinstance(model, AdaptedModel):
        mark = "adapter/"
        old = {k.removeprefix(mark): known[k] for k in known if k.startswith(mark)}
        for name, value in fingerprint(model.adapter, old).items():
            prints[mark + name] = value
    return prints


def _introduce(prepared: Prepared, console: Console) -> None:
    """Report what the search covers."""
    study, split, genome = prepared.study, prepared.split, prepared.genome
    size = f"{len(genome.slices)} slices x {len(genome.siblings)} sibling(s)"
    if genome.dimensions != len(genome.slices) * len(genome.siblings):
        size += f", {genome.dimensions} numbers"
    kept = ""
    if split.validation:
        kept = f", {len(split.validation)} to validate the finalists"
    console.say(
        f"study {study.study}: {size}, {len(split.search)} tasks to search on, "
        f"{len(split.held_out)} held out{kept}, {study.search.trials} candidates in generations of "
        f"{prepared.sampler.population}"
    )
    known = 0
    if prepared.chooser is not None:
        known = held_out_examples(prepared.chooser.knowledge, split)
    if known:
        console.say(
            f"note: {known} example(s) of the knowledge base are held-out tasks, and may appear in "
            "the prompts of other tasks"
        )
