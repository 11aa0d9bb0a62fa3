"""From a study file, or a study's name, to everything that a search or its winner needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evomerge.answering.cache import AnswerCache
from evomerge.answering.hf import TransformersEngine
from evomerge.answering.prompts import make_prompter
from evomerge.console import Console
from evomerge.errors import StudyError
from evomerge.genome import Genome, make_genome
from evomerge.judging.rules import RulesJudge
from evomerge.merging.fingerprint import combined, fingerprint
from evomerge.merging.layout import ModelFolder, check_fit, num_layers, open_model
from evomerge.recipe import Recipe
from evomerge.search.ledger import Ledger, TrialRecord, check_unchanged, only_worker, open_ledger, sqlite_path
from evomerge.search.loop import Search, cache_scope
from evomerge.search.sampler import ReplayedCmaEs
from evomerge.search.verdict import choose_winner
from evomerge.study import Study
from evomerge.tasks import Split, Task, load_dataset_tasks, load_tasks, split_tasks, tasks_hash


@contextmanager
def open_search(study: Study, url: str, console: Console) -> Iterator[Search]:
    """A search ready to run or to go on. Everything the user can get wrong is raised here, before any work."""
    tasks = study_tasks(study)
    split = split_tasks(tasks, study.split.held_out, study.split.seed)
    base, siblings = open_models(study)
    genome = make_genome(study, num_layers(base.config))
    sampler = make_sampler(study, genome)
    with only_worker(url, study.study):
        ledger = open_ledger(url, study.study, sampler, create=True)
        facts = _facts(study, genome, tasks, split, [base, *siblings], ledger)
        check_unchanged(ledger, facts)
        console.say(
            f"study {study.study}: {len(genome.slices)} slices x {len(siblings)} sibling(s), {len(split.search)} tasks to search on, "
            f"{len(split.held_out)} held out, {study.search.trials} candidates in generations of {sampler.population}"
        )
        engine = TransformersEngine(base, siblings, study.engine, study.generation, study.search.dtype, study.search.seed)
        prompter = make_prompter(engine.tokenizer, study.prompt)
        cache = AnswerCache(cache_path(url, study.study), cache_scope(study, facts["models"]))
        try:
            yield Search(study, genome, split, engine, prompter, RulesJudge(), ledger, cache, console)
        finally:
            cache.close()


def make_sampler(study: Study, genome: Genome) -> ReplayedCmaEs:
    """The study's sampler; the declared range also holds the parents and the uniform weights."""
    low, high = study.bounds
    declared = (min(low, 0.0, *study.search.uniform), max(high, 1.0, *study.search.uniform))
    s = study.search
    return ReplayedCmaEs(genome.names, study.bounds, declared, s.start, s.sigma, s.population, s.seed)


def study_tasks(study: Study) -> tuple[Task, ...]:
    """The tasks of every source; ids get the source's number in front where there are several sources."""
    groups = [load_tasks(s.file) if s.file else load_dataset_tasks(s.dataset or "", s.split) for s in study.tasks]
    if len(groups) == 1:
        return groups[0]
    return tuple(replace(task, task_id=f"{i}-{task.task_id}") for i, group in enumerate(groups) for task in group)


def open_models(study: Study) -> tuple[ModelFolder, list[ModelFolder]]:
    """Base and siblings, checked to fit each other."""
    base = open_model(study.genome.base_model)
    siblings = [open_model(ref) for ref in study.genome.models]
    check_fit(base, siblings)
    return base, siblings


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
    if "study_file" not in facts or not any(r.role == "candidate" and r.state == "complete" for r in records):
        raise StudyError("the study has no finished candidate yet", where=name, remedy="Run `evomerge search` until it has one.")
    study = Study.from_dict(facts["study_file"])
    genome = make_genome(study, facts["n_layers"])
    winner = winner_of(facts, records, study.judge.metric)
    return Finished(ledger, study, genome, records, winner, facts.get("verdict"))


def winner_of(facts: dict[str, Any], records: Sequence[TrialRecord], metric: str) -> TrialRecord:
    """The trial that the verdict names, or the choice by the trials so far."""
    number = facts.get("finalists", {}).get("winner")
    return next((r for r in records if r.number == number), None) or choose_winner(records, metric)


def cache_path(url: str, name: str) -> Path:
    """The answer cache lies beside an SQLite study, else in storage/."""
    path = sqlite_path(url)
    return (path.parent if path else Path("storage")) / f"{name}.answers.sqlite"


def _facts(
    study: Study, genome: Genome, tasks: Sequence[Task], split: Split, models: Sequence[ModelFolder], ledger: Ledger
) -> dict[str, Any]:
    known = ledger.facts.get("files", {})
    refs = [study.genome.base_model, *study.genome.models]
    files = {ref: fingerprint(Path(m.path), known.get(ref)) for ref, m in zip(refs, models, strict=True)}
    return {
        "study_file": study.to_dict(),
        "models": {ref: combined(prints) for ref, prints in files.items()},
        "tasks": tasks_hash(tasks),
        "split": {"search": [t.task_id for t in split.search], "held_out": [t.task_id for t in split.held_out]},
        "names": list(genome.names),
        "n_layers": genome.slices[-1][1],
        "files": files,
    }
