"""The learned judge's regression: for each task a ridge on n-grams, words and measures.

A small ridge on the measures of all tasks comes first, and each task fits what it leaves. English
answers to tasks that most models answer in Japanese are a group of their own. Models that slip into
English are mostly weak, so English looks bad across models (half a grade); but within a model its
English answers get the grades of its Japanese ones. So the groups are centred separately, what sets
whole groups apart is dropped, and the distance between the groups is the one found within models.

The numbers below were chosen by cross-validation over the tuning families of
judging/validation/families.py alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.judging.learned.features import BITS, NAMES, Float32s, in_english
from evomerge.judging.learned.judge import CLIP, JudgeWeights

RIDGE = 0.02  # the kernel's diagonal is about 1
MEASURES_WEIGHT = 0.1  # of the measures' kernel; that of the n-grams is 1
RULES_STRETCH = 2.0  # the rules' grade counts like four other measures
SHARED, SHARED_RIDGE = 0.15, 100.0  # how much of the ridge over all tasks counts, and its penalty
# share of a target that is the model's mean elsewhere: one grade is noisy, a mean of 100 is not
MODEL_SHARE = 0.2
MOST = 0.5  # a task with this share of English answers asks for English
# how many answers the common value counts as: mean n-grams, measures, gap
ENGLISH_GRAMS, ENGLISH_MEASURES, ENGLISH_GAP = 3.0, 4.0, 20.0

Float64s = NDArray[np.float64]


@dataclass(frozen=True)
class GradedAnswers:
    """n graded answers to T tasks: `x` are their n-grams and words, `z` their measures [n, M].

    An element of `x` is (buckets, weights). `weight` is what an answer counts: less in a large
    family, whose models say much the same.
    """

    task: NDArray[np.int64]
    model: NDArray[np.int64]
    grade: Float64s
    x: list[tuple[NDArray[np.int64], Float32s]]
    z: Float32s
    weight: Float64s

    def at(self, rows: NDArray[np.bool_]) -> GradedAnswers:
        """Some of the answers."""
        return GradedAnswers(
            self.task[rows],
            self.model[rows],
            self.grade[rows],
            [self.x[i] for i in np.flatnonzero(rows)],
            self.z[rows],
            self.weight[rows],
        )


def fit(answers: GradedAnswers, n_tasks: int) -> JudgeWeights:
    """The weights for T = n_tasks tasks; a task without answers predicts the mean of all."""
    a = answers
    idf, x = _tfidf(a.x)
    english = _apart(a, n_tasks)
    level = _levels(a, english, n_tasks)
    above = a.grade - level[a.task]
    raw = gap = 0.0  # how much better English answers are: over all, and within models
    if english.any():
        raw = above[english].mean()
        gap = english_gap(above, english, a.model)

    mean, scale = _standards(a, english, n_tasks)
    group = english.astype(int)
    stretch = np.where(np.array(NAMES) == "rules", RULES_STRETCH, 1.0)
    scores = ((a.z - mean[group, a.task]) / scale[group, a.task]).clip(-CLIP, CLIP)
    z = scores.astype(np.float64) * stretch
    weight = a.weight / a.weight.mean()
    shared = _shared(z, above - raw * english, weight)
    own = above - gap * english
    target = above - raw * english - MODEL_SHARE * (own - _by_model(own, a.model)) - z @ shared

    by_grams = np.zeros((n_tasks, 1 << BITS), np.float32)
    by_measures = np.tile(shared, (n_tasks, 1))
    bias = np.stack([level, level + gap])
    common = np.zeros(1 << BITS)
    if english.any():
        common = np.asarray(x[english].mean(0)).ravel()
    for t in np.unique(a.task):
        here = a.task == t
        buckets = np.unique(x[here].indices)
        grams = x[here][:, buckets].toarray().astype(np.float64)
        rows, centres = centred(grams, english[here], common[buckets])
        w, v, constant = _ridge(rows, z[here], target[here], weight[here])
        by_grams[t, buckets] = w
        by_measures[t] += v
        bias[:, t] += constant - centres @ w
    if not english.any():
        bias[1] = bias[0]
    return JudgeWeights(
        idf=idf,
        grams=by_grams,
        measures=(by_measures * stretch).astype(np.float32),
        mean=mean.astype(np.float32),
        scale=scale.astype(np.float32),
        bias=bias.astype(np.float32),
        asks_english=_asks_english(a, n_tasks),
    )


def _levels(a: GradedAnswers, english: NDArray[np.bool_], n_tasks: int) -> Float64s:
    """[T] each task's mean grade without the English group; the mean of all without answers."""
    level = np.full(n_tasks, a.grade.mean())
    for t in np.unique(a.task):
        level[t] = a.grade[(a.task == t) & ~english].mean()
    return level


def _shared(z: Float64s, target: Float64s, weight: Float64s) -> Float64s:
    """[M] SHARED times the ridge weights of the measures over all tasks."""
    matrix = z.T @ (weight[:, None] * z) + SHARED_RIDGE * np.eye(z.shape[1])
    return np.asarray(SHARED * np.linalg.solve(matrix, z.T @ (weight * target)))


def english_gap(above: Float64s, english: NDArray[np.bool_], model: NDArray[np.int64]) -> float:
    """How much better English answers are graded than the same model's others.

    A regression with models as fixed effects, shrunk towards 0 as if by ENGLISH_GAP answers.
    """
    inside = english - _by_model(english.astype(np.float64), model)
    return float(inside @ above / (inside @ inside + ENGLISH_GAP))


def centred(x: Float64s, english: NDArray[np.bool_], common: Float64s) -> tuple[Float64s, Float64s]:
    """(rows [n, B] less the mean of their group, the two means [2, B]).

    A task has few English answers, so their mean is drawn towards the `common` one of all tasks
    [B]. Where no task has any, it is the mean of the others.
    """
    others = x[~english].mean(0)
    few = others
    if common.any() or english.any():
        total = x[english].sum(0) + ENGLISH_GRAMS * common
        few = total / (english.sum() + ENGLISH_GRAMS)
    means = np.stack([others, few])
    return x - means[english.astype(int)], means


def _tfidf(grams: list[tuple[NDArray[np.int64], Float32s]]) -> tuple[Float32s, Any]:
    """(idf [B], sparse rows [n, B] of the n-grams times idf, at length 1)."""
    from scipy import sparse  # comes with scikit-learn; needed here alone

    buckets, weights = zip(*grams, strict=True)
    starts = np.cumsum([0, *map(len, buckets)])
    entries = (np.concatenate(weights), np.concatenate(buckets), starts)
    x = sparse.csr_matrix(entries, shape=(len(grams), 1 << BITS))
    seen = np.bincount(x.indices, minlength=1 << BITS)
    idf = np.log(len(grams) / (1.0 + seen)).clip(min=0).astype(np.float32)
    x = x @ sparse.diags(idf)
    length = np.sqrt(np.asarray(x.multiply(x).sum(1)).ravel()).clip(min=1e-9)
    return idf, (sparse.diags(1 / length) @ x).tocsr()


def _asks_english(a: GradedAnswers, n_tasks: int) -> NDArray[np.bool_]:
    """[T] whether most answers to a task are in English, and so form no separate group."""
    counts = np.bincount(a.task, minlength=n_tasks).clip(min=1)
    return np.asarray(np.bincount(a.task, in_english(a.z), n_tasks) / counts >= MOST)


def _apart(a: GradedAnswers, n_tasks: int) -> NDArray[np.bool_]:
    """[n] whether an answer belongs to the English group."""
    return np.asarray(in_english(a.z) & ~_asks_english(a, n_tasks)[a.task])


def _standards(
    a: GradedAnswers, english: NDArray[np.bool_], n_tasks: int
) -> tuple[Float64s, Float64s]:
    """(means, deviations) [2, T, M] of the measures of both groups.

    The English group's differ from the others' by one common distance for all tasks.
    """
    overall = a.z.std(0).astype(np.float64) + 1e-6
    mean = np.tile(a.z.mean(0).astype(np.float64), (2, n_tasks, 1))
    scale = np.tile(overall, (2, n_tasks, 1))
    for t in np.unique(a.task):
        here = a.z[(a.task == t) & ~english]
        mean[:, t] = here.mean(0)
        scale[:, t] = here.std(0) + 0.1 * overall
    if english.any():
        off = (a.z - mean[0, a.task])[english]
        count = len(off) + ENGLISH_MEASURES
        mean[1] += off.sum(0) / count
        variance = (off.var(0) * len(off) + ENGLISH_MEASURES * overall**2) / count
        scale[1] = np.sqrt(variance) + 0.1 * overall
    return mean, scale


def _by_model(values: Float64s, model: NDArray[np.int64]) -> Float64s:
    """[n] the mean of each row's model."""
    return np.asarray((np.bincount(model, values) / np.bincount(model).clip(min=1))[model])


def _ridge(
    x: Float64s, z: Float64s, target: Float64s, weight: Float64s
) -> tuple[Float64s, Float64s, float]:
    """(weights of the n-grams [B], of the measures [M], bias) of a ridge with a free bias.

    `weight` [n] is what each row counts. Solved in its dual, since n is small:
    alpha = (K + RIDGE / weight)^-1 y, with K and y centred on their weighted means.
    """
    n = len(target)
    share = MEASURES_WEIGHT / z.shape[1]
    part = weight / weight.sum()
    centre = np.eye(n) - part[None]  # [n, n]: subtracts the weighted mean
    kernel = centre @ (x @ x.T + share * (z @ z.T)) @ centre.T
    penalty = RIDGE * np.diag(1 / weight)
    alpha = centre.T @ np.linalg.solve(kernel + penalty, target - part @ target)
    w = x.T @ alpha
    v = share * (z.T @ alpha)
    return w, v, float(part @ (target - x @ w - z @ v))


def predict(weights: JudgeWeights, answers: GradedAnswers) -> Float64s:
    """[n] grades of the answers, 1 to 5."""
    rows = zip(answers.task, answers.x, answers.z, strict=True)
    return np.array([weights.predict(t, x, z) for t, x, z in rows]).clip(1, 5)
