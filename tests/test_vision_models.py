"""Models that read images: what stays, what is merged, and how text reaches them."""

import json
import sys
from pathlib import Path

import pytest
import torch
from merging_tools import load_all

from evomerge.answering.chat_template import render_chat
from evomerge.cli import main
from evomerge.genome.genome import make_genome
from evomerge.merging.build import build_model
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.vocabulary.tokenizer_files import open_tokenizer
from evomerge.recipe import Recipe, task_arithmetic_recipe
from evomerge.study import Study

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import architectures
import tiny_models


@pytest.fixture(scope="module")
def with_vision(tmp_path_factory):
    """A model with a vision tower, base and one."""
    folder = tmp_path_factory.mktemp("with_vision")
    config = tiny_models.tiny_config("gemma3")
    for seed, name in enumerate(("base", "one")):
        tiny_models.make_tiny(config, folder / name, seed)
    return folder


def genome_of(folder, **more):
    """A genome of two slices; `more` are its keys."""
    genome = {"base_model": f"{folder}/base", "models": [f"{folder}/one"], "layer_granularity": 2}
    study = Study.from_dict({"genome": genome | more, "tasks": [f"{folder}/t.jsonl"]})
    return make_genome(study, tiny_models.LAYERS)


def test_the_vision_tower_stays_the_base_s_where_slices_are_merged(with_vision, tmp_path):
    out = load_all(build_model(architectures.recipe_of(with_vision), tmp_path / "out"))
    base, one = load_all(with_vision / "base"), load_all(with_vision / "one")
    outside = [name for name in out if "vision" in name or "projector" in name]
    assert len(outside) > 10
    for name in outside:
        assert torch.equal(out[name], base[name]), name
    layers = [name for name in out if "language_model.layers." in name or "vision" not in name]
    assert any(not torch.equal(out[name], base[name]) for name in layers)
    # its own layers have the text decoder's numbers too: the last slice's weight is 1.2
    for name in out:
        if "language_model" in name and ".layers.3." in name:
            delta = (one[name] - base[name]) * torch.tensor(1.2).bfloat16()
            assert torch.equal(out[name], base[name] + delta), name


def test_whole_models_and_filters_merge_the_vision_tower_too(with_vision, tmp_path):
    base, one = load_all(with_vision / "base"), load_all(with_vision / "one")
    name = next(name for name in base if "vision" in name and name.endswith("fc1.weight"))
    wanted = base[name] + (one[name] - base[name]) * torch.tensor(0.5).bfloat16()
    paths = {model: str(with_vision / model) for model in ("base", "one")}
    whole = {
        "merge_method": "task_arithmetic",
        "base_model": paths["base"],
        "dtype": "bfloat16",
        "models": [{"model": paths["one"], "parameters": {"weight": 0.5}}],
    }
    merged = load_all(build_model(Recipe.from_dict(whole), tmp_path / "whole"))
    assert torch.equal(merged[name], wanted)
    weight = [{"filter": "vision", "value": 0.5}, {"value": 0.9}]
    sources = [
        {"model": paths["one"], "layer_range": [0, 4], "parameters": {"weight": weight}},
        {"model": paths["base"], "layer_range": [0, 4]},
    ]
    named = {key: whole[key] for key in ("merge_method", "base_model", "dtype")}
    named["slices"] = [{"sources": sources}]
    merged = load_all(build_model(Recipe.from_dict(named), tmp_path / "named"))
    assert torch.equal(merged[name], wanted)


@pytest.mark.parametrize("extra", [{}, {"filters": ["mlp"]}, {"merge_method": "slerp"}])
def test_a_genome_says_whether_the_vision_tower_is_merged(with_vision, tmp_path, extra):
    base, one = load_all(with_vision / "base"), load_all(with_vision / "one")
    outside = [name for name in base if "vision" in name or "projector" in name]
    for choice in ("base", "first"):
        decoded = genome_of(with_vision, outside=choice, **extra)
        recipe = decoded.decode([0.25] * decoded.dimensions)
        out = load_all(build_model(recipe, tmp_path / f"{choice}"))
        moved = [name for name in outside if not torch.equal(out[name], base[name])]
        assert moved == (outside if choice == "first" else [])
        if choice == "first" and extra != {"merge_method": "slerp"}:
            for name in outside:
                delta = (one[name] - base[name]) * torch.tensor(0.25).bfloat16()
                assert torch.equal(out[name], base[name] + delta), name


def test_what_prepares_images_is_copied(with_vision, tmp_path):
    for name in ("preprocessor_config.json", "processor_config.json"):
        (with_vision / "base" / name).write_text("{}")
    out = build_model(architectures.recipe_of(with_vision), tmp_path / "out")
    assert {"preprocessor_config.json", "processor_config.json"} <= {p.name for p in out.iterdir()}


def test_templates_that_go_through_parts_get_the_text(tmp_path):
    """As in many models that read images: a plain string would be left out letter by letter."""
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    template = (
        "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    opened = open_tokenizer(str(tmp_path), tmp_path)
    turns = [{"role": "system", "content": "short"}, {"role": "user", "content": "1 and 2"}]
    assert render_chat(opened, turns) == "[system]short[user]1 and 2"


def test_the_yaml_of_a_genome_that_merges_everything_says_so(with_vision, tmp_path):
    base = load_all(with_vision / "base")
    outside = [name for name in base if "vision" in name or "projector" in name]
    for more in ({}, {"filters": ["mlp"]}, {"smooth": True}):
        decoded = genome_of(with_vision, outside="first", **more)
        recipe = decoded.decode([0.25 + 0.01 * i for i in range(decoded.dimensions)])
        (tmp_path / "r.yml").write_text(recipe.to_yaml())
        out = tmp_path / f"out{len(more)}{'smooth' in more}"
        assert main(["merge", str(tmp_path / "r.yml"), str(out)]) == 0
        merged = load_all(out)
        assert all(not torch.equal(merged[name], base[name]) for name in outside)
        assert Recipe.from_dict(recipe.to_dict()).digest() == recipe.digest()


def test_lines_along_the_layers_leave_the_vision_tower_alone(with_vision, tmp_path):
    base = load_all(with_vision / "base")
    decoded = genome_of(with_vision, smooth=True)
    merged = load_all(build_model(decoded.decode([0.25, 0.5]), tmp_path / "out"))
    changed = [name for name in merged if not torch.equal(merged[name], base[name])]
    assert changed
    assert not [name for name in changed if "vision" in name or "projector" in name]


def test_a_tower_that_stays_is_its_model_s_own_bit_for_bit_live(with_vision, tmp_path):
    """Also where the recipe's base is a sibling of the loaded one: no delta is added to it."""
    base, one = (str(with_vision / name) for name in ("base", "one"))
    recipe = task_arithmetic_recipe(one, [base], [(0, 4)], [[0.5]], dtype="bfloat16")
    fresh = architectures.load(build_model(recipe, tmp_path / "out")).state_dict()
    model = architectures.load(with_vision / "base")
    architectures.LiveModel(model, open_model(base), [open_model(one)]).apply(recipe)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh[name]), name
