"""From a study file, or a study's name, to everything that a search or its winner needs."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evomerge.answering.cache import AnswerCache, cache_scope
from evomerge.answering.choose import make_engine
from evomerge.answering.engine import Engine, EngineSpec
from evomerge.answering.lm_eval.documents import LmEvalTasks
from evomerge.answering.prompts import Prompter, make_prompter
from evomerge.console import Console
from evomerge.errors import StudyError, StudyFileError
from evomerge.genome.weights import Genome, make_genome
from evomerge.judging.choose import check_tasks, make_judge
from evomerge.judging.grade import Judge, WaitingJudge
from evomerge.knowledge.open import open_knowledge
from evomerge.knowledge.parts import Knowledge
from evomerge.knowledge.retrieval.nearest import bare
from evomerge.merging.checkpoints.compatibility import check_fit
from evomerge.merging.checkpoints.fingerprint import combined, fingerprint
from evomerge.merging.checkpoints.lora import AdaptedModel
from evomerge.merging.checkpoints.model_folder import ModelFolder, num_layers
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.recipe import Recipe
from evomerge.searching.ledger import (
    Ledger,
    TrialRecord,
    check_unchanged,
    only_worker,
    open_ledger,
    sqlite_path,
)
from evomerge.searching.loop import Search
from evomerge.searching.sampler import ReplayedCmaEs
from evomerge.searching.starting import first_vectors, remember_start, restore_start, source_url
from evomerge.searching.verdict import choose_winner
from evomerge.searching.warm_start import check_warm_start
from evomerge.study import JudgeSection, Study
from evomerge.tasks import Split, Task, load_dataset_tasks, load_tasks, split_tasks, tasks_hash


@contextmanager
def open_search(study: Study, url: str, console: Console) -> Iterator[Search]:
    """A search ready to run or to go on. Everything the user can get wrong is raised here, before
    any work.
    """
    lm_eval = LmEvalTasks(study) if study.lm_eval else None
    tasks = study_tasks(study) if lm_eval is None else lm_eval.tasks
    split = split_tasks(tasks, study.split.held_out, study.split.seed, study.split.validation)
    if lm_eval is not None:
        lm_eval.check_split(split)
    base, siblings = open_models(study)
    genome = make_genome(study, num_layers(base.config))
    check_filters(genome, base)
    chooser = open_knowledge(study.prompt, console.say)
    sampler = make_sampler(study, genome)
    with only_worker(url, study.study):
        ledger = open_ledger(url, study.study, sampler, create=True)
        facts = _facts(study, genome, tasks, split, [base, *siblings], ledger)
        facts["knowledge"] = None if chooser is None else chooser.knowledge.digest()
        check_unchanged(ledger, facts)
        _keep_first(sampler, ledger)
        restore_start(sampler, ledger.facts)
        _start_from_source(study, url, genome, sampler, ledger)
        kept = f", {len(split.validation)} for the choice of the winner" if split.validation else ""
        console.say(
            f"study {study.study}: {_size(genome)}, {len(split.search)} tasks to search on, "
            f"{len(split.held_out)} held out{kept}, {study.search.trials} candidates in generations of {sampler.population}"
        )
        if chooser is not None and (known := held_out_examples(chooser.knowledge, split)):
            console.say(
                f"note: {known} example(s) of the knowledge base are held-out tasks, which it shows to other tasks"
            )
        judge = None if lm_eval is not None else _open_judge(study, url, ledger, tasks)
        engine = make_engine(EngineSpec.of_study(study, base, siblings))
        if lm_eval is not None:
            if engine.likelihood is None:
                raise StudyFileError(
                    "lm-eval asks a transformers model",
                    where="engine.kind",
                    found=study.engine.kind,
                    remedy="Leave it out.",
                )
            _prepare(lm_eval, engine, ledger, console)
        if study.search.warm_start is not None:
            check_warm_start(genome, split.search, engine)
        make = make_prompter if lm_eval is None else Prompter
        prompter = make(engine.tokenizer, study.prompt, study.generation, chooser, engine.context)
        cache = AnswerCache(cache_path(url, study.study), cache_scope(study, facts["models"]))
        drain = True
        try:
            yield Search(
                study,
                genome,
                split,
                engine,
                prompter,
                judge or make_judge(JudgeSection()),
                ledger,
                cache,
                console,
                lm_eval,
            )
        except KeyboardInterrupt:
            drain = False  # no server is waited for
            raise
        finally:
            if isinstance(judge, WaitingJudge):
                judge.close(drain)
            cache.close()


def held_out_examples(knowledge: Knowledge, split: Split) -> int:
    """How many of the base's examples are tasks that the search must not see."""
    unseen = {bare(task.input) for task in (*split.held_out, *split.validation)}
    return sum(bare(example.input) in unseen for example in knowledge.examples)


def _open_judge(study: Study, url: str, ledger: Ledger, tasks: Sequence[Task]) -> Judge:
    """The study's judge; refuse one that does not know the tasks, or that is another than the one
    that graded so far.
    """
    judge = make_judge(
        study.judge, grades_path(url, study.study), study.search.seed, engine=study.engine
    )
    check_tasks(judge, tasks)
    who = f"{judge.name} {judge.version}"
    known = ledger.facts.get("judge", who)
    if known != who:
        if isinstance(judge, WaitingJudge):
            judge.close()
        raise StudyError(
            "the judge is not the one that the study began with",
            where=ledger.name,
            found=f"{who}, before: {known}",
            remedy="Undo the change, or start anew with --study NEW_NAME.",
        )
    ledger.remember("judge", who)
    return judge


def _prepare(lm_eval: LmEvalTasks, engine: Engine, ledger: Ledger, console: Console) -> None:
    """Build the prompts; refuse a study whose examples, chat template or lm-eval ask otherwise than
    when it began.
    """
    prompts = lm_eval.prepare(engine)
    for warning in lm_eval.warnings:
        console.say(f"warning: {warning}")
    if ledger.facts.get("prompts", prompts) != prompts:
        raise StudyError(
            "the prompts have changed since the study began",
            where=ledger.name,
            remedy="Start anew with --study NEW_NAME.",
        )
    ledger.remember("prompts", prompts)


def make_sampler(
    study: Study, genome: Genome, first: Sequence[Sequence[float]] | None = None
) -> ReplayedCmaEs:
    """The study's sampler; the declared range also holds the parents, the uniform weights and known
    candidates.

    `first` are the known candidates as a study remembers them; None: as its file names them.
    """
    s = study.search
    first = first_vectors(study, genome) if first is None else first
    vectors = [*(vector for _, vector in genome.references(s.uniform)), *first]
    bounds = [(gene.low, gene.high) for gene in genome.genes]
    declared = [
        (min(low, *numbers), max(high, *numbers))
        for (low, high), *numbers in zip(bounds, *vectors, strict=True)
    ]
    starts, scales = [gene.start for gene in genome.genes], [gene.scale for gene in genome.genes]
    if study.random_init:
        rng = random.Random(f"start/{s.seed}")
        starts = [rng.uniform(gene.low, gene.high) for gene in genome.genes]
    return ReplayedCmaEs(
        genome.names,
        bounds,
        declared,
        starts,
        s.sigma,
        s.population,
        s.seed,
        scales,
        lr_adapt=s.lr_adapt,
        first=first,
    )


def _keep_first(sampler: ReplayedCmaEs, ledger: Ledger) -> None:
    """Remember the known candidates: a study is replayed with those that it began with."""
    ours = [[float(x) for x in vector] for vector in sampler.first]
    if ledger.facts.get("first", ours) != ours:
        raise StudyError(
            "a file of search.recipes has changed",
            where=ledger.name,
            remedy="Undo it, or start anew with --study NEW_NAME.",
        )
    ledger.remember("first", ours)


def _start_from_source(
    study: Study, url: str, genome: Genome, sampler: ReplayedCmaEs, ledger: Ledger
) -> None:
    """Begin with the distribution of `search.source_study` as it is now: it is remembered."""
    if study.search.source_study is None or "start" in ledger.facts:
        return
    name = study.search.source_study
    if name == study.study or not re.fullmatch(r"[\w.-]+", name):
        raise StudyError(
            "is no other study",
            where="search.source_study",
            found=name,
            remedy="Name a study of this storage.",
        )
    source = open_ledger(source_url(url, study), name)
    facts = source.facts
    if facts.get("names") != list(genome.names):
        raise StudyError(
            "the source study searches other numbers",
            where=source.name,
            remedy="Leave out search.source_study.",
        )
    theirs = Study.from_dict(facts["study_file"])
    replayed = make_sampler(theirs, make_genome(theirs, facts["n_layers"]), facts.get("first", []))
    restore_start(replayed, facts)
    trials = source.trials()
    if not replayed.complete_generations(trials):
        raise StudyError(
            "the source study has no complete generation yet",
            where=source.name,
            remedy="Let it go on first.",
        )
    remember_start(sampler, replayed.distribution(trials), ledger)


def check_filters(genome: Genome, base: ModelFolder) -> None:
    """Raise StudyFileError for a filter that no tensor's name holds: its numbers would change
    nothing.
    """
    for text in genome.filters:
        if not any(text in name for name in base.keys):
            raise StudyFileError(
                "no tensor has this in its name",
                where="genome.filters",
                found=text,
                remedy="Write self_attn or mlp, for example.",
            )


def study_tasks(study: Study) -> tuple[Task, ...]:
    """The tasks of every source; ids get the source's number in front where there are several
    sources.
    """
    if study.lm_eval:
        return LmEvalTasks(study).tasks
    groups = [
        load_tasks(s.file) if s.file else load_dataset_tasks(s.dataset or "", s.split)
        for s in study.tasks
    ]
    if len(groups) == 1:
        return groups[0]
    return tuple(
        replace(task, task_id=f"{i}-{task.task_id}")
        for i, group in enumerate(groups)
        for task in group
    )


def open_models(study: Study) -> tuple[ModelFolder, list[ModelFolder]]:
    """The base, or what stands for it (the first model), and the others, checked to fit each other."""
    base, *others = [open_model(ref) for ref in study.genome.all_models]
    check_fit(base, others, same_vocabulary=study.genome.tokenizer_source is None)
    return base, others


@dataclass(frozen=True)
class Finished:
    """What a study holds after its search: for showing, exporting and inference."""

    ledger: Ledger
    study: Study
    genome: Genome
    records: list[TrialRecord]
    winner: TrialRecord
    verdict: dict[str, Any] | None

    @property
    def recipe(self) -> Recipe:
        """The winner's recipe."""
        return self.genome.decode(self.winner.weights)


def load_finished(url: str, name: str) -> Finished:
    """A study by name. Raises StudyError when it is unknown or has no finished candidate yet."""
    ledger = open_ledger(url, name)
    facts = ledger.facts
    records = ledger.records()
    if "study_file" not in facts or not any(
        r.role == "candidate" and r.state == "complete" for r in records
    ):
        raise StudyError(
            "the study has no finished candidate yet",
            where=name,
            remedy="Run `evomerge search` until it has one.",
        )
    study = Study.from_dict(facts["study_file"])
    genome = make_genome(study, facts["n_layers"])
    winner = winner_of(facts, records, study.metric)
    return Finished(ledger, study, genome, records, winner, facts.get("verdict"))


def winner_of(facts: dict[str, Any], records: Sequence[TrialRecord], metric: str) -> TrialRecord:
    """The trial that the verdict names, or the choice by the trials so far."""
    number = facts.get("finalists", {}).get("winner")
    return next((r for r in records if r.number == number), None) or choose_winner(records, metric)


def cache_path(url: str, name: str) -> Path:
    """The answer cache lies beside an SQLite study, else in storage/."""
    path = sqlite_path(url)
    return (path.parent if path else Path("storage")) / f"{name}.answers.sqlite"


def grades_path(url: str, name: str) -> Path:
    """Where the llm judge's grades lie: beside the answers."""
    return cache_path(url, name).with_name(f"{name}.grades.sqlite")


def _facts(
    study: Study,
    genome: Genome,
    tasks: Sequence[Task],
    split: Split,
    models: Sequence[ModelFolder],
    ledger: Ledger,
) -> dict[str, Any]:
    known = ledger.facts.get("files", {})
    files = {
        ref: _prints(m, known.get(ref))
        for ref, m in zip(study.genome.all_models, models, strict=True)
    }
    return {
        "study_file": study.to_dict(),
        "models": {ref: combined(prints) for ref, prints in files.items()},
        "tasks": tasks_hash(tasks),
        "split": {
            part: [t.task_id for t in getattr(split, part)]
            for part in ("search", "validation", "held_out")
        },
        "names": list(genome.names),
        "n_layers": genome.slices[-1][1],
        "files": files,
    }


def _prints(model: ModelFolder, known: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The folder's files, and for MODEL+ADAPTER the adapter's after them."""
    prints = fingerprint(model.path, known)
    if isinstance(model, AdaptedModel):
        mark = "adapter/"
        old = {
            name.removeprefix(mark): value
            for name, value in (known or {}).items()
            if name.startswith(mark)
        }
        prints |= {mark + name: value for name, value in fingerprint(model.adapter, old).items()}
    return prints


def _size(genome: Genome) -> str:
    """What the search is over, in words."""
    text = f"{len(genome.slices)} slices x {len(genome.siblings)} sibling(s)"
    return (
        text
        if genome.dimensions == len(genome.slices) * len(genome.siblings)
        else f"{text}, {genome.dimensions} numbers"
    )
