"""The learned judge's regression: for each task a ridge on n-grams, words and measures, after a
small one on the measures of all tasks.

English answers to tasks that most answer in Japanese are a group of their own. Models that slip
into English are mostly weak ones, so that English looks bad across models (half a grade); but
within a model English answers are graded as its Japanese ones are. So both groups are centred
apart, what sets whole groups apart is dropped, and the groups' distance is that found within
models.

The numbers below were chosen by cross-validation over the tuning families of judging/families.py
alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.judging.learned.features import BITS, NAMES, Float32s, in_english
from evomerge.judging.learned.judge import CLIP, JudgeWeights

RIDGE = 0.02  # the kernel's diagonal is about 1
MEASURES_WEIGHT = 0.1  # of the measures' kernel beside the n-grams' in a task
RULES_STRETCH = 2.0  # the rules' grade counts like four other measures
SHARED, SHARED_RIDGE = 0.15, 100.0  # how much of the ridge over all tasks counts, and its penalty
# of a target is what the answer's model reaches elsewhere: one grade is noisy, a mean of 100 is not
MODEL_SHARE = 0.2
MOST = 0.5  # a task with this share of English answers asks for English
# answers that the common value counts like: mean n-grams, measures, gap
ENGLISH_GRAMS, ENGLISH_MEASURES, ENGLISH_GAP = 3.0, 4.0, 20.0

Float64s = NDArray[np.float64]


@dataclass(frozen=True)
class GradedAnswers:
    """Graded answers: n rows over T tasks. `x` are their n-grams and words (buckets, weights), `z`
    their measures [n, M].

    `weight` is what a row counts: less in a large family, whose models say much the same.
    """

    task: NDArray[np.int64]
    model: NDArray[np.int64]
    grade: Float64s
    x: list[tuple[NDArray[np.int64], Float32s]]
    z: Float32s
    weight: Float64s

    def at(self, rows: NDArray[np.bool_]) -> GradedAnswers:
        """Some of the rows."""
        return GradedAnswers(
            self.task[rows],
            self.model[rows],
            self.grade[rows],
            [self.x[i] for i in np.flatnonzero(rows)],
            self.z[rows],
            self.weight[rows],
        )


def fit(examples: GradedAnswers, n_tasks: int) -> JudgeWeights:
    """The weights for T = n_tasks tasks; a task without examples predicts the mean of all."""
    e, m = examples, len(NAMES)
    idf, x = _rare(e.x)
    english = _apart(e, n_tasks)
    level = np.full(n_tasks, e.grade.mean())
    for t in np.unique(e.task):
        level[t] = e.grade[(e.task == t) & ~english].mean()
    above = e.grade - level[e.task]
    raw, gap = (
        (above[english].mean(), english_gap(above, english, e.model))
        if english.any()
        else (0.0, 0.0)
    )

    mean, scale = _standards(e, english, n_tasks)
    group = english.astype(int)
    stretch = np.where(np.array(NAMES) == "rules", RULES_STRETCH, 1.0)
    z = ((e.z - mean[group, e.task]) / scale[group, e.task]).clip(-CLIP, CLIP).astype(
        np.float64
    ) * stretch
    weight = e.weight / e.weight.mean()
    shared = SHARED * np.linalg.solve(
        z.T @ (weight[:, None] * z) + SHARED_RIDGE * np.eye(m),
        z.T @ (weight * (above - raw * english)),
    )
    own = above - gap * english
    target = above - raw * english - MODEL_SHARE * (own - _by_model(own, e.model)) - z @ shared

    by_grams, by_measures = (
        np.zeros((n_tasks, 1 << BITS), np.float32),
        np.tile(shared, (n_tasks, 1)),
    )
    bias = np.stack([level, level + gap])
    common = np.asarray(x[english].mean(0)).ravel() if english.any() else np.zeros(1 << BITS)
    for t in np.unique(e.task):
        here = e.task == t
        buckets = np.unique(x[here].indices)
        rows, centres = centred(
            x[here][:, buckets].toarray().astype(np.float64), english[here], common[buckets]
        )
        w, v, constant = _ridge(rows, z[here], target[here], weight[here])
        by_grams[t, buckets] = w
        by_measures[t] += v
        bias[:, t] += constant - centres @ w
    if not english.any():
        bias[1] = bias[0]
    small = [np.asarray(a, np.float32) for a in (by_measures * stretch, mean, scale, bias)]
    return JudgeWeights(idf, by_grams, small[0], small[1], small[2], small[3], _asks_english(e, n_tasks))


def english_gap(above: Float64s, english: NDArray[np.bool_], model: NDArray[np.int64]) -> float:
    """How much better English answers are graded than the same model's others: a regression with
    models as fixed effects.
    """
    inside = english - _by_model(english.astype(np.float64), model)
    return float(inside @ above / (inside @ inside + ENGLISH_GAP))


def centred(x: Float64s, english: NDArray[np.bool_], common: Float64s) -> tuple[Float64s, Float64s]:
    """(rows [n, B] less the mean of their group, the two means [2, B]).

    A task has few English answers: their mean is drawn to the `common` one of all tasks [B].
    Without any in all tasks it is the others' mean.
    """
    others = x[~english].mean(0)
    few = (
        (x[english].sum(0) + ENGLISH_GRAMS * common) / (english.sum() + ENGLISH_GRAMS)
        if common.any() or english.any()
        else others
    )
    means = np.stack([others, few])
    return x - means[english.astype(int)], means


def _rare(grams: list[tuple[NDArray[np.int64], Float32s]]) -> tuple[Float32s, Any]:
    """(idf [B], sparse rows [n, B] of the n-grams times idf, at length 1)."""
    from scipy import sparse  # comes with scikit-learn; needed here alone

    starts = np.cumsum([0] + [len(b) for b, _ in grams])
    shape = (len(grams), 1 << BITS)
    x = sparse.csr_matrix(
        (np.concatenate([w for _, w in grams]), np.concatenate([b for b, _ in grams]), starts),
        shape=shape,
    )
    seen = np.bincount(x.indices, minlength=1 << BITS)
    idf = np.log(len(grams) / (1.0 + seen)).clip(min=0).astype(np.float32)
    x = x @ sparse.diags(idf)
    length = np.sqrt(np.asarray(x.multiply(x).sum(1)).ravel()).clip(min=1e-9)
    return idf, (sparse.diags(1 / length) @ x).tocsr()


def _asks_english(e: GradedAnswers, n_tasks: int) -> NDArray[np.bool_]:
    """[T] whether most answers to a task are in English: there it is no group of its own."""
    counts = np.bincount(e.task, minlength=n_tasks).clip(min=1)
    return np.asarray(np.bincount(e.task, in_english(e.z), n_tasks) / counts >= MOST)


def _apart(e: GradedAnswers, n_tasks: int) -> NDArray[np.bool_]:
    return np.asarray(in_english(e.z) & ~_asks_english(e, n_tasks)[e.task])


def _standards(e: GradedAnswers, english: NDArray[np.bool_], n_tasks: int) -> tuple[Float64s, Float64s]:
    """(means, deviations) [2, T, M] of the measures of both groups, English ones by their common
    distance from the others.
    """
    overall = e.z.std(0).astype(np.float64) + 1e-6
    mean, scale = (
        np.tile(e.z.mean(0).astype(np.float64), (2, n_tasks, 1)),
        np.tile(overall, (2, n_tasks, 1)),
    )
    for t in np.unique(e.task):
        here = e.z[(e.task == t) & ~english]
        mean[:, t], scale[:, t] = here.mean(0), here.std(0) + 0.1 * overall
    if english.any():
        off = (e.z - mean[0, e.task])[english]
        mean[1] += off.sum(0) / (len(off) + ENGLISH_MEASURES)
        scale[1] = (
            np.sqrt(
                (off.var(0) * len(off) + ENGLISH_MEASURES * overall**2)
                / (len(off) + ENGLISH_MEASURES)
            )
            + 0.1 * overall
        )
    return mean, scale


def _by_model(values: Float64s, model: NDArray[np.int64]) -> Float64s:
    """[n] the mean of each row's model."""
    return np.asarray((np.bincount(model, values) / np.bincount(model).clip(min=1))[model])


def _ridge(x: Float64s, z: Float64s, target: Float64s, weight: Float64s) -> tuple[Float64s, Float64s, float]:
    """(weights of the n-grams [B], of the measures [M], bias) of a ridge with a free bias and a
    weight for each of n rows.

    Solved in its dual, since n is small: alpha = (K + RIDGE / weight)^-1 y, with K and y centred on
    their weighted means.
    """
    n, share, part = len(target), MEASURES_WEIGHT / z.shape[1], weight / weight.sum()
    centre = np.eye(n) - part[None]  # [n, n]: subtracts the weighted mean
    kernel = centre @ (x @ x.T + share * (z @ z.T)) @ centre.T
    alpha = centre.T @ np.linalg.solve(kernel + RIDGE * np.diag(1 / weight), target - part @ target)
    w, v = x.T @ alpha, share * (z.T @ alpha)
    return w, v, float(part @ (target - x @ w - z @ v))


def predict(weights: JudgeWeights, examples: GradedAnswers) -> Float64s:
    """[n] grades of the examples, 1 to 5."""
    e = examples
    return np.array(
        [weights.predict(t, x, z) for t, x, z in zip(e.task, e.x, e.z, strict=True)]
    ).clip(1, 5)
