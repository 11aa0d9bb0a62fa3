"""cmaes.CMA (Hansen 2016, arXiv 1604.00772), the library that Optuna itself uses.

Its private names are used in this file alone; tests/test_adapters.py is the contract that a version
of cmaes must keep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from cmaes import CMA


@dataclass(frozen=True)
class Distribution:
    """mean + sigma * N(0, cov), within bounds: what a generation is drawn from.

    mean (d,), cov (d, d).
    """

    mean: np.ndarray
    sigma: float
    cov: np.ndarray


class SteadyCMA(CMA):  # type: ignore[misc]  # cmaes has no types
    """CMA whose learning rate of the mean stays a number while the mean has never moved.

    Its signal-to-noise ratio is 0 / 0 then. So it is where the best of the first generation are the
    mean itself, as known candidates may be. It is taken as noise alone.
    """

    _Vmean: float

    def _lr_adaptation(self, *before: Any) -> None:
        if self._Vmean == 0.0:
            self._Vmean = 1e-300  # which the first step absorbs
        super()._lr_adaptation(*before)


def make_cma(
    start: Distribution, bounds: np.ndarray, population: int, seed: int = 0, lr_adapt: bool = False
) -> CMA:
    """The optimizer as every search here uses it; bounds are (d, 2). CMA minimises.

    lr_adapt: learning rates that follow the signal-to-noise ratio (Nomura, Akimoto and Ono 2023,
    arXiv 2304.03473). With either learning rate the mean is a convex combination of points within
    the bounds, so it stays within them.
    """
    return SteadyCMA(
        mean=np.clip(start.mean, *bounds.T),
        sigma=start.sigma,
        bounds=bounds,
        population_size=population,
        seed=seed,
        # CMA-ES is the same in other units when it begins with their covariance
        cov=start.cov.copy(),
        lr_adapt=lr_adapt,
    )


def twin(optimizer: CMA) -> CMA:
    """Another optimizer in the same state, bit for bit, but for its random numbers.

    Copying as `copy` and `pickle` do keeps half of the covariance, whose halves differ in bits.
    """
    other = SteadyCMA.__new__(SteadyCMA)
    for name, value in vars(optimizer).items():
        if name != "_rng":
            setattr(other, name, value.copy() if isinstance(value, np.ndarray) else value)
    other._rng = np.random.RandomState(0)
    return other


def state(optimizer: CMA) -> Distribution:
    """The distribution that the optimizer draws from now."""
    mean, cov = np.array(optimizer.mean), np.array(optimizer._C)
    return Distribution(mean, float(optimizer._sigma), cov)


def default_population(dimensions: int) -> int:
    """Hansen 2016, table 1."""
    return 4 + math.floor(3 * math.log(dimensions))
