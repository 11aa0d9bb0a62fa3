"""The methods beyond task arithmetic, TIES, DARE, linear and slerp: mergekit's own functions, bit
for bit, on tensors of every kind, with every parameter that they have.
"""

import os
import random
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mergekit_server import MergekitError, mergekit
from merging_tools import differing, load_all, same_bits
from method_cases import DENSITIES, SCALES, SHAPES, UNIT, WEIGHTS, make_tensors, seeded
from recipe_cases import SIBLINGS, WORDS, Writer, drawn_elsewhere, make_families

from evomerge.errors import RecipeError
from evomerge.merging.build import build_model
from evomerge.merging.methods.deltas import differences
from evomerge.merging.methods.registry import get_method
from evomerge.merging.tensor_plan import TensorPlan
from evomerge.recipe import METHODS, Recipe

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
ELSEWHERE = {"task_arithmetic", "ties", "dare_ties", "dare_linear", "linear", "slerp"}  # tested
ADDED = [name for name, traits in METHODS.items() if name not in ELSEWHERE and not traits.only_here]


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
    if "epsilon" in each:  # where the density leaves no room, mergekit refuses
        pairs = zip(each["density"], each["epsilon"], strict=True)
        fitting = [(d, min(e, 0.99 * min(d, 1 - d)) if d < 1 else e) for d, e in pairs]
        # a sum that is rounded to 1 is none of mergekit's either
        each["epsilon"] = [0.0 if d < 1 <= d + e else e for d, e in fitting]
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


RANGES = {
    "density": (0.2, 0.8),
    "epsilon": (0.0, 0.15),
    "gamma": (0.0, 0.3),
    "scale": (-0.5, 2.0),
    "select_topk": (0.0, 1.0),
    "t": (0.0, 0.1),
    "r": (0.0, 1.0),
    "alpha": (0.0, 1.0),
    "eps": (1e-8, 1e-6),
    "tol": (1e-6, 1e-3),
}


class MethodWriter(Writer):
    """Writes a random configuration of one method."""

    def __init__(self, seed, folder, method):
        super().__init__(seed, folder)
        self.random = random.Random(f"{seed} {method}")
        self.method, self.traits = method, METHODS[method]
        self.based = self.traits.needs_base or (self.traits.optional_base and self.chance(0.5))

    def scalar(self, key):
        own = self.traits.own.get(key)
        if own is not None and own.kind == "switch":
            return self.random.choice(WORDS[self.chance(0.5)])
        if own is not None and own.kind == "whole":
            return self.random.choice([3, "5", 7.0, 0])
        if key not in RANGES:
            return super().scalar(key)
        number = self.random.uniform(*RANGES[key])
        return self.random.choice([number, number, str(number)])

    def setting(self, key, whole=True):
        return self.scalar(key) if key == "max_iter" else super().setting(key, whole)

    def refs(self, most=3):
        least, top = self.traits.siblings
        count = self.random.randint(max(1, least), top or 3)
        chosen = self.random.sample(SIBLINGS, count) + ["base"] * self.based
        return self.random.sample(chosen, len(chosen))

    def source(self, ref, **more):
        keys = [*sorted(self.traits.by_source)]
        return {"model": self.path(ref), **more, "parameters": self.parameters(keys, 0.6)}

    def configuration(self):
        shared = [key for key, own in self.traits.own.items() if not own.per_model]
        top = {"weight": self.setting("weight"), "t": self.setting("t")}
        switches = ("density", "normalize", "lambda", "rescale", "int8_mask")
        top |= self.parameters((*switches, *shared), 0.5, whole=True)
        data = {"merge_method": self.method, "parameters": top}
        if self.based:
            data["base_model"] = self.path("base")
        if self.chance(0.5):
            first, pieces = self.refs(), []
            for _ in range(self.random.randint(1, 3)):
                refs = first if self.method != "passthrough" else self.refs()
                length = self.random.randint(1, self.layers)
                start = self.random.randint(0, self.layers - length)
                pieces.append(self.slice(start, length, refs, self.chance(0.5)))
            data["slices"] = pieces
        else:
            data["models"] = [self.source(ref) for ref in self.refs()]
        for key, share in (("dtype", 0.8), ("out_dtype", 0.3)):
            if self.chance(share):
                data[key] = self.random.choice(["bfloat16", "bfloat16", "float32", "float16"])
        return data


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    make_families(folder)
    return folder


FIRST, LAST = map(int, os.environ.get("EVOMERGE_SEEDS", "0:2").split(":"))


@pytest.mark.parametrize("seed", range(FIRST, LAST))
@pytest.mark.parametrize("method", ADDED)
def test_a_random_configuration(families, tmp_path, method, seed):
    mergekit()
    data = MethodWriter(seed, families, method).configuration()
    recipe = Recipe.from_dict(data)
    try:
        mergekit().merge(recipe.to_yaml(), tmp_path / "theirs", seed)
    except MergekitError:
        with pytest.raises(RecipeError):
            build_model(recipe, tmp_path / "ours", random_seed=seed)
        return
    theirs = load_all(tmp_path / "theirs")
    try:
        build_model(recipe, tmp_path / "ours", random_seed=seed)
    except RecipeError:
        assert not all(tensor.isfinite().all() for tensor in theirs.values())
        return
    # where a layer repeats, mergekit's order of draws hangs on the slots of a hash table
    assert not set(differing(load_all(tmp_path / "ours"), theirs)) - drawn_elsewhere(recipe)


def models(*names, **parameters):
    return [{"model": name, "parameters": parameters} for name in names]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            {"merge_method": "nearswap", "models": models("a", "b"), "base_model": "base"},
            "two models",
        ),
        ({"merge_method": "arcee_fusion", "models": models("a")}, "`base_model` is missing"),
        ({"merge_method": "model_stock", "models": models("a"), "base_model": "b"}, "three models"),
        ({"merge_method": "nuslerp", "models": models("a"), "base_model": "b"}, "besides a base"),
        ({"merge_method": "passthrough", "models": models("a", "b")}, "exactly one model"),
        (
            {"merge_method": "karcher", "models": models("a"), "parameters": {"max_iter": 2.5}},
            "whole",
        ),
        (
            {"merge_method": "karcher", "models": models("a"), "parameters": {"tol": -1}},
            "at least 0",
        ),
        (
            {"merge_method": "breadcrumbs", "models": models("a", gama=0.1), "base_model": "b"},
            "Did you mean `gamma`",
        ),
        (
            {"merge_method": "sce", "models": models("a"), "base_model": "b"}
            | {"parameters": {"select_topk": 1.5}},
            "at least 0 and at most 1",
        ),
        (
            {"merge_method": "model_stock", "models": models("a", "c"), "base_model": "b"}
            | {"parameters": {"filter_wise": "maybe"}},
            "true or false",
        ),
    ],
)
def test_wrong_recipes_are_refused_in_a_line(data, words):
    with pytest.raises(RecipeError, match=words) as caught:
        Recipe.from_dict(data)
    assert "\n" not in str(caught.value)


def test_what_mergekit_reads_over_is_noted():
    recipe = Recipe.from_dict(
        {"merge_method": "multislerp", "models": models("a"), "parameters": {"gamma": 0.1}}
    )
    assert "`gamma`" in str(recipe.note)


@pytest.mark.parametrize(
    ("method", "parameters", "words"),
    [
        ("nearswap", {}, "`t` is not set"),
        ("della", {"weight": 1, "density": 0.9, "epsilon": 0.2}, "`epsilon` leaves.*less than 0.1"),
        ("della", {"density": 0.9}, "`epsilon`|`weight` is not set"),
    ],
)
def test_what_the_models_decide_is_refused_too(families, tmp_path, method, parameters, words):
    data = {"merge_method": method, "base_model": str(families / "tied/base")}
    data |= {"models": [{"model": str(families / "tied/one")}], "parameters": parameters}
    with pytest.raises(RecipeError, match=words):
        build_model(Recipe.from_dict(data), tmp_path / "out")
    assert not (tmp_path / "out").exists()
