"""How a stored study is recognised: its facts from its files, compared with those it began with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.merging.adapters.lora import AdaptedModel
from evomerge.merging.architecture.roles import Role
from evomerge.merging.checkpoints.fingerprint import combined, fingerprint
from evomerge.merging.checkpoints.model_folder import ModelFolder
from evomerge.recipe import OWN
from evomerge.searching.front.objective_values import task_groups
from evomerge.searching.ledger import Ledger
from evomerge.searching.prepare import Prepared
from evomerge.searching.records.identity import changes, refused
from evomerge.searching.records.study_facts import SplitKeys, StudyFacts
from evomerge.study import model_refs, value_prints
from evomerge.tasks import stored_ids, tasks_hash

# What is known before the first trial, and what of it may change afterwards: paths, stopping keys.
BEGINNING = (
    "version",
    "models",
    "tasks",
    "task_prints",
    "split",
    "task_groups",
    "names",
    "n_layers",
    "modules",
    "files",
    "knowledge",
    "own_method",
    "environment",
    "known_candidates",
    "references_win",
    "credit_breaks_ties",
    "study_file",
)
CHANGING = ("task_prints", "files", "environment", "study_file")


def facts_of(prepared: Prepared, known: StudyFacts) -> StudyFacts:
    """The facts of the study from its files, which are compared when it resumes."""
    study, split, chooser = prepared.study, prepared.split, prepared.chooser
    models = [prepared.base, *prepared.siblings]
    study_file, files = study.to_dict(), {}
    method = prepared.genome.method
    for ref, model in zip(model_refs(study_file), models, strict=True):
        files[ref] = _prints(model, known.files.get(ref, {}))
    vectors = prepared.sampler.known_candidates
    return StudyFacts(
        study_file=study_file,
        environment=value_prints(study_file),
        models={ref: combined(prints) for ref, prints in files.items()},
        files=files,
        tasks=tasks_hash(prepared.tasks),
        task_prints={task.key: tasks_hash([task])[:16] for task in prepared.tasks},
        split=SplitKeys(
            stored_ids(split.search), stored_ids(split.validation), stored_ids(split.held_out)
        ),
        task_groups=task_groups(study, split),
        names=tuple(prepared.genome.names),
        n_layers=prepared.genome.slices[-1][1],
        modules=_modules(prepared),
        knowledge=None if chooser is None else chooser.knowledge.digest(),
        own_method=OWN[method].digest if method in OWN else None,
        known_candidates=tuple(tuple(vector.tolist()) for vector in vectors),
        # a study that has begun ranks and chooses as it did then
        references_win=known.references_win or not known.begun,
        credit_breaks_ties=known.credit_breaks_ties or not known.begun,
    )


def _modules(prepared: Prepared) -> tuple[str, ...] | None:
    """The base's modules for mergekit; none where a gene reaches out of the text path."""
    architecture, genome = prepared.base.architecture, prepared.study.genome
    if architecture.modules is None:
        return None
    reaches_out = genome.outside == "first"
    for text in genome.filters or ():
        for name, role in architecture.roles.items():
            if role == Role.OUTSIDE and architecture.names_outside(text, name):
                reaches_out = True
    return () if reaches_out else architecture.modules


def _prints(model: ModelFolder, known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The fingerprint of the folder's files, and for MODEL+ADAPTER of the adapter's after them."""
    prints = fingerprint(model.path, known)
    if isinstance(model, AdaptedModel):
        mark = "adapter/"
        old = {k.removeprefix(mark): known[k] for k in known if k.startswith(mark)}
        for name, value in fingerprint(model.adapter, old).items():
            prints[mark + name] = value
    return prints


def compared(ledger: Ledger, facts: StudyFacts, space: Mapping[str, tuple[float, float]]) -> Ledger:
    """The ledger of a stored study, which begins again where it changed before a trial was done.

    `space` is that of the study's file now. Raises StudyError where a trial depends on what has
    changed.
    """
    old = ledger.facts
    whole = old.begun and old.models and old.tasks is not None
    changed = changes(old, facts) if whole else ["the study"]
    if old.known_candidates not in (None, facts.known_candidates):
        changed.append("a file of search.recipes")
    if not changed:
        return ledger
    if ledger.history().complete:
        raise refused(old, changed, ledger.name)
    ledger.storage.begin_again()
    return Ledger(ledger.storage, space)
