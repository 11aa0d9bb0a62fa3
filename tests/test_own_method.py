"""Merge methods that a user registers: on disk and live, with parameters of their own, searched."""

import inspect
import io

import pytest
import torch
from merging_tools import differing, load_all, make_family
from transformers import AutoModelForCausalLM

import evomerge
from evomerge.console import Console
from evomerge.errors import InputError, RecipeError, StudyFileError, UnsupportedRecipe
from evomerge.merging.build import build_model
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.live import LiveModel
from evomerge.merging.methods import registry
from evomerge.merging.methods.registry import MergeMethod, register_method
from evomerge.recipe import METHODS, Recipe
from evomerge.reporting.card import model_card


def share_of_mean(base, others, plan, generator):
    """base + share * the mean delta: nothing but the number's own place counts."""
    deltas = list(others)
    return base + sum(deltas) / len(deltas) * plan.parameters["share"]


def loudest(base, others, plan, generator):
    """The model with the largest weighted norm, whole tensors at a time and without a base."""
    norms = [w * x.float().norm() for w, x in zip(plan.weights, others, strict=True)]
    assert base is None
    return list(others)[int(torch.stack(norms).argmax())]


def halved(base, others, plan, generator):
    """base + share * sum_m w_m d_m, the weights in float64."""
    total = base.double()
    for weight, delta in zip(plan.weights, others, strict=True):
        total = total + plan.parameters["share"] * weight * delta.double()
    return total.to(base.dtype)


def added_in_place(base, others, plan, generator):
    for other, weight in zip(others, plan.weights, strict=True):
        base += other.mul_(weight)
    return base


@pytest.fixture
def family(tmp_path):
    return make_family(tmp_path)


@pytest.fixture(autouse=True)
def methods():
    register_method(
        "share_of_mean",
        MergeMethod(
            share_of_mean,
            takes_deltas=True,
            elementwise=True,
            weighted=False,
            parameters={"share": None},
        ),
        "[The share of the mean](https://example.org)",
    )
    register_method("loudest", MergeMethod(loudest, needs_base=False))
    evomerge.register_method(
        "halved", evomerge.MergeMethod(halved, takes_deltas=True, parameters={"share": 0.5})
    )
    register_method("added", MergeMethod(added_in_place, takes_deltas=True))
    yield
    for name in ("share_of_mean", "loudest", "halved", "added"):
        del METHODS[name], registry._METHODS[name]


def make_recipe(family, method, **settings):
    models = [
        {"model": str(family / name), "parameters": {"weight": weight}}
        for name, weight in (("base", 0.5), ("one", 1.0), ("two", 1.5))
    ]
    if method == "share_of_mean":
        models = [{"model": model["model"]} for model in models]
    return Recipe.from_dict(
        {"merge_method": method, "base_model": str(family / "base"), "models": models}
        | {"dtype": "bfloat16"}
        | settings
    )


def by_hand(family, method, share):
    base, one, two = (load_all(family / name) for name in ("base", "one", "two"))
    if method == "share_of_mean":
        return {n: base[n] + ((one[n] - base[n]) + (two[n] - base[n])) / 2 * share for n in base}
    factors = (0.5, base), (1.0, one), (1.5, two)
    return {n: max(factors, key=lambda f: f[0] * f[1][n].float().norm())[1][n] for n in base}


CASES = [
    ("share_of_mean", {"parameters": {"share": 0.7}}),
    ("loudest", {}),
]


@pytest.mark.parametrize(("method", "settings"), CASES)
def test_on_disk_and_live(family, tmp_path, method, settings):
    recipe = make_recipe(family, method, **settings)
    wanted = by_hand(family, method, 0.7)
    assert not differing(load_all(build_model(recipe, tmp_path / "out")), wanted)
    model = AutoModelForCausalLM.from_pretrained(family / "base", dtype=torch.bfloat16)
    live = LiveModel(
        model,
        open_model(str(family / "base")),
        [open_model(str(family / name)) for name in ("one", "two")],
    )
    live.apply(recipe)
    assert not differing({name: p.detach() for name, p in model.named_parameters()}, wanted)


def test_gradients_and_filters_of_an_own_parameter(family, tmp_path):
    """As those of mergekit's parameters."""
    share = [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.5}]
    recipe = make_recipe(family, "share_of_mean", parameters={"share": share})
    merged = load_all(build_model(recipe, tmp_path / "out"))
    base, half = load_all(family / "base"), by_hand(family, "share_of_mean", 0.5)
    full = by_hand(family, "share_of_mean", 1.0)
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(merged[name.format(0)], base[name.format(0)])
    assert torch.equal(merged[name.format(3)], full[name.format(3)])
    assert torch.equal(merged["model.norm.weight"], half["model.norm.weight"])


def test_what_is_wrong_is_said(family, tmp_path):
    with pytest.raises(RecipeError, match="`share` is not set for"):
        build_model(make_recipe(family, "share_of_mean"), tmp_path / "out")
    with pytest.raises(RecipeError, match="`share` is not supported"):
        make_recipe(family, "loudest", parameters={"share": 1.0})
    with pytest.raises(InputError, match="slerp: a merge method with this name already exists"):
        register_method("slerp", MergeMethod(loudest))
    with pytest.raises(UnsupportedRecipe, match="merge_method"):
        make_recipe(family, "quietest")


def test_its_recipes_keep_every_digit(family):
    """A function may read weights in float64: what differs in the last digit is another merge."""
    one, other = (
        make_recipe(family, "share_of_mean", parameters={"share": share})
        for share in (0.7, 0.7 + 1e-12)
    )
    assert one.digest() != other.digest()
    assert one.digest() == make_recipe(family, "share_of_mean", parameters={"share": 0.7}).digest()


def test_the_card_links_it(family):
    recipe = make_recipe(family, "share_of_mean", parameters={"share": 1.0})
    assert "[The share of the mean](https://example.org) merge method" in model_card(recipe, "x")


def search(pair, folder, method):
    """A short search of a method."""
    return evomerge.search(
        pair / "study.yaml",
        storage=folder / "studies.db",
        results=folder / "results",
        trials=4,
        overrides={"genome.merge_method": method, "search.dtype": "float32"},
        console=Console(io.StringIO()),
    )


def test_a_study_searches_it(pair, tmp_path):
    """Its first candidates are task arithmetic's, and the base is the base in both."""
    found = search(pair, tmp_path / "own", "halved")
    plain = search(pair, tmp_path / "plain", "task_arithmetic")
    assert found.recipe.merge_method == "halved"
    drawn = [[r.vector for r in s.records if r.role == "candidate"] for s in (found, plain)]
    assert len(drawn[0]) == 4
    assert drawn[0] == drawn[1]
    (base_record,) = (r for r in found.records if not any(r.vector))
    assert base_record.score == next(r.score for r in plain.records if not any(r.vector))
    again = evomerge.load_study("tiny", storage=tmp_path / "own" / "studies.db")
    assert again.study.genome.merge_method == "halved"
    assert again.to_json() == found.to_json()
    built = load_all(found.build_model(tmp_path / "model", console=Console(io.StringIO())))
    base, other = load_all(pair / "base"), load_all(pair / "instruct")
    weight = found.winner.vector[0]
    name = "model.layers.0.mlp.up_proj.weight"
    delta = (other[name].float() - base[name].float()).double()
    wanted = (base[name].double() + 0.5 * weight * delta).float()
    assert torch.equal(built[name], wanted)


def test_a_study_cannot_search_what_needs_more_than_weights(pair, tmp_path):
    for method, words in (
        ("share_of_mean", "cannot be searched.*with a default"),
        ("quietest", "is not a merge method.*registered"),
    ):
        with pytest.raises(StudyFileError, match=f"(?s)`genome.merge_method` {words}"):
            search(pair, tmp_path, method)


@pytest.mark.parametrize("in_file", [False, True])
def test_a_function_that_changes_its_inputs_changes_no_model(tmp_path, in_file):
    """Live, one candidate after the other, and on disk."""
    family, method = make_family(tmp_path), "added"
    if in_file:
        path, method = tmp_path / "m.py", f"{tmp_path / 'm.py'}:added_in_place"
        path.write_text(inspect.getsource(added_in_place), encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(family / "base", dtype=torch.bfloat16)
    siblings = [open_model(str(family / name)) for name in ("one", "two")]
    live = LiveModel(model, open_model(str(family / "base")), siblings)
    for weight in (0.5, 0.25):
        models = [
            {"model": str(family / name), "parameters": {"weight": weight}}
            for name in ("one", "two")
        ]
        settings = {"base_model": str(family / "base"), "models": models, "dtype": "bfloat16"}
        plain = Recipe.from_dict(settings | {"merge_method": "task_arithmetic"})
        ours = Recipe.from_dict(settings | {"merge_method": method})
        live.apply(ours)
        found = {name: p.detach().clone() for name, p in model.named_parameters()}
        out = load_all(build_model(ours, tmp_path / f"out-{weight}"))
        assert not differing(found, out)
        wanted = load_all(build_model(plain, tmp_path / f"wanted-{weight}"))
        for name, tensor in out.items():
            assert torch.allclose(tensor.float(), wanted[name].float(), rtol=0.02, atol=1e-3), name
