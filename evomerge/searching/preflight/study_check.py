"""`evomerge check`: every finding on one study, before any work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from evomerge.errors import EvomergeError, InputError, ModelError, StudyError
from evomerge.genome.genome import Genome, make_genome
from evomerge.merging.checkpoints.compatibility import check_fit
from evomerge.merging.checkpoints.model_folder import ModelFolder, num_layers
from evomerge.merging.checkpoints.model_kind import blame_config
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.searching.answer_room import with_room_for_prompts
from evomerge.searching.generation.learning import telling_tasks
from evomerge.searching.ledger import Ledger, open_ledger
from evomerge.searching.preflight.answers_check import check_engine, check_judge, check_prompts
from evomerge.searching.preflight.findings import Findings, PreflightFinding
from evomerge.searching.preflight.gpu_check import check_gpus
from evomerge.searching.preflight.merge_check import check_first_merge, try_own_method
from evomerge.searching.preflight.needs import check_memory_and_disk, check_slices, cost
from evomerge.searching.preflight.verdict_power import advice, grade_scale, verdict_power
from evomerge.searching.prepare import prepare, study_tasks
from evomerge.searching.records.identity import changes, refused
from evomerge.searching.records.storage_place import storage_place
from evomerge.searching.records.study_facts import StudyFacts
from evomerge.searching.records.trial_record import TrialRecord
from evomerge.searching.samplers.cmaes_adapter import default_population
from evomerge.searching.starting.recognise import facts_of
from evomerge.searching.starting.warm_start import (
    BATCH,
    CLIMBED,
    GRADIENT,
    check_demanded_start,
    climbed_by_default,
    warm_start_obstacle,
)
from evomerge.study import Study, as_begun
from evomerge.tasks import Split, split_tasks
from evomerge.yaml_json import read_json_object


def check_study(
    study: Study,
    base_config: Path | None = None,
    url: str | None = None,
    results: Path | None = None,
    gpus: Sequence[int] = (),
) -> list[PreflightFinding]:
    """Every finding, good or bad; nothing is raised for what a user can fix, nothing is written.

    `base_config` is used when the base cannot be reached. `url` is the storage, where the study may
    have begun already, `results` the folder of its results, and `gpus` bytes of memory.
    """
    findings = Findings()
    begun, references = _begun(url, study.study), tuple[TrialRecord, ...]()
    if begun is not None:
        study, references = as_begun(study, begun.facts.study_file), begun.history().references
    config = None
    if base_config is not None:
        config = _config_file(findings, base_config)
    opened = _models(findings, study)
    sound = _configs_are_sound(findings, opened)
    if not sound:
        opened = []
    if opened:
        note = partial(findings.add, "ok", "generation")
        study = with_room_for_prompts(study, opened[0], note)
    split = _tasks(findings, study)
    check_engine(findings, study)
    check_judge(findings, study, split)
    if opened:
        with findings.refusals("fit"):
            same = study.genome.tokenizer_source is None
            check_fit(opened[0], opened[1:], same_vocabulary=same)
            shared = frozenset.intersection(*(model.keys for model in opened))
            findings.add("ok", "shapes", f"{len(shared)} tensors, the same in every model")
        with findings.refusals("tokenizer"):
            check_prompts(findings, study, opened[0], split)
        config = dict(opened[0].config)
    if sound:
        _slices_and_sizes(findings, study, config, split, references, gpus)
    _places(findings, url, results)
    if opened and findings.all_well:
        _search_itself(findings, study, url)
    return findings.lines


def _config_file(findings: Findings, path: Path) -> dict[str, Any] | None:
    """A model's config.json; None when it cannot be read."""
    try:
        return read_json_object(path)
    except InputError as error:
        findings.add("wrong", "--base-config", str(error))
        return None


def _models(findings: Findings, study: Study) -> list[ModelFolder]:
    """Every model, the base first; none where one cannot be reached."""
    opened = []
    refs = study.genome.all_models
    for ref in refs:
        role = "base" if ref == study.genome.base_model else "sibling"
        try:
            opened.append(open_model(ref))
            findings.add("ok", role, ref)
        except ModelError as error:
            findings.add("wrong" if _is_here(ref) else "unknown", role, str(error))
    return opened if len(opened) == len(refs) else []


def _configs_are_sound(findings: Findings, models: Sequence[ModelFolder]) -> bool:
    """Whether transformers can make a model of every config.json, of the types it knows."""
    for model in models:
        before = len(findings.lines)
        with findings.refusals("config.json"):
            num_layers(model.config, model.path)
            blame_config(model.config, model.path)
        if len(findings.lines) > before:
            return False
    return True


def _is_here(ref: str) -> bool:
    """Whether a reference names a folder of this machine, there or not, and no name on the hub."""
    path = Path(ref.partition("+")[0])
    return path.is_absolute() or len(path.parts) != 2 or path.parent.is_dir()


def _tasks(findings: Findings, study: Study) -> Split | None:
    """The tasks by their parts; None where they are not known."""
    parts = study.split
    try:
        tasks = study_tasks(study)
        split = split_tasks(tasks, parts.held_out, parts.seed, parts.validation)
    except EvomergeError as error:
        local = any(source.file or source.name for source in study.tasks)
        findings.add("wrong" if local else "unknown", "tasks", str(error))
        return None
    text = f"{len(split.search)} to search on, {len(split.held_out)} held out"
    if split.validation:
        text += f", {len(split.validation)} to validate the finalists"
    findings.add("ok", "tasks", text)
    return split


def _slices_and_sizes(
    findings: Findings,
    study: Study,
    config: dict[str, Any] | None,
    split: Split | None,
    references: Sequence[TrialRecord],
    gpus: Sequence[int],
) -> None:
    """What is searched, what it needs and what it can show."""
    if config is None:
        text = "not known until every model is found; --base-config FILE helps without the base"
        findings.add("unknown", "slices, memory, disk", text)
        return
    with findings.refusals("slices"):
        genome = make_genome(study, num_layers(config))
        check_slices(findings, genome)
        try:
            check_memory_and_disk(findings, study, config)
            check_gpus(findings, study, config, gpus)
        except KeyError as error:
            text = f"the configuration has no {error}, so that sizes are not known"
            findings.add("unknown", "memory, disk", text)
        findings.add("ok", "cost", cost(study, genome, split))
        if split is not None:
            _start_and_verdict(findings, study, genome, split, references)


def _start_and_verdict(
    findings: Findings,
    study: Study,
    genome: Genome,
    split: Split,
    references: Sequence[TrialRecord],
) -> None:
    """Whether gradient steps come first, what the verdict can show, and which settings may not do.

    `references` are the study's parents and uniform weights, if it has begun.
    """
    search, searched = study.search, len(split.search)
    if search.warm_start is not None and not study.lm_eval:
        obstacle = warm_start_obstacle(study, genome, split.search)
        text = f"no gradient steps: {obstacle}"
        if obstacle is None:
            answers = search.warm_start_steps * min(BATCH, searched) * GRADIENT
            kind = search.demanded_start or climbed_by_default(genome, split.search)
            text = f"{search.warm_start_steps} gradient steps on {CLIMBED[kind]}, about as long as "
            text += f"{answers:,} answers"
        findings.add("ok", "start", text)
    telling = (0, 0)
    power = verdict_power(len(split.held_out), study.metric, references, grade_scale(study))
    if power is not None:
        findings.add("ok", "verdict", power.sentence())
    if references:
        telling = telling_tasks(references, study.metric)
        text = f"{telling[0]} of {telling[1]} search tasks tell parents and uniform weights apart"
        findings.add("ok", "tasks", text)
    population = search.population or default_population(genome.dimensions)
    ranked = search.first_tasks(searched)
    for sentence in advice(*telling, ranked, population, search.trials):
        findings.add("low", "search", sentence)


def _begun(url: str | None, name: str) -> Ledger | None:
    """The stored study where it can be read; what is wrong with its storage is said elsewhere."""
    try:
        return None if url is None else _stored_study(url, name)
    except EvomergeError:
        return None


def _places(findings: Findings, url: str | None, results: Path | None) -> None:
    """Whether storage and results can be written."""
    places = {"--results": results}
    if url is not None:
        with findings.refusals("--storage"):
            file = storage_place(url).file
            places["--storage"] = None if file is None else Path(file).parent
    for name, folder in places.items():
        if folder is None:
            continue
        there = folder.absolute()
        while not there.exists() and there != there.parent:
            there = there.parent
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            text = f"{folder}: cannot be made or written. Name another folder."
            findings.add("wrong", name, text)


def _search_itself(findings: Findings, study: Study, url: str | None) -> None:
    """What a search does before it loads a model: whatever it refuses is wrong."""
    with findings.refusals("search"):
        stored = None if url is None else _stored_study(url, study.study)
        facts = StudyFacts() if stored is None else stored.facts
        prepared = prepare(as_begun(study, facts.study_file), lambda note: None)
        check_demanded_start(study, prepared.genome, prepared.split.search)
        tried = try_own_method(prepared)
        if tried is not None:
            findings.add("ok", "method", f"{study.genome.merge_method} merges {tried}")
        if check_first_merge(prepared):
            findings.add("ok", "merge", "every tensor has its place in the live model")
        if stored is None or not facts.begun:
            return
        changed = changes(facts, facts_of(prepared, facts))
        if changed and stored.history().complete:
            raise refused(facts, changed, study.study)
        done = len(stored.history().candidates)
        text = f"the study has begun: {done} of {study.search.trials} candidates are complete"
        findings.add("ok", "storage", text)


def _stored_study(url: str, name: str) -> Ledger | None:
    """The stored study; None where it has not begun."""
    try:
        return open_ledger(url, name)
    except StudyError as error:
        if error.what.startswith("there is no study"):
            return None
        raise
