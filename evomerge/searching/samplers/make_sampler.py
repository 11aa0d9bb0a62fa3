"""A study's sampler, from its genome and its settings."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from evomerge.genome.genome import Genome
from evomerge.searching.samplers.cma import CmaSampler
from evomerge.searching.samplers.pareto import ParetoSampler
from evomerge.searching.starting.known_candidates import first_vectors
from evomerge.study import Study


def make_sampler(
    study: Study, genome: Genome, known: Sequence[Sequence[float]] | None = None
) -> CmaSampler:
    """The study's sampler.

    `known` are the known candidates as a study stores them; None: as its file names them.
    """
    s = study.search
    if known is None:
        known = first_vectors(study, genome)
    bounds = [(gene.low, gene.high) for gene in genome.genes]
    # the declared range also holds the parents, the uniform weights and known candidates
    vectors = [vector for _, vector in genome.references(s.uniform)]
    numbers = np.array([*vectors, *known, *np.transpose(bounds)], dtype=float)
    declared = list(zip(numbers.min(axis=0).tolist(), numbers.max(axis=0).tolist(), strict=True))
    starts = [gene.start for gene in genome.genes]
    if study.random_init:
        rng = random.Random(f"start/{s.seed}")
        starts = [rng.uniform(low, high) for low, high in bounds]
    make: Callable[..., CmaSampler] = CmaSampler
    if study.objective.several:
        make = partial(ParetoSampler, study.objective.signs)
    return make(
        names=genome.names,
        bounds=bounds,
        declared=declared,
        starts=starts,
        sigma=s.sigma,
        population=s.population,
        seed=s.seed,
        scales=[gene.scale for gene in genome.genes],
        lr_adapt=s.lr_adapt,
        known_candidates=known,
    )
