"""Models that read images: what stays, what is merged, and how text reaches them."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from merging_tools import differing, load_all

import evomerge
from evomerge.answering.chat_template import render_chat
from evomerge.cli import main
from evomerge.errors import RecipeError
from evomerge.genome.genome import make_genome
from evomerge.merging.architecture.architecture import architecture_of
from evomerge.merging.build import build_model
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.vocabulary.tokenizer_files import open_tokenizer
from evomerge.recipe import Recipe, read_recipe, task_arithmetic_recipe
from evomerge.reporting.export import card
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


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """A model of several modules that mergekit describes by the names that transformers writes."""
    folder = tmp_path_factory.mktemp("mistral")
    architectures.make("mistral3", folder)
    return folder


MODULES = ("text_decoder", "multi_modal_projector", "vision_tower")


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties"])
def test_slices_of_the_text_decoder_beside_modules_that_are_the_base_s(mistral, tmp_path, method):
    """mergekit's form of the same merge; `tests/test_mergekit.py` merges it with mergekit."""
    data = architectures.recipe_of(mistral).to_dict() | {"merge_method": method}
    for piece in data["slices"]:
        for source in piece["sources"]:
            if source["model"] != data["base_model"]:
                source["parameters"] |= {"density": 0.6} if method != "task_arithmetic" else {}
    slices = Recipe.from_dict(data)
    modules = slices.in_modules(MODULES)
    assert "slices" not in modules.to_dict()
    (tmp_path / "r.yml").write_text(modules.to_yaml())
    assert main(["merge", str(tmp_path / "r.yml"), str(tmp_path / "out")]) == 0
    wanted = load_all(build_model(slices, tmp_path / "wanted"))
    assert not differing(load_all(tmp_path / "out"), wanted)


def test_the_card_of_slices_says_that_only_evomerge_merges_them(mistral, tmp_path):
    slices = architectures.recipe_of(mistral)
    assert "slices" in slices.to_dict()
    for name, recipe, only in (("s", slices, True), ("m", slices.in_modules(MODULES), False)):
        (tmp_path / f"{name}.yml").write_text(recipe.to_yaml())
        assert main(["merge", str(tmp_path / f"{name}.yml"), str(tmp_path / name)]) == 0
        text = (tmp_path / name / "README.md").read_text()
        assert ("only evomerge merges the configuration" in text) == only


def test_a_whole_text_decoder_beside_modules_that_are_the_base_s(mistral, tmp_path):
    data = {"merge_method": "task_arithmetic", "base_model": f"{mistral}/base", "dtype": "bfloat16"}
    models = [{"model": f"{mistral}/one", "parameters": {"weight": 0.5}}]
    recipe = Recipe.from_dict({**data, "models": models})
    out = load_all(build_model(recipe.in_modules(MODULES), tmp_path / "out"))
    whole = load_all(build_model(recipe, tmp_path / "whole"))
    base = load_all(mistral / "base")
    for name, tensor in out.items():
        source = whole if name.startswith("language_model.") else base
        assert torch.equal(tensor, source[name]), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m | {"vision_tower": {"models": [{"model": "another"}]}}, "are the base's"),
        (lambda m: {"tower": m["vision_tower"], **m}, "not those of Mistral3"),
        (lambda m: {"text_decoder": m["text_decoder"]}, "not those of Mistral3"),
        (lambda m: m | {"text_decoder": {}}, "needs exactly one of `slices` and `models`"),
    ],
)
def test_modules_of_another_kind_are_left_to_mergekit(mistral, change, words):
    data = architectures.recipe_of(mistral).in_modules(MODULES).to_dict()
    data["modules"] = change(data["modules"])
    with pytest.raises(RecipeError, match=words):
        build_model(Recipe.from_dict(data), mistral / "out")


def search(folder, tmp_path, genome, **more):
    """A study's recipe and card."""
    (tmp_path / "tasks.jsonl").write_text(
        "".join(json.dumps({"input": f"{i}", "output": f"{2 * i}"}) + "\n" for i in range(8))
    )
    study = {
        "genome": {"base_model": f"{folder}/base", "models": [f"{folder}/one"], **genome},
        "tasks": [{"file": "tasks.jsonl"}],
        "judge": {"kind": "rules"},
        "search": {"trials": 4, "population": 4, "warm_start_steps": 1, "dtype": "bfloat16"} | more,
        "generation": {"max_new_tokens": 2},
        "engine": {"device": "cpu"},
    }
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    url = f"sqlite:///{tmp_path}/s.db"
    assert main(["search", str(tmp_path / "study.yaml"), "--storage", url]) == 0
    study = evomerge.load_study("study", storage=url)
    number = next(r.number for r in study.records if r.role == "candidate")
    chosen = study.with_trial(number)
    return chosen, card(chosen.snapshot)


@pytest.mark.parametrize(
    ("genome", "exported"),
    [
        ({"layer_granularity": 2}, "modules"),
        ({"layer_granularity": 2, "filters": ["mlp"]}, "modules"),
        ({"layer_granularity": 2, "filters": ["vision"]}, "comment"),
        ({"layer_granularity": 2, "outside": "first"}, "comment"),
        ({"layer_granularity": 2, "merge_method": "linear"}, "comment"),
    ],
)
def test_a_study_exports_what_mergekit_can_merge_or_says_that_it_cannot(
    mistral, tmp_path, monkeypatch, genome, exported
):
    monkeypatch.chdir(tmp_path)
    chosen, text = search(mistral, tmp_path, genome)
    written = chosen.recipe_yaml
    assert ("modules:" in written) == (exported == "modules")
    assert written.startswith("# Only evomerge merges this") == (exported == "comment")
    assert ("only evomerge merges the configuration" in text) == (exported == "comment")
    assert written.rstrip() in text
    (tmp_path / "r.yml").write_text(written)
    out = load_all(build_model(read_recipe(tmp_path / "r.yml"), tmp_path / "out"))
    assert not differing(out, load_all(build_model(chosen.recipe, tmp_path / "wanted")))


def test_an_exported_recipe_of_modules_is_another_study_s_first_candidate(
    mistral, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    chosen, _ = search(mistral, tmp_path, {"layer_granularity": 2})
    (tmp_path / "r.yml").write_text(chosen.recipe_yaml)
    assert "modules:" in chosen.recipe_yaml
    (tmp_path / "next").mkdir()
    again, _ = search(mistral, tmp_path / "next", {"layer_granularity": 2}, recipes=["../r.yml"])
    first = again.with_trial(min(r.number for r in again.records if r.role == "candidate"))
    assert first.recipe.digest() == chosen.recipe.digest()


def test_names_that_mergekit_s_description_does_not_have_are_not_exported_for_it(with_vision):
    """Gemma 3's vision tower, which the hub's files name otherwise than transformers 5."""
    names = open_model(f"{with_vision}/base").keys
    assert open_model(f"{with_vision}/base").architecture.modules == ()
    config = json.loads((with_vision / "base/config.json").read_text())
    as_on_hub = [n.replace("vision_tower.", "vision_tower.vision_model.") for n in names]
    assert architecture_of(config, as_on_hub).modules == MODULES


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_every_part_of_config_json_states_the_dtype_of_the_output(with_vision, tmp_path, key):
    """transformers 4 reads the text decoder's."""
    for name in ("base", "one"):
        shutil.copytree(with_vision / name, tmp_path / name)
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text())
        for part in (config, config["text_config"], config["vision_config"]):
            part.pop("dtype", None)
            part[key] = "bfloat16"
        path.write_text(json.dumps(config))
    models = [{"model": f"{tmp_path}/one", "parameters": {"weight": 0.5}}]
    top = {"merge_method": "task_arithmetic", "base_model": f"{tmp_path}/base"}
    recipe = Recipe.from_dict(top | {"models": models, "dtype": "float16"})
    config = json.loads((build_model(recipe, tmp_path / "out") / "config.json").read_text())
    assert config[key] == config["text_config"][key] == config["vision_config"][key] == "float16"


@pytest.mark.parametrize("both", [True, False])
def test_the_number_of_tokens_is_stated_alike_where_it_is_stated_twice(tmp_path, both):
    """PaliGemma's files have it in the text part and above."""
    config = tiny_models.tiny_config("paligemma")
    for seed, name in enumerate(("base", "one")):
        tiny_models.make_tiny(config, tmp_path / name, seed)
        path = tmp_path / name / "config.json"
        stated = json.loads(path.read_text())
        stated.pop("vocab_size", None)
        size = {"vocab_size": stated["text_config"]["vocab_size"]} if both else {}
        path.write_text(json.dumps(stated | size))
    models = [{"model": f"{tmp_path}/one", "parameters": {"weight": 0.5}}]
    top = {"merge_method": "task_arithmetic", "base_model": f"{tmp_path}/base"}
    recipe = Recipe.from_dict(top | {"models": models, "tokenizer_source": "base"})
    merged = json.loads((build_model(recipe, tmp_path / "out") / "config.json").read_text())
    assert merged["text_config"]["vocab_size"] < tiny_models.VOCABULARY
    assert merged.get("vocab_size") == (merged["text_config"]["vocab_size"] if both else None)
