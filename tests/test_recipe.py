"""Recipes: read, refused, written, digested, and as a model card."""

import pytest
import torch
import yaml

from evomerge.errors import RecipeError
from evomerge.recipe import Recipe, read_recipe, task_arithmetic_recipe
from evomerge.reporting.card import model_card

SLICES = [(0, 1), (1, 3), (3, 4)]


def good():
    return task_arithmetic_recipe("b", ["s"], [(0, 4)], [[1.0]]).to_dict()


def test_a_recipe_survives_writing_and_reading(tmp_path):
    weights = [[0.1 + 0.2], [1e-17], [-1 / 3]]
    recipe = task_arithmetic_recipe("owner/base", ["owner/instruct"], SLICES, weights)
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    again = read_recipe(tmp_path / "r.yaml")
    assert again.to_dict() == recipe.to_dict()
    assert list(recipe.to_dict()) == ["base_model", "dtype", "merge_method", "parameters", "slices"]
    card = model_card(recipe, "mine")
    for part in (
        "base_model:\n- owner/base\n- owner/instruct\n",
        "tags:\n- mergekit\n- merge\n",
        "### Merge Method",
        "### Models Merged",
        "```yaml\n",
    ):
        assert part in card


def test_a_digest_sees_the_rounded_weight(tmp_path):
    def digest(w):
        return task_arithmetic_recipe("b", ["s"], [(0, 4)], [[w]]).digest()

    assert digest(0.5) == digest(0.5 + 1e-6)
    assert torch.tensor(0.5, dtype=torch.bfloat16) == torch.tensor(0.5 + 1e-6, dtype=torch.bfloat16)
    assert digest(0.5) != digest(0.51)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"merge_method": "sec"}, ["merge_method", "sec", "sce", "evomerge[mergekit]"]),
        ({"merge_method": None}, ["merge_method", "missing"]),
        ({"slices": None}, ["exactly one"]),
        ({"dtype": "int8"}, ["dtype", "int8"]),
        ({"tokenizer_source": 3}, ["tokenizer_source"]),
        ({"tokenizer_source": "base", "tokenizer": {}}, ["both"]),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, ["pad_to_multiple_of", "0"]),
        ({"parameters": {"density": 0.0}}, ["density", "0.0"]),
        ({"parameters": {"density": 1.5}}, ["density", "1.5"]),
        (
            {
                "merge_method": "slerp",
                "slices": None,
                "models": [{"model": "b"}, {"model": "s"}, {"model": "t"}],
            },
            ["exactly two"],
        ),
        ({"parameters": {"weight": float("nan")}}, ["weight", "not finite"]),
        ({"parameters": {"lambda": float("inf")}}, ["lambda", "not finite"]),
        ({"parameters": {"densty": 1}}, ["densty"]),
        ({"base_model": None}, ["base_model"]),
        ({"modules": {"default": {}}}, ["modules"]),
    ],
)
def test_bad_recipes(change, words):
    good = task_arithmetic_recipe("b", ["s"], [(0, 4)], [[1.0]]).to_dict()
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(good | change)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (float("-inf"), ["not finite"]),
        ("nan", ["not finite", "nan"]),
        ([0.0, "inf"], ["not finite"]),
        ([{"filter": "mlp", "value": [1, float("nan")]}], ["not finite"]),
        (3.4e38, ["infinite in bfloat16"]),
        (10**400, ["not a number"]),
        ("half", ["not a number", "half"]),
        (None, ["not a number"]),
        ([], ["not a number"]),
        ([0.5, {"filter": "mlp", "value": 1}], ["{filter, value}"]),
        ({"filter": "mlp"}, ["{filter, value}"]),
        ({"filter": 3, "value": 1}, ["{filter, value}"]),
        ({"filtr": "mlp", "value": 1}, ["filtr"]),
    ],
)
def test_bad_weights_are_named_with_their_place(setting, words):
    data = good()
    data["slices"][0]["sources"][0]["parameters"] = {"weight": setting}
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(data, "best.yaml")
    for word in ["best.yaml, slices[0].sources[0]", "weight", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("value", [2, 0.5, "maybe", None])
def test_a_switch_is_true_or_false(value):
    with pytest.raises(RecipeError, match="normalize"):
        Recipe.from_dict(good() | {"parameters": {"normalize": value}})


def test_sources_as_mergekit_wants_them():
    data = good()
    sources = data["slices"][0]["sources"]
    data["slices"][0]["sources"] = sources[:1]
    with pytest.raises(RecipeError, match="base is not among"):
        Recipe.from_dict(data)
    data["slices"][0]["sources"] = [*sources, sources[0]]
    with pytest.raises(RecipeError, match="listed twice"):
        Recipe.from_dict(data)
    sources[0]["layer_range"] = [0, 3]
    data["slices"][0]["sources"] = sources
    with pytest.raises(RecipeError, match="differ in length"):
        Recipe.from_dict(data)


@pytest.mark.parametrize("layers", [[2, 1], [0, 0], [-1, 2], [0], [0, 1.5], "0-4", None])
def test_layer_ranges_are_pairs(layers):
    data = good()
    for source in data["slices"][0]["sources"]:
        source["layer_range"] = layers
    with pytest.raises(RecipeError, match="layer_range"):
        Recipe.from_dict(data)


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="no such file"):
        read_recipe(tmp_path / "none.yml")
    for text, words in {
        "a: [": "YAML",
        "- a": "mapping",
        "": "mapping",
        "slices: 5\nbase_model: b\nmerge_method: [x]": "merge_method",
    }.items():
        (tmp_path / "r.yml").write_text(text)
        with pytest.raises(RecipeError, match=words):
            read_recipe(tmp_path / "r.yml")
    (tmp_path / "r.yml").write_bytes(b"base_model: \xff")
    with pytest.raises(RecipeError, match=r"r\.yml"):
        read_recipe(tmp_path / "r.yml")


def test_the_shape_of_the_seed(shared):
    """Built from its numbers, the original's recipe is the original's file, byte for byte."""
    text = (shared / "golden/seed40_llama/config.yml").read_text()
    data = yaml.safe_load(text)
    rows = [[piece["sources"][0]["parameters"]["weight"]] for piece in data["slices"]]
    slices = [tuple(piece["sources"][0]["layer_range"]) for piece in data["slices"]]
    built = task_arithmetic_recipe("./base", ["./instruct"], slices, rows)
    assert built.to_dict() == data
    assert built.to_yaml().strip() == text.strip()


@pytest.mark.parametrize(
    "path",
    [
        "./a](http://x)",
        "./<script>alert(1)</script>",
        "./a|b*c*`d`~e~$f$",
        "./_a_/b_c",
        "./a\nb\n# c",
        "x](y)/z",
        "[a](b)/c+./d`e",
        "./&lt;",
    ],
)
def test_paths_in_the_card_are_texts(path):
    """Each is one line of the body, which a Markdown reader shows as it is."""
    markdown_it = pytest.importorskip("markdown_it")
    data = {"merge_method": "linear", "models": [{"model": "owner/name"}, {"model": path}]}
    for source in data["models"]:
        source["parameters"] = {"weight": 1}
    card = model_card(Recipe.from_dict(data), path, recipe_text="a: ```\n````\nb")
    shown = " ".join(path.split())
    assert "* [owner/name](https://huggingface.co/owner/name)\n" in card
    tokens = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(card)
    lines = {}
    for token in tokens:
        if token.type == "inline":
            text = "".join(child.content for child in token.children)
            lines[text] = {child.type for child in token.children}
    for text in (shown, shown.replace("+", " + ")):  # the heading; an item, which links two models
        assert lines[text] == {"text"}
    assert "`````yaml\na: ```\n````\nb\n`````\n" in card


def test_the_card_has_mergekits_parts(shared):
    wanted = (shared / "golden/seed40_llama/expected/README.md").read_text().splitlines()
    card = model_card(
        read_recipe(shared / "golden/seed40_llama/config.yml"),
        "expected",
        "## Verdict\n\nBetter.\n",
    ).splitlines()
    aside = "This is a merge of pre-trained language models"  # mergekit's names itself as the maker
    assert [line for line in wanted if not line.startswith(aside) and line not in card] == []
    assert "## Verdict" in card


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_digest_rounds_as_torch_does(dtype):
    generator = torch.Generator().manual_seed(0)
    for w in (3 * torch.randn(50, generator=generator, dtype=torch.float64)).tolist():
        rounded = torch.tensor(w, dtype=getattr(torch, dtype)).item()
        one, other = (
            task_arithmetic_recipe("b", ["s"], [(0, 4)], [[v]], dtype=dtype) for v in (w, rounded)
        )
        assert one.digest() == other.digest()
