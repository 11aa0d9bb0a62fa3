"""The walk of a warm start: Adam in the genome's numbers, and what it says about their scales."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from evomerge.genome.genome import Genome

# a number's first step, in units of the weight: 16 steps can cross the whole range
RATE = 0.25
BETAS = (0.9, 0.98)  # memory of Adam's two moments (Kingma & Ba 2015, arXiv 1412.6980, algorithm 1)
# share of the steps, the last ones, whose vectors are averaged (Polyak & Juditsky 1992)
AVERAGED = 0.25
WIDEST = 3.0  # a scale lies in 1 / WIDEST to WIDEST of their geometric mean
# that mean: at a good place the steps of a search from nowhere only lead away (docs/SEARCH.md)
NARROWED = 1 / 3


def adam_trajectory(
    genome: Genome, gradients: Sequence[Sequence[float]], count: int
) -> list[np.ndarray]:
    """Every vector (d,) of a walk of `count` Adam steps: the start, and one for each gradient.

    The rate falls along a line to 0 after the last step. Numbers stay within their bounds.
    """
    low = np.array([gene.low for gene in genome.genes])
    high = np.array([gene.high for gene in genome.genes])
    x = np.clip(np.array([gene.start for gene in genome.genes], dtype=float), low, high)
    first, second = np.zeros_like(x), np.zeros_like(x)
    vectors = [x]
    for t, gradient in enumerate(np.array(gradients, dtype=float).reshape(-1, len(x)), start=1):
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
        step = first / (1 - BETAS[0] ** t) / (np.sqrt(second / (1 - BETAS[1] ** t)) + 1e-12)
        x = np.clip(x - RATE * (1 - (t - 1) / count) * step, low, high)
        vectors.append(x)
    return vectors


def average(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of a walk's last vectors, (d,)."""
    late = max(1, round(AVERAGED * (len(vectors) - 1)))
    mean: np.ndarray = np.mean(vectors[-late:], axis=0)
    return mean


def step_scales(gradients: Sequence[Sequence[float]]) -> np.ndarray:
    """(d,) factors of the first step size, large where the likelihood is flat.

    Their geometric mean is NARROWED. A log-likelihood's curvature is the mean square of its
    gradient (Fisher's information), and the width of a bowl is the root of its inverse.
    """
    # the first steps say little about where the walk ends
    late = np.array(gradients, dtype=float)[len(gradients) // 2 :]
    square = np.mean(np.square(late), axis=0)
    width = -0.5 * np.log(np.maximum(square, max(square.max(), 1e-300) * 1e-12))
    for _ in range(20):  # cutting off values moves the mean of the rest
        width = np.clip(width - width.mean(), -np.log(WIDEST), np.log(WIDEST))
    factors: np.ndarray = np.exp(width - width.mean()) * NARROWED
    return factors


def minibatch_indices(seed: int, step: int, count: int, size: int) -> list[int]:
    """Which of `count` tasks a step sees.

    It is a part of an endless row of shuffled decks, so that all come equally often.
    """
    size = min(size, count)
    positions = range(step * size, (step + 1) * size)
    decks: dict[int, list[int]] = {}
    for deck in {position // count for position in positions}:
        decks[deck] = random.Random(f"warm start/{seed}/{deck}").sample(range(count), count)
    return [decks[position // count][position % count] for position in positions]
