"""From a study file to a search that is ready to run: prepare, open, resume.

`prepare` (prepare.py) touches nothing. `open_study` opens the ledger and checks that the study has
not changed since it began. `resume` loads the model and the judge. Everything that a user can get
wrong is raised before the first trial.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from evomerge.answering.cache import AnswerCache, cache_scope
from evomerge.answering.engine import Engine, EngineSpec
from evomerge.answering.lm_eval.harness import LmEvalRunner
from evomerge.answering.make_engine import make_engine
from evomerge.answering.prompts import Prompter, make_prompter
from evomerge.console import Console, counted
from evomerge.errors import StudyError, StudyFileError
from evomerge.judging.factory import check_tasks, make_judge
from evomerge.judging.grade import Judge, WaitingJudge
from evomerge.searching.assemble import judged_search, lm_eval_search
from evomerge.searching.ledger import (
    Ledger,
    cache_path,
    grades_path,
    only_worker,
    open_ledger,
)
from evomerge.searching.loop import Search
from evomerge.searching.preflight.verdict_power import grade_scale, verdict_power
from evomerge.searching.prepare import Prepared, held_out_examples, prepare
from evomerge.searching.starting.recognise import BEGINNING, CHANGING, compared, facts_of
from evomerge.searching.starting.source_study import start_from_source
from evomerge.searching.starting.warm_start import check_demanded_start
from evomerge.study import Study, as_begun


@contextmanager
def open_search(study: Study, url: str, console: Console) -> Iterator[Search]:
    """A search ready to run or to resume. Raises InputError, EngineError, JudgeError.

    A new study is stored with its first trial: where something is refused, nothing is left.
    """
    stored = open_ledger(url, study.study, create=True).facts.study_file
    prepared = prepare(as_begun(study, stored), console.say)
    with only_worker(url, study.study) as guard, nothing_left(url, study.study) as began:
        ledger = open_study(prepared, url, console)
        ledger.storage.guard = guard
        began.append(ledger)
        with resume(prepared, ledger, url, console) as search:
            yield search


@contextmanager
def nothing_left(url: str, name: str) -> Iterator[list[Ledger]]:
    """Remove the answers and grades files of a study that was refused before its first trial."""
    files = (cache_path(url, name), grades_path(url, name))
    made = [path for path in files if not path.exists()]
    ledgers: list[Ledger] = []
    try:
        yield ledgers
    finally:
        if all(ledger.storage.is_new for ledger in ledgers):
            for path in made:
                with suppress(OSError):
                    path.unlink()


def open_study(prepared: Prepared, url: str, console: Console) -> Ledger:
    """Step two: the study's ledger, new or as it was left.

    Raises StudyError when the study has changed since it began.
    """
    study, genome, sampler = prepared.study, prepared.genome, prepared.sampler
    ledger = open_ledger(url, study.study, sampler.space, create=True)
    facts = facts_of(prepared, ledger.facts)
    if not ledger.storage.is_new:
        ledger = compared(ledger, facts, sampler.space)
    if ledger.storage.is_new:
        for key in BEGINNING:
            ledger.remember(key, getattr(facts, key))
        start_from_source(study, url, genome, ledger)
    else:
        _keep_first_engine(ledger, study, console)
        old = ledger.facts
        for key in BEGINNING:  # an older version did not store them all
            before, now = getattr(old, key), getattr(facts, key)
            if before != now and (key in CHANGING or not before):
                ledger.remember(key, now)
        # facts are without the secrets that older versions stored
        if ledger.storage.attributes()["study_file"] != facts.study_file:
            ledger.remember("study_file", facts.study_file)
    _introduce(prepared, console)
    return ledger


def _keep_first_engine(ledger: Ledger, study: Study, console: Console) -> None:
    """Keep the number of threads that the study began with, by which its answers are kept."""
    facts = ledger.facts
    before, now = facts.study.engine.threads, study.engine.threads
    if before == now:
        return
    if "threads" not in facts.first_engine:
        ledger.remember("first_engine", {"threads": before})
    console.say(
        f"note: engine.threads was {before or facts.threads or 'left to torch'} and is now "
        f"{now or facts.threads or 'left to torch'}: sums are rounded in another order, which may "
        "change a word of an answer"
    )


@contextmanager
def resume(prepared: Prepared, ledger: Ledger, url: str, console: Console) -> Iterator[Search]:
    """Step three: engine, judge and cache, ready where the ledger stops.

    They are closed at the end. Raises InputError, EngineError, JudgeError.
    """
    study, judge, cache = prepared.study, None, None
    if prepared.lm_eval is None:
        judge = _open_judge(prepared, url, ledger)
    drain = True
    try:
        # a single model, whose own layers are scaled, is merged all the same
        siblings = prepared.siblings or [prepared.base]
        engine = make_engine(EngineSpec.of_study(study, prepared.base, siblings))
        settle_threads(study, ledger, engine, console)
        prompter = None
        if judge is not None:
            prompter = _prompter(prepared, engine)
        if ledger.storage.is_new:
            _check_first_trial(prepared, engine, prompter)
        # answers are kept under the names that the models had when the study began
        first = dict(ledger.facts.models)
        names = dict(zip(study.genome.all_models, first, strict=True))
        scope = cache_scope(study, first, ledger.facts.first_engine, engine.marks)
        cache = AnswerCache(cache_path(url, study.study), scope, names)
        if judge is None or prompter is None:
            yield _resume_lm_eval(prepared, ledger, console, engine, cache)
        else:
            yield judged_search(
                prepared, ledger, console, engine, prompter=prompter, judge=judge, cache=cache
            )
    except KeyboardInterrupt:
        drain = False  # do not wait for a server
        raise
    finally:
        if isinstance(judge, WaitingJudge):
            judge.close(drain)
        if cache is not None:
            cache.close()


def settle_threads(study: Study, ledger: Ledger, engine: Engine, console: Console) -> None:
    """Answer with as many CPU threads as the study did so far.

    Sums over many numbers depend on them in the last bits. Where the study file names none, a new
    study of a small model tries which number is the fastest, and keeps it.
    """
    if study.engine.threads is not None or engine.likelihood is None:
        return
    import torch

    from evomerge.answering.hf.threads import fastest_threads

    chosen = ledger.facts.threads
    if chosen is None and ledger.storage.is_new:
        chosen = fastest_threads(engine.likelihood.model)
        if chosen is not None:
            ledger.remember("threads", chosen)
            console.say(f"{chosen} of {torch.get_num_threads()} CPU threads are the fastest")
    if chosen is not None:
        torch.set_num_threads(chosen)


def _prompter(prepared: Prepared, engine: Engine) -> Prompter:
    """The study's prompts. Raises InputError, StudyFileError where there can be no warm start."""
    study = prepared.study
    check_demanded_start(study, prepared.genome, prepared.split.search, engine)
    return make_prompter(
        engine.tokenizer, study.prompt, study.generation, prepared.chooser, engine.context
    )


def _check_first_trial(prepared: Prepared, engine: Engine, prompter: Prompter | None) -> None:
    """Raise what the first trials would: a prompt without room, a merge that is not possible."""
    split, genome = prepared.split, prepared.genome
    for part in (split.search, split.validation, split.held_out):
        if prompter is not None:
            prompts = prompter.prepare([task.input for task in part])
            engine.batches([prompt.text for prompt in prompts], prompter.settings(prompts))
    _, vector = genome.references(prepared.study.search.uniform)[0]
    engine.apply(genome.decode(vector))


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
    if before != named and not _moved(before, judge):
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


def _moved(before: str, judge: Judge) -> bool:
    """Whether a stored judge is this local one, whose model's folder had another name."""
    local = before.startswith("local:") and judge.name.startswith("local:")
    return local and before.rpartition(" ")[2] == judge.version


def _introduce(prepared: Prepared, console: Console) -> None:
    """Report what the search covers."""
    study, split, genome = prepared.study, prepared.split, prepared.genome
    size = f"{len(genome.slices)} slices x {counted(len(genome.siblings), 'sibling')}"
    if genome.dimensions != len(genome.slices) * len(genome.siblings):
        size += f", {genome.dimensions} numbers to search"
    kept = ""
    if split.validation:
        kept = f", {len(split.validation)} to validate the finalists"
    console.say(
        f"study {study.study}: {size}, {len(split.search)} tasks to search on, "
        f"{len(split.held_out)} held out{kept}, {study.search.trials} candidates in generations of "
        f"{prepared.sampler.population}"
    )
    power = verdict_power(len(split.held_out), study.metric, scale=grade_scale(study))
    if power is not None:
        console.say(power.sentence())
    known = 0
    if prepared.chooser is not None:
        known = held_out_examples(prepared.chooser.knowledge, split)
    if known:
        console.say(
            f"note: {known} example(s) of the knowledge base are held-out tasks, and may appear in "
            "the prompts of other tasks"
        )
