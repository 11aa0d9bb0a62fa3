"""A method that is added to the tables of traits and functions is treated right everywhere."""

from dataclasses import replace

import pytest

from evomerge.cli import main
from evomerge.errors import RecipeError
from evomerge.genome.genome import make_genome
from evomerge.merging.methods import registry
from evomerge.recipe import METHODS, MethodParameter, MethodTraits, Recipe
from evomerge.reporting.card import ALONE, model_card
from evomerge.reporting.export import OWN_COMMENT
from evomerge.study import Study

NAME = "tilted"
TRAITS = MethodTraits(
    link="[Tilted](https://example.org)",
    takes_deltas=True,
    has_densities=True,
    draws=True,
    search_normalizes=True,
    parameters={"tilt": MethodParameter(default=0.5, low=0, high=1, search=(0.2, 0.9))},
)


def tilted(base, others, plan, generator):
    total = plan.parameters["tilt"] * base
    for weight, delta in zip(plan.weights, others, strict=True):
        total = total + weight * delta
    return total.to(base.dtype)


@pytest.fixture(autouse=True)
def added(monkeypatch):
    monkeypatch.setitem(METHODS, NAME, TRAITS)
    monkeypatch.setitem(registry._METHODS, NAME, registry.with_function(TRAITS, tilted))


def recipe(weight=0.3, density=0.5, **parameters):
    sibling = {"model": "one", "parameters": {"weight": weight, "density": density}}
    data = {"merge_method": NAME, "base_model": "base", "dtype": "bfloat16"}
    return Recipe.from_dict(
        {**data, "models": [sibling, {"model": "base"}], "parameters": parameters}
    )


def test_every_digit_of_its_weights_counts_until_its_traits_say_otherwise(monkeypatch):
    close = 0.3 + 1e-9  # the same number in bfloat16
    assert recipe().digest() != recipe(close).digest()
    monkeypatch.setitem(METHODS, NAME, replace(TRAITS, same_when_rounded_to="dtype"))
    assert recipe().digest() == recipe(close).digest() != recipe(0.4).digest()


def test_its_parameters_are_checked():
    assert recipe(tilt=0.7).note is None
    assert "`t`" in recipe(t=0.7).note
    with pytest.raises(RecipeError, match="`tilt` is out of range"):
        recipe(tilt=2)
    with pytest.raises(RecipeError, match="`density` is out of range"):
        recipe(density=0)


def test_a_search_has_genes_for_what_it_takes():
    genome = {"merge_method": NAME, "base_model": "/base", "models": ["/one", "/two"]}
    study = {"study": "s", "genome": genome, "tasks": [{"file": "tasks.jsonl"}]}
    space = make_genome(Study.from_dict(study), 2)
    assert space.normalize
    assert space.names == (
        "layers 0-1 · one",
        "layers 0-1 · one · density",
        "layers 0-1 · two",
        "layers 0-1 · two · density",
        "layers 0-1 · tilt",
    )
    assert (space.genes[-1].low, space.genes[-1].high, space.genes[-1].start) == (0.2, 0.9, 0.5)
    assert space.decode((0.1, 0.5, 0.2, 0.6, 0.7)).slices[0].parameters == {"tilt": 0.7}


def test_search_and_export_know_it(pair, tmp_path, capsys):
    """Its seed stands in the recipe, as of every method that draws, and no note on a user's own."""
    storage, results = f"sqlite:///{tmp_path}/s.db", tmp_path / "results"
    where = ["--storage", storage, "--results", str(results)]
    chosen = ["--set", f"genome.merge_method={NAME}", "--set", "search.seed=5", "--trials", "2"]
    assert main(["search", str(pair / "study.yaml"), *where, *chosen]) == 0
    capsys.readouterr()
    text = (results / "tiny/best.yaml").read_text()
    assert f"merge_method: {NAME}" in text
    assert "--random-seed 5" in text
    assert OWN_COMMENT not in text
    card = model_card(recipe(), "name")
    assert ALONE not in card
    assert TRAITS.link in card
