"""Another study's distribution as the first one of a search."""

from __future__ import annotations

import re

from evomerge.errors import StudyError
from evomerge.genome.genome import Genome, make_genome
from evomerge.searching.ledger import Ledger, open_ledger
from evomerge.searching.records.storage_place import file_url, storage_place
from evomerge.searching.records.study_facts import Start
from evomerge.searching.samplers.cmaes_adapter import Distribution
from evomerge.searching.samplers.make_sampler import make_sampler
from evomerge.study import Study


def start_from_source(study: Study, url: str, genome: Genome, ledger: Ledger) -> None:
    """Store the current distribution of `search.source_study`, once.

    Raises StudyError when that study cannot be a source.
    """
    name = study.search.source_study
    if name is None or ledger.facts.start is not None:
        return
    if name == study.study or not re.fullmatch(r"[\w.-]+", name):
        raise StudyError(
            "is not another study",
            where="search.source_study",
            found=name,
            remedy="Name a study of this storage.",
        )
    source = open_ledger(source_url(url, study), name)
    facts = source.facts
    theirs = facts.study
    assert facts.n_layers is not None
    source_genome = make_genome(theirs, facts.n_layers)
    if source_genome.shape != genome.shape:
        raise StudyError(
            "the source study searches different numbers",
            where=source.name,
            remedy="Leave out search.source_study.",
        )
    known = facts.known_candidates or ()
    sampler = make_sampler(theirs, source_genome, known)
    history = source.history()
    if not history.complete_generations(sampler.population):
        raise StudyError(
            "the source study has no complete generation yet",
            where=source.name,
            remedy="Let it finish one first.",
        )
    ledger.remember("start", as_start(sampler.distribution(history)))


def as_start(distribution: Distribution, mean_is_first: bool = False) -> Start:
    """A distribution as a study stores it; `mean_is_first` as of `Start`."""
    cov = tuple(tuple(row) for row in distribution.cov.tolist())
    return Start(tuple(distribution.mean.tolist()), distribution.sigma, cov, mean_is_first)


def source_url(url: str, study: Study) -> str:
    """The source study's storage.

    An SQLite study has a file of its own; the source's is next to it, unless one file holds both.
    """
    file = storage_place(url).file
    if file is None:
        return url
    neighbour = file.with_name(f"{study.search.source_study}.db")
    return file_url(neighbour) if neighbour.exists() else url
