"""Models that are not quite what their configuration says, and architectures with settings for each
layer.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from merging_tools import differing, load_all, make_family
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from evomerge.cli import main
from evomerge.errors import ModelError, RecipeError, UnsupportedRecipe
from evomerge.merging.architecture.architecture import HEAD
from evomerge.merging.architecture.layer_lists import BY_LAYER
from evomerge.merging.build import build_model
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.live import LiveModel
from evomerge.recipe import Recipe, task_arithmetic_recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import tiny_models


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()},
        path,
        metadata={"format": "pt"},
    )


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def plain(family, weight=0.5, **settings):
    return task_arithmetic_recipe(
        str(family / "base"), [str(family / "one")], [(0, 4)], [[weight]], **settings
    )


@pytest.mark.parametrize("storing", [("base",), ("one",), ("base", "one")])
def test_a_head_that_a_tied_model_stores_is_merged(tmp_path, storing):
    """A model that stores none lends its embeddings."""
    family = make_family(tmp_path, tied=True)
    heads = {
        name: load_file(family / name / "model.safetensors")["model.embed_tokens.weight"]
        for name in ("base", "one")
    }
    for name in storing:
        heads[name] = heads[name] * 2
        edit_tensors(family / name, lambda tensors, head=heads[name]: tensors | {HEAD: head})
    merged = load_all(build_model(plain(family), tmp_path / "out"))
    wanted = heads["base"] + (heads["one"] - heads["base"]) * torch.tensor(
        0.5, dtype=torch.bfloat16
    )
    assert torch.equal(merged[HEAD], wanted)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    model = AutoModelForCausalLM.from_pretrained(
        make_family(tmp_path / "plain", tied=True) / "base", dtype=torch.bfloat16
    )
    live = LiveModel(model, open_model(str(family / "base")), [open_model(str(family / "one"))])
    live.apply(plain(family))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert not differing(model.state_dict(), loaded.state_dict())


def test_a_head_that_a_tied_model_stores_unchanged_stays_tied(tmp_path):
    family = make_family(tmp_path, tied=True)

    def store(tensors):
        return tensors | {HEAD: tensors["model.embed_tokens.weight"].clone()}

    edit_tensors(family / "one", store)
    out = build_model(plain(family), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    merged = load_all(out)
    assert torch.equal(merged[HEAD], merged["model.embed_tokens.weight"])


@pytest.mark.parametrize("untied", [("base",), ("one",), ("base", "one")])
@pytest.mark.parametrize("key", [True, False])
def test_tied_and_untied_models_are_merged(tmp_path, untied, key):
    """A fine-tune whose head has left its embeddings: base, sibling or both. With or without the
    key in the configuration of those that are tied, as it is the default of some families.
    """
    family, kept = make_family(tmp_path, tied=True), {}
    for name in ("base", "one"):
        tensors = load_file(family / name / "model.safetensors")
        kept[name] = tensors["model.embed_tokens.weight"]
        if name in untied:
            kept[name] = kept[name] * 3
            edit_tensors(family / name, lambda tensors, n=name: tensors | {HEAD: kept[n]})
            edit_config(family / name, tie_word_embeddings=False)
        elif not key:
            config = json.loads((family / name / "config.json").read_text())
            del config["tie_word_embeddings"]
            (family / name / "config.json").write_text(json.dumps(config))
    out = build_model(plain(family), tmp_path / "out")
    merged, half = load_all(out), torch.tensor(0.5, dtype=torch.bfloat16)
    assert torch.equal(merged[HEAD], kept["base"] + (kept["one"] - kept["base"]) * half)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_lists_with_an_item_for_each_layer_follow_the_layers(tmp_path):
    """Qwen2 with sliding windows in every other layer: what comes out can be loaded, each layer
    with its own type.
    """
    types = ["full_attention", "sliding_attention"] * 2
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
    }
    config = Qwen2Config(
        num_hidden_layers=4, layer_types=types, use_sliding_window=True, sliding_window=8, **sizes
    )
    for seed, name in enumerate(("base", "one")):
        torch.manual_seed(seed)
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / name)
    slices = [(0, 4), (1, 3), (1, 2)]
    recipe = task_arithmetic_recipe(
        str(tmp_path / "base"), [str(tmp_path / "one")], slices, [[0.5]] * 3
    )
    out = build_model(recipe, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["layer_types"] == [
        *types,
        *types[1:3],
        types[1],
    ]
    assert len(AutoModelForCausalLM.from_pretrained(out).model.layers) == 7


@pytest.mark.parametrize(
    ("kind", "settings", "key", "wanted"),
    [
        ("gemma2", {}, "layer_types", ["sliding_attention"] * 2 + ["full_attention"]),
        (
            "gemma3_text",
            {"sliding_window_pattern": 3},
            "layer_types",
            ["sliding_attention", "full_attention", "sliding_attention"],
        ),
        ("smollm3", {"no_rope_layer_interval": 2}, "no_rope_layers", [1, 1, 0]),
        ("qwen2", {}, "layer_types", None),  # transformers draws the same list again
    ],
)
def test_lists_that_config_json_leaves_to_transformers_follow_the_layers(
    tmp_path, kind, settings, key, wanted
):
    """As the hub's Gemma 2 and 3 do: each layer keeps the attention that it had."""
    tiny_models.make_tiny(tiny_models.tiny_config(kind), tmp_path / "base", 0)
    path = tmp_path / "base/config.json"
    config = json.loads(path.read_text())
    for stated in BY_LAYER:
        config.pop(stated, None)
    path.write_text(json.dumps(config | settings))
    had = getattr(AutoConfig.from_pretrained(tmp_path / "base"), key)
    ranges = ([0, 1], [2, 4])
    slices = []
    for layers in ranges:
        slices.append({"sources": [{"model": f"{tmp_path}/base", "layer_range": layers}]})
    recipe = Recipe.from_dict({"merge_method": "passthrough", "slices": slices})
    out = build_model(recipe, tmp_path / "out")
    assert json.loads((out / "config.json").read_text()).get(key) == wanted
    assert getattr(AutoConfig.from_pretrained(out), key) == [had[i] for i in (0, 2, 3)]


@pytest.mark.parametrize("missing", ["model.layers.2.mlp.up_proj.weight", "model.layers.3."])
def test_tensors_that_no_model_has_are_missed(tmp_path, missing):
    family = make_family(tmp_path)
    for name in ("base", "one"):
        edit_tensors(
            family / name,
            lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(missing)},
        )
    with pytest.raises(ModelError, match=r"layer [23]"):
        build_model(plain(family), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "lost"),
    [
        ("model.layers.2.self_attn.q_proj.bias", True),
        ("model.projection.weight", True),
        ("model.layers.3.self_attn.q_proj.bias", False),  # a layer of the base alone
        ("model.layers.5.self_attn.q_proj.bias", False),
    ],
)
def test_a_tensor_of_a_sibling_that_slices_would_lose(tmp_path, extra, lost):
    """Of a layer that is merged, or beside the layers of a model that gives what is there."""
    family = make_family(tmp_path)
    edit_tensors(family / "one", lambda tensors: tensors | {extra: torch.ones(8)})
    base, sibling = {"model": str(family / "base")}, {"model": str(family / "one")}
    weight = {"parameters": {"weight": 0.5}}
    slices = [
        {"sources": [m | {"layer_range": [0, 3]} for m in (base, sibling | weight)]},
        {"sources": [base | {"layer_range": [3, 4]}]},
    ]
    recipe = Recipe.from_dict(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(family / "base"),
            "slices": slices,
            "dtype": "float32",
        }
    )
    if lost:
        with pytest.raises(ModelError, match=f"the base lacks {extra}"):
            build_model(recipe, tmp_path / "out")
    else:
        build_model(recipe, tmp_path / "out")
    assert (tmp_path / "out").exists() != lost


def test_numbers_that_the_working_dtype_cannot_hold(tmp_path):
    """Without `dtype` the models' own decides; and a result can pass float16's end though no weight
    does.
    """
    family = make_family(tmp_path, dtypes=(torch.float16,) * 3)
    data = plain(family, 100_000.0).to_dict()
    del data["dtype"]
    too_large = Recipe.from_dict(data)
    passing = Recipe.from_dict(
        plain(family, 60.0).to_dict() | {"dtype": "float16", "parameters": {"lambda": 60_000.0}}
    )
    for recipe, word in [
        (too_large, "infinite in torch.float16"),
        (passing, "exceeds float16's maximum of 65504"),
    ]:
        with pytest.raises(RecipeError, match=word):
            build_model(recipe, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    models = [
        {"model": str(family / name), "parameters": {"weight": 70_000.0}}
        for name in ("base", "one")
    ]
    # summed in fp32, and normalised
    recipe = Recipe.from_dict({"merge_method": "linear", "models": models, "dtype": "float16"})
    assert all(
        t.isfinite().all() for t in load_all(build_model(recipe, tmp_path / "linear")).values()
    )


def test_an_architecture_that_mergekit_does_not_describe_takes_norm_and_head_from_the_first_slice(
    tmp_path,
):
    family = make_family(tmp_path)
    recipe = task_arithmetic_recipe(
        str(family / "base"), [str(family / "one")], [(0, 2), (2, 4)], [[0.0], [1.0]]
    )
    known = load_all(build_model(recipe, tmp_path / "known"))
    for name in ("base", "one"):
        edit_config(family / name, architectures=["SomebodysForCausalLM"])
    unknown = load_all(build_model(recipe, tmp_path / "unknown"))
    assert differing(known, unknown) == [HEAD, "model.norm.weight"]
    assert torch.equal(unknown[HEAD], load_all(family / "base")[HEAD])


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
SMALL |= {"num_attention_heads": 4, "pad_token_id": 0}
ENCODER_DECODER = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 64},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 32},
    **{"encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
}
T5_SIZES = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}
SPECIAL = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("T5ForConditionalGeneration", T5_SIZES),
        ("BartForConditionalGeneration", ENCODER_DECODER),
        ("BertModel", SMALL),
        ("BertForSequenceClassification", SMALL),
        ("ModernBertModel", SMALL | SPECIAL),
        ("LlamaForSequenceClassification", SMALL),
        ("Qwen3ForSequenceClassification", SMALL | {"head_dim": 8}),
    ],
)
def test_a_sound_model_of_another_kind_is_not_called_damaged(tmp_path, name, sizes):
    """The files lack nothing: such models have no head, or a tensor in the first layer alone."""
    made = getattr(transformers, name)
    for model in ("base", "one"):
        made(made.config_class(**sizes)).to(torch.bfloat16).save_pretrained(tmp_path / model)
    models = [{"model": f"{tmp_path}/one", "parameters": {"weight": 0.5}}]
    top = {"merge_method": "task_arithmetic", "base_model": f"{tmp_path}/base"}
    with pytest.raises(UnsupportedRecipe) as refused:
        build_model(Recipe.from_dict(top | {"models": models}), tmp_path / "out")
    assert "models that write text with a decoder alone" in str(refused.value)
    assert refused.value.found == name


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A model whose layers transformers has to tell, and one whose names do."""
    folder = tmp_path_factory.mktemp("mixture")
    for kind in ("qwen3_moe", "llama"):
        config = tiny_models.tiny_config(kind)
        for seed, name in enumerate(("base", "one")):
            tiny_models.make_tiny(config, folder / kind / name, seed)
    return folder


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_experts", "4"),
        ("vocab_size", -1),
        ("hidden_size", None),
        ("rope_parameters", "x"),
        ("dtype", "nosuch"),
        ("tie_word_embeddings", "yes"),
        ("tie_word_embeddings", None),
        ("text_config", [1]),
        ("model_type", 3),
        ("num_hidden_layers", 10**9),
    ],
)
def test_a_value_that_transformers_cannot_use_is_named_and_not_written(
    mixture, tmp_path, caplog, kind, key, value
):
    if (kind, key) == ("llama", "num_experts"):
        pytest.skip("it has none")
    shutil.copytree(mixture / kind, tmp_path, dirs_exist_ok=True)
    for name in ("base", "one"):
        edit_config(tmp_path / name, **{key: value})
    with pytest.raises(ModelError, match=f"`{key}` in config.json") as refused:
        build_model(plain(tmp_path), tmp_path / "out")
    assert refused.value.found == value
    assert refused.value.where == tmp_path / "base"
    assert not caplog.records


def test_a_dtype_for_each_part_is_no_fault(mixture, tmp_path):
    """transformers loads it; the output has one dtype."""
    shutil.copytree(mixture / "llama", tmp_path, dirs_exist_ok=True)
    for name in ("base", "one"):
        edit_config(tmp_path / name, dtype={"": "float32"})
    out = build_model(plain(tmp_path, dtype="bfloat16"), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_a_model_s_own_code_reads_is_not_transformers_business(mixture, tmp_path):
    shutil.copytree(mixture / "llama", tmp_path, dirs_exist_ok=True)
    for name in ("base", "one"):
        edit_config(tmp_path / name, rope_scaling="x", auto_map={"AutoConfig": "own.Config"})
    out = build_model(plain(tmp_path), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["rope_scaling"] == "x"


def test_what_only_mergekit_can_merge_is_handed_over_though_it_is_found_late(
    tmp_path, capsys, monkeypatch
):
    family = make_family(tmp_path)
    for model in ("base", "one"):
        edit_config(family / model, model_type="somebodys", num_hidden_layers=None)
    with pytest.raises(UnsupportedRecipe):
        build_model(plain(family), tmp_path / "out")
    (tmp_path / "r.yml").write_text(plain(family).to_yaml())
    asked = []
    monkeypatch.setattr("evomerge.merging.mergekit.is_installed", lambda: True)
    monkeypatch.setattr(
        "evomerge.merging.mergekit.merge_with_mergekit", lambda *args: asked.append(args[:2])
    )
    assert main(["merge", str(tmp_path / "r.yml"), str(tmp_path / "out")]) == 0
    assert asked == [(tmp_path / "r.yml", tmp_path / "out")]
    assert "mergekit merges it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", ["-1", "4294967296", "99999999999999999999999", "x", "1.5"])
def test_a_seed_that_is_none(tmp_path, capsys, seed):
    with pytest.raises(SystemExit) as stopped:
        main(["merge", "r.yml", str(tmp_path / "out"), f"--random-seed={seed}"])
    assert stopped.value.code == 2
    assert "not a seed" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    family = make_family(tmp_path)
    (tmp_path / "r.yml").write_text(plain(family).to_yaml())
    shutil.copy(tmp_path / "r.yml", tmp_path / "file")
    assert main(["merge", str(tmp_path / "r.yml"), str(tmp_path / "file/out")]) == 1
    assert "Name another folder" in capsys.readouterr().err
