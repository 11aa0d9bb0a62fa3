"""Calls of the merge methods for hypothesis to draw: every shape, dtype and parameter, to be run by
us and by mergekit.
"""

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from mergekit_server import mergekit

from evomerge.merging.methods.deltas import differences
from evomerge.merging.methods.registry import get_method
from evomerge.merging.tensor_plan import TensorPlan

# the largest relative error of one rounding
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
WEIGHTED = ("task_arithmetic", "ties", "dare_ties", "dare_linear", "linear")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make_plan(method, **settings):
    """A plan of tensors that come from nowhere."""
    return TensorPlan(method, None, (), **settings)


@dataclass(frozen=True)
class Case:
    """A call of a method. `tensors`: the base first; linear takes it as one more model."""

    method: str
    tensors: list = field(repr=False)
    dtype: torch.dtype
    weights: list
    densities: list
    normalize: bool
    scale: float
    rescale: bool
    t: float
    seed: int

    def ours(self):
        method, (base, *others) = get_method(self.method), self.tensors
        weights = self.weights[1:]
        if self.method == "linear":
            others, weights = self.tensors, self.weights
        elif method.takes_deltas:
            others = differences(base, others)
        plan = make_plan(
            self.method,
            weights=tuple(weights),
            densities=tuple(self.densities),
            normalize=self.normalize,
            scale=self.scale,
            rescale=self.rescale,
            parameters={"t": self.t},
        )
        return method.merge(base, others, plan, seeded(self.seed))

    def theirs_is_nan(self):
        """Where mergekit forgets that fp16 holds neither its smallest divisor, 1e-8, nor a large
        delta's sum of magnitudes.
        """
        none = self.normalize and not torch.tensor(self.weights[1:]).to(self.dtype).sum()
        overflow = self.rescale and any(
            (x - self.tensors[0]).abs().sum().isinf() for x in self.tensors[1:]
        )
        linear, ties = self.method in ("task_arithmetic", "dare_linear"), self.method == "ties"
        return self.dtype == torch.float16 and ((none and linear) or (overflow and ties))

    def theirs(self):
        if self.method == "slerp":
            return mergekit().method("slerp", self.tensors, 0, {"t": self.t})
        if self.method == "linear":
            return mergekit().method(
                "linear", self.tensors, None, {"weight": self.weights, "normalize": self.normalize}
            )
        parameters = {
            "weight": self.weights[1:],
            "density": self.densities,
            "normalize": self.normalize,
            "lambda": self.scale,
        }
        return mergekit().method(
            self.method, self.tensors, 0, parameters | {"rescale": self.rescale}, self.seed
        )


def make_tensors(kind, shape, dtype, count, seed):
    """Base and siblings, negative zeros among them. Kinds: noise; grid, whose deltas have few
    magnitudes, exact in any dtype; same, where a sibling is the base; opposite, where the last
    sibling's delta is the first's, negated; far; near, for slerp's angles: the cosine is above, at
    or below its limit.
    """
    generator = seeded(seed)
    base = torch.randn(shape, generator=generator)
    steps = [torch.randn(shape, generator=generator) for _ in range(count)]
    if kind == "grid":
        base, steps = (base * 2).round() / 4, [(step * 2).round() / 4 for step in steps]
    elif kind == "same":
        steps[0] = torch.zeros(shape)
    elif kind == "opposite":
        steps[-1] = -steps[0] if count > 1 else -2 * base
    elif kind == "far":
        steps = [step * 30 for step in steps]
    elif kind == "near":
        steps = [step * [0.2, 0.3161, 1][seed % 3] for step in steps]
    tensors = [
        base.to(dtype),
        *((base + (step if kind in ("grid", "far") else 0.1 * step)).to(dtype) for step in steps),
    ]
    if kind not in ("opposite", "near"):
        for i, tensor in enumerate(tensors):
            tensor.reshape(-1)[i :: 5 + i] = -0.0
    return tensors


# () is a single number
SMALL = st.lists(st.sampled_from([1, 1, 2, 3, 5, 7, 16, 33]), max_size=3).map(tuple)
SHAPES = st.one_of(
    SMALL, SMALL, SMALL, st.sampled_from([(0,), (3, 0), (257, 129), (32771,), (70001,), (1, 40000)])
)
WEIGHTS = st.one_of(
    st.floats(-2, 2), st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 300.0, -1e4, 1e-9, 1e-30])
)
DENSITIES = st.one_of(st.floats(0.01, 1), st.sampled_from([1.0, 0.5, 1 / 3, 1e-6, 0.999]))
SCALES = st.one_of(st.just(1.0), st.floats(-2, 2), st.sampled_from([0.0, 1.0000001, 30.0]))


@st.composite
def cases(
    draw,
    names,
    kinds=("noise", "grid", "same", "opposite", "far", "near"),
    weights=WEIGHTS,
    scales=SCALES,
):
    name = draw(st.sampled_from(names))
    shape, dtype, kind = (
        draw(SHAPES),
        draw(st.sampled_from(list(UNIT))),
        draw(st.sampled_from(kinds)),
    )
    count, seed = 1 if name == "slerp" else draw(st.integers(1, 4)), draw(st.integers(0, 2**32 - 1))
    t = draw(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0, -0.5, 1.5])))
    weights = draw(st.lists(weights, min_size=count + 1, max_size=count + 1))
    densities = draw(st.lists(DENSITIES, min_size=count, max_size=count))
    switches = [draw(st.booleans()), draw(scales), draw(st.booleans())]
    return Case(
        name,
        make_tensors(kind, shape, dtype, count, seed),
        dtype,
        weights,
        densities,
        *switches,
        t,
        seed,
    )
