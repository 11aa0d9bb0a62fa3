"""The methods beyond task arithmetic, TIES, DARE, linear and slerp: mergekit's own functions, bit
for bit, on tensors of every kind, with every parameter that they have.
"""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mergekit_server import MergekitError, mergekit
from merging_tools import same_bits
from method_cases import DENSITIES, SCALES, SHAPES, UNIT, WEIGHTS, make_tensors, seeded

from evomerge.errors import RecipeError
from evomerge.merging.methods.deltas import differences
from evomerge.merging.methods.registry import get_method
from evomerge.merging.tensor_plan import TensorPlan
from evomerge.recipe import METHODS

THOROUGH = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SMALL_OR_LARGE = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 1e-5, 0.3]))
# what a recipe may give each of them
VALUES = {
    "gamma": st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.01, 0.1])),
    "epsilon": st.one_of(st.floats(0, 0.2), st.sampled_from([0.0, 1e-5, 0.05])),
    "scale": SCALES,
    "nuslerp_flatten": st.booleans(),
    "nuslerp_row_wise": st.booleans(),
    "normalize_weights": st.booleans(),
    "filter_wise": st.booleans(),
    "eps": st.sampled_from([1e-8, 1e-3]),
    "max_iter": st.sampled_from([0, 1, 3, 10]),
    "tol": st.sampled_from([1e-5, 1e-3]),
    "select_topk": SMALL_OR_LARGE,
    "t": st.one_of(st.floats(0, 0.3), st.sampled_from([0.0, 1e-3, 10.0])),
    "r": SMALL_OR_LARGE,
    "alpha": SMALL_OR_LARGE,
}
ADDED = [
    "passthrough",
    "nuslerp",
    "multislerp",
    "karcher",
    "della",
    "della_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
    "model_stock",
    "sce",
    "nearswap",
    "arcee_fusion",
    "ram",
    "ramplus_tl",
]


@dataclass(frozen=True)
class Call:
    """A call of a method. `tensors`: the base first, where there is one."""

    method: str
    tensors: list = field(repr=False)
    base: int | None
    shared: dict
    each: dict  # by parameter: a value for each sibling
    seed: int

    @property
    def siblings(self):
        return self.tensors[self.base is not None :]

    def ours(self):
        method = get_method(self.method)
        base = None if self.base is None else self.tensors[0]
        others = self.siblings
        if method.takes_deltas:
            others = list(differences(base, others))
        own = {key: value for key, value in self.shared.items() if key in method.own}
        plan = TensorPlan(
            self.method,
            None if base is None else ("base", "w"),
            tuple((str(i), "w") for i in range(len(others))),
            weights=tuple(self.each.get("weight", ())),
            densities=tuple(self.each.get("density", ())),
            normalize=self.shared.get("normalize", False),
            scale=self.shared.get("lambda", 1.0),
            rescale=self.shared.get("rescale", False),
            parameters={key: float(value) for key, value in own.items()},
            by_sibling={key: tuple(v) for key, v in self.each.items() if key in method.own},
            samples=method.samples,
        )
        return method.merge(base, others, plan, seeded(self.seed))

    def theirs(self):
        return mergekit().method(
            self.method, self.tensors, self.base, self.shared | self.each, self.seed
        )


@st.composite
def calls(draw, name):
    traits = METHODS[name]
    base = None
    if traits.needs_base or (traits.optional_base and draw(st.booleans())):
        base = 0
    least, most = traits.siblings
    count = draw(st.integers(max(1, least), most or 4))
    dtype, seed = draw(st.sampled_from(list(UNIT))), draw(st.integers(0, 2**32 - 1))
    kind = draw(st.sampled_from(["noise", "grid", "same", "opposite", "far", "near"]))
    tensors = make_tensors(kind, draw(SHAPES), dtype, count, seed)
    shared, each = {}, {}
    for key, own in traits.own.items():
        if own.per_model:
            each[key] = draw(st.lists(VALUES[key], min_size=count, max_size=count))
        else:
            shared[key] = draw(VALUES[key])
    if traits.weighted:
        each["weight"] = draw(st.lists(WEIGHTS, min_size=count, max_size=count))
    if traits.has_densities:
        each["density"] = draw(st.lists(DENSITIES, min_size=count, max_size=count))
    if traits.draws:  # where the density leaves no room, mergekit refuses
        pairs = zip(each["density"], each["epsilon"], strict=True)
        each["epsilon"] = [min(e, 0.99 * min(d, 1 - d)) if d < 1 else e for d, e in pairs]
    if traits.takes_deltas and traits.scales:
        shared |= {"normalize": draw(st.booleans()), "rescale": draw(st.booleans())}
        shared |= {"lambda": draw(SCALES)}
    return Call(name, tensors if base == 0 else tensors[1:], base, shared, each, seed)


@pytest.mark.parametrize("name", ADDED)
def test_mergekit_s_bits(name):
    mergekit()

    @THOROUGH
    @given(calls(name))
    def check(call):
        try:
            theirs = call.theirs()
        except MergekitError:
            with pytest.raises((RecipeError, RuntimeError, IndexError)):
                call.ours()
            return
        try:
            ours = call.ours()
        except RecipeError:
            assert not theirs.isfinite().all() or name == "multislerp"
            return
        if not theirs.isfinite().all():  # which a recipe's reader is told, in place of a model
            return
        assert same_bits(ours, theirs), (ours.float() - theirs.float()).abs().max()

    check()


@pytest.mark.parametrize("size", [1_000_001, 3_000_000])
def test_a_sample_of_a_large_tensor_is_mergekit_s(size):
    tensors = make_tensors("noise", (10, size // 10), torch.bfloat16, 1, size)
    call = Call("arcee_fusion", tensors, 0, {}, {}, 5)
    assert same_bits(call.ours(), call.theirs())
