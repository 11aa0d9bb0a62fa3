"""Every architecture: merged on disk and live, with the weight that each tensor's role asks for."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from merging_tools import differing, load_all
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification

from evomerge.answering.hf.loading import load_model
from evomerge.cli import main
from evomerge.errors import ModelError, RecipeError
from evomerge.merging.build import build_model
from evomerge.merging.checkpoints.config_fault import check_config
from evomerge.merging.checkpoints.model_folder import num_layers
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.open_recipe import open_recipe
from evomerge.merging.stream import MergePlan
from evomerge.recipe import Recipe, task_arithmetic_recipe
from evomerge.study import EngineSection

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import architectures
import tiny_models

ALL = os.environ.get("EVOMERGE_MODELS") == "all"
DOZEN = [
    *("apertus", "bloom", "deepseek_v3", "gpt2", "gpt_neox", "gpt_oss", "jamba", "lfm2"),
    *("mixtral", "opt", "qwen3_moe", "qwen3_next"),
]
SOME_IMAGES = ["gemma3", "llama4", "mistral3", "qwen3_5", "qwen3_vl"]
TYPES = [*DOZEN, *SOME_IMAGES]
if ALL:
    TYPES = [*architectures.text_types(), *architectures.image_types()]


# docs/MODELS.md says why
ON_DISK_ONLY, REFUSED = ("diffusion_gemma", "shieldgemma2"), ("hrm_text",)


@pytest.mark.parametrize("name", TYPES)
def test_merged_on_disk_by_the_formula_and_live_as_a_fresh_load(tmp_path, name):
    try:
        architectures.make(name, tmp_path)
    except Exception as error:
        if name in DOZEN:
            raise
        pytest.skip(f"transformers makes no tiny {name}: {error}")
    if name in REFUSED:
        with pytest.raises(ModelError):
            architectures.check_build(tmp_path)
        return
    architectures.check_build(tmp_path)
    if name in ON_DISK_ONLY:
        with pytest.raises(ModelError):
            architectures.check_live(tmp_path)
        return
    architectures.check_live(tmp_path)


@pytest.mark.parametrize("layers", [{}, {"num_hidden_layers": 8}])
def test_longcat_s_layers_are_counted_once(layers):
    """Releases of transformers that write the other number count two attentions in each."""
    assert num_layers({"model_type": "longcat_flash", "num_layers": 4} | layers) == 4


@pytest.mark.parametrize("case", ["arch_mixtral", "arch_qwen3_moe", "arch_gpt2", "arch_lfm2"])
def test_mergekit_s_bits(shared, tmp_path, monkeypatch, case):
    """mergekit writes some of them with other names than the inputs', so both are loaded."""
    folder = tmp_path / case
    shutil.copytree(shared / "golden2" / case, folder)
    monkeypatch.chdir(folder)
    assert main(["merge", "config.yml", "out"]) == 0
    assert load_all(folder / "out").keys() == load_all(folder / "base").keys()
    ours, theirs = (architectures.load(folder / name).state_dict() for name in ("out", "expected"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_a_head_for_several_tokens_stays_the_base_s(tmp_path):
    """DeepSeek stores such a head as a further layer, which transformers leaves out."""
    config = tiny_models.tiny_config("deepseek_v3")
    for seed, name in enumerate(("base", "one")):
        tiny_models.make_tiny(config, tmp_path / name, seed)
        tensors = load_all(tmp_path / name)
        tensors["model.layers.4.eh_proj.weight"] = torch.full((2, 2), float(seed)).bfloat16()
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    architectures.check_build(tmp_path)
    assert not load_all(tmp_path / "out")["model.layers.4.eh_proj.weight"].any()
    architectures.check_live(tmp_path)


def test_whole_numbers_are_copied(tmp_path):
    architectures.make("gpt2", tmp_path)
    for number, name in enumerate(("base", "one")):
        tensors = load_all(tmp_path / name)
        tensors["transformer.h.0.attn.bias"] = torch.full((1, 1, 4, 4), number, dtype=torch.uint8)
        tensors["transformer.h.0.counter"] = torch.tensor([3 + number])
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    architectures.check_build(tmp_path)
    out = load_all(tmp_path / "out")
    assert out["transformer.h.0.counter"].tolist() == [3]
    assert out["transformer.h.0.counter"].dtype == torch.int64


def test_a_model_that_transformers_does_not_know(tmp_path, caplog):
    """Its names have to do: the longest list of layers, everything else by the first slice."""
    for seed, name in enumerate(("base", "one")):
        torch.manual_seed(seed)
        tensors = {f"core.block.{i}.w": torch.randn(4, 4).bfloat16() for i in range(4)}
        tensors["core.odd"] = torch.randn(4).bfloat16()
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        config = {"model_type": "somebodys", "num_hidden_layers": 4, "architectures": ["S"]}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    caplog.clear()
    out = load_all(build_model(architectures.recipe_of(tmp_path), tmp_path / "out"))
    base, one = load_all(tmp_path / "base"), load_all(tmp_path / "one")
    for name, weight in (("core.odd", 0.7), ("core.block.1.w", 0.7), ("core.block.2.w", 1.2)):
        delta = (one[name] - base[name]) * torch.tensor(weight).bfloat16()
        assert torch.equal(out[name], base[name] + delta), name
    base = tmp_path / "base"
    assert [record.getMessage() for record in caplog.records] == [
        f"{base}: transformers has no model of type somebodys, so it is merged by its tensors' "
        "names: the layers are core.block.N",
        f"{base}: the role of core.odd is unknown, and it is merged with the first slice's weight",
    ]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_tensors_that_transformers_has_no_place_for_are_named(tmp_path, caplog, count, whole):
    """They stay the base's, unless whole models are merged. Whole numbers are copied untold."""
    architectures.make("llama", tmp_path)
    odd = [f"value_head.{i}.weight" for i in range(count)]
    for number, name in enumerate(("base", "one")):
        tensors = load_all(tmp_path / name)
        tensors |= {each: torch.full((2, 2), number + 1.0).bfloat16() for each in odd}
        tensors["counter"] = torch.tensor([3])
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    recipe, wanted, outcome = architectures.recipe_of(tmp_path), 1.0, "not merged: the output has"
    if whole:
        models = [{"model": str(tmp_path / "one"), "parameters": {"weight": 0.5}}]
        data = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base")}
        recipe = Recipe.from_dict({**data, "models": models, "dtype": "bfloat16"})
        wanted, outcome = 1.5, "merged with the first slice's weight"
    caplog.clear()
    plan = MergePlan(recipe, open_recipe(recipe))
    assert all((plan.merge(name) == wanted).all() for name in odd)
    which = f"{odd[0]} is unknown, and it is"
    if count > 1:
        which = f"{count} tensors is unknown, such as {odd[0]}, and they are"
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"{tmp_path}/base: the role of {which} {outcome}" in line
    MergePlan(recipe, open_recipe(recipe))
    assert len(caplog.records) == 1


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize("named", [None, "somebodys"])
def test_an_unknown_type_with_llama_s_names_is_merged_by_them_and_it_is_said(
    tmp_path, caplog, named, described
):
    architectures.make("llama", tmp_path)
    for name in ("base", "one"):
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text()) | {"model_type": named}
        if not described:
            config["architectures"] = ["SomebodysForCausalLM"]
        path.write_text(json.dumps(config))
    caplog.clear()
    build_model(architectures.recipe_of(tmp_path), tmp_path / "out")
    what = "config.json names no model_type"
    if named is not None:
        what = f"transformers has no model of type {named}"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{tmp_path}/base: {what}, so it is merged by its tensors' names, which")
    weight = architectures.WEIGHTS[1 if described else 0]
    assert f"take the {'last' if described else 'first'} slice's weight" in line
    out, base, one = (load_all(tmp_path / name) for name in ("out", "base", "one"))
    norm = "model.norm.weight"
    delta = (one[norm] - base[norm]) * torch.tensor(weight).bfloat16()
    assert torch.equal(out[norm], base[norm] + delta)


def test_what_transformers_knows_and_does_not_load_is_not_told(tmp_path, caplog):
    """A head for several tokens that the type's class names as such."""
    architectures.make("qwen3_next", tmp_path)
    for name in ("base", "one"):
        tensors = load_all(tmp_path / name) | {"mtp.fc.weight": torch.ones(2, 2).bfloat16()}
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    caplog.clear()
    architectures.check_build(tmp_path)
    assert not caplog.records


def test_mixtures_that_do_not_fit_are_told_apart(tmp_path, capsys):
    architectures.make("mixtral", tmp_path)
    config = json.loads((tmp_path / "one/config.json").read_text())
    (tmp_path / "one/config.json").write_text(json.dumps(config | {"num_local_experts": 8}))
    (tmp_path / "r.yml").write_text(architectures.recipe_of(tmp_path).to_yaml())
    capsys.readouterr()
    assert main(["merge", str(tmp_path / "r.yml"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "`num_local_experts` is 8, the base has 4" in error
    assert len(error.strip().splitlines()) == 1
    (tmp_path / "one/config.json").write_text(json.dumps(config))
    tensors = load_all(tmp_path / "one")
    router = next(name for name in tensors if name.endswith("gate.weight"))
    tensors[router] = torch.zeros(3, 32).bfloat16()
    save_file(tensors, tmp_path / "one/model.safetensors", metadata={"format": "pt"})
    assert main(["merge", str(tmp_path / "r.yml"), str(tmp_path / "out")]) == 2
    assert router in capsys.readouterr().err


def test_methods_that_look_at_a_whole_tensor_take_each_expert_alone(tmp_path):
    """slerp's angle is each expert's, on disk and live."""
    architectures.make("qwen3_moe", tmp_path)
    models = [str(tmp_path / name) for name in ("base", "one")]
    recipe = Recipe.from_dict(
        {
            "merge_method": "slerp",
            "base_model": models[0],
            "dtype": "bfloat16",
            "slices": [{"sources": [{"model": m, "layer_range": [0, 4]} for m in models]}],
            "parameters": {"t": 0.3},
        }
    )
    build_model(recipe, tmp_path / "out")
    model = architectures.load(tmp_path / "base")
    live = architectures.LiveModel(model, open_model(models[0]), [open_model(models[1])])
    live.apply(recipe)
    fresh = architectures.load(tmp_path / "out").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh[name]), name


def test_a_candidate_merges_only_the_layers_that_changed(tmp_path):
    architectures.make("mixtral", tmp_path)
    model = architectures.load(tmp_path / "base")
    base, one = (open_model(str(tmp_path / name)) for name in ("base", "one"))
    live = architectures.LiveModel(model, base, [one])

    def apply(*weights):
        slices = [(i, i + 1) for i in range(4)]
        rows = [[weight] for weight in weights]
        refs = str(tmp_path / "base"), [str(tmp_path / "one")]
        live.apply(task_arithmetic_recipe(*refs, slices, rows, dtype="bfloat16"))

    apply(0.5, 0.5, 0.5, 0.5)
    written = []
    marking = live._marking
    live._marking = lambda name, state: (written.append(name), marking(name, state))[1]
    apply(0.5, 0.5, 0.9, 0.5)
    assert written
    assert all(".layers.2." in name for name in written)


def test_a_type_that_transformers_does_not_know_cannot_answer(tmp_path):
    architectures.make("llama", tmp_path)
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"model_type": "somebodys"}))
    with pytest.raises(ModelError) as caught:
        load_model(open_model(str(tmp_path / "base")), EngineSection(device="cpu"), torch.bfloat16)
    assert "somebodys" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["llama4_text", "deepseek_v3", "bamba", "lfm2_moe"])
def test_an_order_of_layers_that_config_json_cannot_express_is_refused(tmp_path, capsys, name):
    architectures.make(name, tmp_path)
    pieces = [[0, 2], [1, 4]] if name != "deepseek_v3" else [[2, 4], [0, 2]]
    slices = []
    for piece in pieces:
        slices.append({"sources": [{"model": str(tmp_path / "base"), "layer_range": piece}]})
    recipe = Recipe.from_dict({"merge_method": "passthrough", "slices": slices})
    (tmp_path / "r.yml").write_text(recipe.to_yaml())
    assert main(["merge", str(tmp_path / "r.yml"), str(tmp_path / "out")]) == 2
    assert "layers in another order" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gemma3", "qwen3_next", "mixtral", "gpt2"])
def test_layers_in_another_order(tmp_path, name):
    architectures.make(name, tmp_path)
    slices = []
    for piece in ([0, 4], [0, 4]):
        slices.append({"sources": [{"model": str(tmp_path / "base"), "layer_range": piece}]})
    recipe = Recipe.from_dict({"merge_method": "passthrough", "slices": slices})
    out, base = build_model(recipe, tmp_path / "out"), load_all(tmp_path / "base")
    for stored, tensor in load_all(out).items():
        parts = open_model(str(tmp_path / "base")).architecture.split(stored)
        if parts is not None:
            stored = f"{parts[0]}{parts[1] % 4}{parts[2]}"
        assert torch.equal(tensor, base[stored])
    model = architectures.load(out)
    assert torch.isfinite(model(input_ids=torch.tensor([[5, 6, 7]])).logits).all()


@pytest.mark.parametrize("layers", ["4", 4.0, [4]])
def test_a_number_of_layers_that_is_none(tmp_path, capsys, layers):
    architectures.make("llama", tmp_path)
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    (tmp_path / "r.yml").write_text(architectures.recipe_of(tmp_path).to_yaml())
    capsys.readouterr()
    assert main(["merge", str(tmp_path / "r.yml"), str(tmp_path / "out")]) == 2
    assert "`num_hidden_layers` in config.json is not a whole number" in capsys.readouterr().err


def test_a_mask_that_comes_first_in_its_layer_does_not_hide_a_missing_weight(tmp_path):
    architectures.make("llama", tmp_path)
    for name in ("base", "one"):
        tensors = load_all(tmp_path / name)
        tensors["model.layers.1.a_mask"] = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    base, one = (str(tmp_path / name) for name in ("base", "one"))
    slices = [(0, 1), (1, 2), (2, 4)]
    data = task_arithmetic_recipe(base, [one], slices, [[0.5]] * 3, dtype="bfloat16").to_dict()
    for source in data["slices"][1]["sources"]:
        source.pop("parameters", None)
    recipe = Recipe.from_dict(data)
    with pytest.raises(RecipeError, match=r"`weight` is not set for model\.layers\.1\."):
        MergePlan(recipe, open_recipe(recipe))


@pytest.mark.parametrize("name", ["mamba2", "bamba", "falcon_h1", "granitemoehybrid"])
def test_an_infinite_number_as_transformers_writes_it_is_no_fault(tmp_path, name):
    tiny_models.tiny_config(name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "Infinity" in json.dumps(config)
    check_config(config)


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della_drops_nothing_of_rows_of_one_number(tmp_path, caplog, method):
    """As with `density: 1` for these tensors, which is what mergekit needs."""
    architectures.make("qwen3_next", tmp_path)
    out = {}
    for case, density in (
        ("plain", 0.5),
        ("filtered", [{"filter": "conv1d", "value": 1.0}, {"value": 0.5}]),
    ):
        parameters = {"weight": 0.7, "density": density}
        recipe = Recipe.from_dict(
            {
                "merge_method": method,
                "base_model": str(tmp_path / "base"),
                "models": [{"model": str(tmp_path / "one"), "parameters": parameters}],
                "parameters": {"normalize": False},
                "dtype": "bfloat16",
            }
        )
        out[case] = load_all(build_model(recipe, tmp_path / case, random_seed=3))
    assert not differing(*out.values())
    assert len([r for r in caplog.records if "drops nothing" in r.getMessage()]) == 1
    base, one = load_all(tmp_path / "base"), load_all(tmp_path / "one")
    name = next(n for n in base if n.endswith("conv1d.weight"))
    delta = (one[name] - base[name]) * torch.tensor(0.7).bfloat16()
    assert torch.equal(out["plain"][name], base[name] + delta)


def test_a_model_that_writes_no_text_is_merged_and_it_is_said_truly(tmp_path, caplog):
    """transformers has the type."""
    sizes = {"image_size": 32, "patch_size": 16, "num_attention_heads": 4}
    config = ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4, **sizes)
    for seed, name in enumerate(("base", "one")):
        torch.manual_seed(seed)
        ViTForImageClassification(config).to(torch.bfloat16).save_pretrained(tmp_path / name)
    caplog.clear()
    build_model(architectures.recipe_of(tmp_path), tmp_path / "out")
    line = caplog.records[0].getMessage()
    assert f"{tmp_path}/base: transformers has no model of type vit that writes text, so" in line
