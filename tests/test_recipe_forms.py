"""Every way in which mergekit's configurations may be written, and the keys that it reads over."""

import io

import pytest
import torch
import yaml
from merging_tools import differing, load_all, make_family

import evomerge
from evomerge.console import Console
from evomerge.errors import RecipeError, UnsupportedRecipe
from evomerge.recipe import Recipe, read_recipe

PLAIN = """
merge_method: task_arithmetic
base_model: ./base
models:
- model: ./one
  parameters: {weight: 0.5}
dtype: bfloat16
"""
SLICES = """
merge_method: task_arithmetic
base_model: ./base
dtype: bfloat16
slices:
- sources:
  - {model: ./one, layer_range: [0, 4], parameters: {weight: 0.5}}
  - {model: ./base, layer_range: [0, 4]}
"""
SECTION = SLICES.partition("slices:")[2]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A folder with base/, one/ and two/."""
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def by_hand(family):
    """base + 0.5 (one - base), each step in bf16."""
    base, one = load_all(family / "base"), load_all(family / "one")
    weight = torch.tensor(0.5, dtype=torch.bfloat16)
    return {name: base[name] + (0 + (one[name] - base[name]) * weight) for name in base}


def merged(family, folder, text, monkeypatch):
    """(tensors, what was said) of a configuration, with paths as in mergekit."""
    monkeypatch.chdir(family)
    (folder / "c.yml").write_text(text, encoding="utf-8")
    said = io.StringIO()
    evomerge.merge(folder / "c.yml", folder / "out", console=Console(said))
    return load_all(folder / "out"), said.getvalue()


UNREAD = {
    "a name": (PLAIN + "name: first\n", ["`name`"]),
    "a seed": (PLAIN + "random_seed: 0\n", ["`random_seed`"]),
    "of evolve": (PLAIN + "allow_negative_weights: true\n", ["`allow_negative_weights`"]),
    "a date": (PLAIN + "made: 2024-05-06\n", ["`made`"]),
    "a number": (PLAIN + "1: 2\n", ["`1`"]),
    "a weight on top": (PLAIN + "weight: heavy\nt: 1\n", ["`weight`", "`t`"]),
    "an anchor": (
        "const_tag: &one ./one\n" + PLAIN.replace("model: ./one", "model: *one"),
        ["`const_tag`"],
    ),
    "an anchor beside the key": (
        "dtypes: &kind bfloat16\n" + PLAIN.replace("bfloat16", "*kind"),
        ["`dtypes`"],
    ),
    "a parameter": (PLAIN + "parameters: {embed_slerp: true}\n", ["`embed_slerp`"]),
    "filters": (
        PLAIN + "parameters: {new: [{filter: mlp, value: [a, 1]}, {value: x}]}\n",
        ["`new`"],
    ),
    "of another method": (PLAIN + "parameters: {t: 0.5}\n", ["`t`"]),
    "layers of models": (
        PLAIN.replace("  parameters", "  layer_range: [0, 2]\n  parameters"),
        ["models[0], `layer_range`"],
    ),
    "of a source": (
        SLICES.replace("model: ./one,", "model: ./one, dtype: float16,"),
        ["slices[0].sources[0], `dtype`"],
    ),
    "of a slice": (
        SLICES.replace("- sources", "- merge_method: linear\n  residual_weight: 0.5\n  sources"),
        ["slices[0], `merge_method`", "slices[0], `residual_weight`"],
    ),
    "a weight of the base": (
        SLICES.replace("[0, 4]}", "[0, 4], parameters: {weight: 3.0}}"),
        ["slices[0].sources[1] (the base), `parameters`"],
    ),
    "a shared parameter of a source": (
        PLAIN.replace("{weight: 0.5}", "{weight: 0.5, normalize: true, lambda: 3}"),
        ["models[0], `normalize`", "models[0], `lambda`"],
    ),
}


@pytest.mark.parametrize("name", UNREAD)
def test_keys_that_nothing_reads_change_nothing_and_are_named(
    family, by_hand, tmp_path, monkeypatch, name
):
    text, words = UNREAD[name]
    tensors, said = merged(family, tmp_path, text, monkeypatch)
    assert not differing(tensors, by_hand)
    (note,) = [line for line in said.splitlines() if "ignored, as in mergekit" in line]
    assert note.startswith(f"{tmp_path}/c.yml: note: ")
    for word in words:
        assert word in note
    assert len(read_recipe(tmp_path / "c.yml").unread) == len(words)
    assert len(read_recipe(tmp_path / "c.yml").digest()) == 64


FORMS = {
    "modules with slices": SLICES.partition("slices:")[0]
    + "modules:\n  default:\n    slices:"
    + SECTION.replace("\n", "\n    ").rstrip(" "),
    "modules with models": PLAIN.replace("models:", "modules: {default: {models: [").replace(
        "- model: ./one\n  parameters: {weight: 0.5}",
        "  {model: ./one, parameters: {weight: 0.5}}]}}",
    ),
    "a module's parameters": PLAIN.replace("models:", "modules: {default: {models: [")
    .replace("- model: ./one\n  parameters: {weight: 0.5}", "  {model: ./one}], ")
    .replace("dtype:", "  parameters: {weight: 0.5}}}\ndtype:")
    + "parameters: {weight: 3}\n",
    "torch's dtype": PLAIN.replace("bfloat16", "torch.bfloat16") + "out_dtype: torch.bfloat16\n",
    "mappings": PLAIN.replace("./one", "{model: {path: ./one, revision: null}, lora: null}"),
    "a mapping of the base": PLAIN.replace(
        "./base", "{model: ./base, override_architecture: LlamaForCausalLM}"
    ),
    "a path": PLAIN.replace("./one", "{path: ./one}"),
    "revisions of folders": PLAIN.replace("./one", "./one@main").replace("./base", "./base@v1"),
    "layers as texts": SLICES.replace("[0, 4], p", '["0", "4"], p'),
    "whole numbers of layers": SLICES.replace("[0, 4], p", "[0.0, 4.0], p"),
    "nothing in keys": PLAIN + "slices: []\nmodules: {}\ntokenizer: null\nchat_template: ''\n",
}


@pytest.mark.parametrize("name", FORMS)
def test_other_forms_are_the_same_merge(family, by_hand, tmp_path, monkeypatch, name):
    tensors, said = merged(family, tmp_path, FORMS[name], monkeypatch)
    assert not differing(tensors, by_hand)
    assert "ignored, as in mergekit" not in said


def test_a_module_s_parameters_rank_between_those_of_slices_and_of_the_top(family):
    """Where no filter of the module matches, the top level decides."""
    data = yaml.safe_load(SLICES)
    del data["slices"][0]["sources"][0]["parameters"]
    module = {
        "slices": data.pop("slices"),
        "parameters": {"weight": [{"filter": "mlp", "value": 0.5}], "normalize": False},
    }
    top = {"weight": [{"filter": "attn", "value": [0, 1]}, {"value": 0.25}], "normalize": True}
    recipe = Recipe.from_dict(data | {"modules": {"default": module}, "parameters": top})
    assert recipe.parameters == {
        "weight": [{"filter": "mlp", "value": 0.5}, *top["weight"]],
        "normalize": False,
    }
    recipe = Recipe.from_dict(
        data | {"modules": {"default": module}, "parameters": {"weight": [0, 1]}}
    )
    assert recipe.parameters["weight"][1:] == [{"value": [0, 1]}]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (PLAIN.replace("weight:", "wieght:"), ["`wieght`", "mean `weight`", "models[0]"]),
        (PLAIN.replace("weight:", "weights:"), ["`weights`", "mean `weight`"]),
        (PLAIN.replace("dtype", "dtpye"), ["`dtpye`", "mean `dtype`"]),
        (PLAIN.replace("base_model", "base-model"), ["`base-model`", "mean `base_model`"]),
        (PLAIN + "parameters: {densty: 0.5}\n", ["`densty`", "mean `density`"]),
        (SLICES.replace("- sources", "- source"), ["slices[0]", "mean `sources` by `source`"]),
        (
            SLICES.replace("layer_range", "layer_rang"),
            ["sources[0]", "mean `layer_range` by `layer_rang`"],
        ),
        (PLAIN.replace("model: ./one", "modle: ./one"), ["models[0]", "mean `model` by `modle`"]),
        (PLAIN + "parameters: {new: null}\n", ["new", "is not a parameter's value"]),
        (PLAIN + "parameters: {new: {filter: mlp}}\n", ["new", "is not a parameter's value"]),
        (PLAIN.replace("./one", "{paht: ./one}"), ["models[0]", "`model` is not a name"]),
        (PLAIN.replace("./one", "{model: {revision: x}}"), ["models[0]", "is not a name"]),
        (PLAIN.replace("./one", "5"), ["models[0]", "is not a name", "5"]),
        (
            PLAIN + "tokenizer_source: model:./one\n",
            ["`tokenizer_source`", "./one, without `model:`"],
        ),
        (
            PLAIN + "tokenizer: {source: 'model:x/y'}\n",
            ["tokenizer.source", "x/y, without `model:`"],
        ),
        (
            PLAIN + "name: a\n---\n" + PLAIN,
            ["c.yml", "several YAML documents", "one merge per file"],
        ),
        (PLAIN + "chat_template: chatml2\n", ["`chat_template`", "chatml2", "auto", "chatml"]),
        (PLAIN + "chat_template: [x]\n", ["`chat_template`", "Jinja"]),
        (PLAIN + "modules: {default: {}}\n", ["exactly one", "modules"]),
        (SLICES.replace("slices:", "modules: {default: {}}\nx:"), ["modules.default"]),
    ],
)
def test_what_mergekit_refuses_or_a_slip_of_the_pen_is_one_line(tmp_path, text, words):
    (tmp_path / "c.yml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        read_recipe(tmp_path / "c.yml")
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_modules_are_left_to_mergekit():
    data = yaml.safe_load(PLAIN)
    modules = {name: {"models": data["models"]} for name in ("text_decoder", "vision_tower")}
    del data["models"]
    with pytest.raises(UnsupportedRecipe, match="vision_tower"):
        Recipe.from_dict(data | {"modules": modules})


def test_the_base_s_class_may_be_named(family, tmp_path, monkeypatch):
    """mergekit writes it into the output's configuration."""
    base = "{model: ./base, override_architecture: MistralForCausalLM}"
    merged(family, tmp_path, PLAIN.replace("./base", base), monkeypatch)
    config = yaml.safe_load((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"]


def test_references_in_a_tokenizer_section():
    data = yaml.safe_load(PLAIN)
    tokens = {
        "<a>": {"source": {"model": {"path": "./one"}}, "force": True, "why": "new"},
        "<b>": {
            "source": {"kind": "model_token", "model": {"model": "./one"}, "token": "x"}
            | {"token_id": None, "comment": 1}
        },
        "<c>": {"source": {"kind": "zero", "comment": 1}},
    }
    section = {"source": {"model": {"path": "./one"}}, "tokens": tokens}
    recipe = Recipe.from_dict(data | {"tokenizer": section})
    assert recipe.tokenizer.source == "./one"
    assert recipe.tokenizer.tokens == {
        "<a>": {"source": "./one", "force": True},
        "<b>": {"source": {"kind": "model_token", "model": "./one", "token": "x"}},
        "<c>": {"source": {"kind": "zero"}},
    }
    assert len(recipe.unread) == 3
