"""Which models fit each other: keys that config.json leaves out, heads, depths, quantisation."""

import json
import shutil

import pytest
import torch
from conftest import make_model, save
from merging_tools import differing, load_all, make_family, moved
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from evomerge.cli import main
from evomerge.errors import ModelError, RecipeError
from evomerge.merging.architecture.architecture import EMBED, HEAD
from evomerge.merging.build import build_model
from evomerge.merging.checkpoints.compatibility import CONFIG_KEYS, check_fit
from evomerge.merging.checkpoints.config_defaults import config_value
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.checkpoints.size import kv_cache_bytes
from evomerge.merging.live import LiveModel
from evomerge.recipe import Recipe, task_arithmetic_recipe

HALF = torch.tensor(0.5, dtype=torch.bfloat16)


def edit_config(folder, drop=(), **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: config[key] for key in config if key not in drop}))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    plain = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, path, metadata={"format": "pt"})


def halfway(base, other):
    """Task arithmetic with weight 0.5, each step in bf16."""
    return base + (0 + (other - base) * HALF)


def plain(family, sibling="one", layers=4):
    return task_arithmetic_recipe(
        str(family / "base"), [str(family / sibling)], [(0, layers)], [[0.5]]
    )


@pytest.mark.parametrize("key", CONFIG_KEYS[1:])
@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "cohere", "starcoder2"]
)
def test_a_missing_key_means_the_default_of_transformers_class(kind, key):
    assert config_value({"model_type": kind}, key) == getattr(AutoConfig.for_model(kind), key)
    assert config_value({"model_type": kind, key: 7}, key) == 7


def test_a_missing_key_of_an_unknown_kind_of_model():
    assert config_value({"model_type": "ours"}, "tie_word_embeddings") is None
    assert config_value({}, "vocab_size") is None


def test_defaults_that_follow_from_other_keys():
    """A llama's KV heads are its heads; a gemma's heads have 256 numbers, whatever its width."""
    sizes = {"num_attention_heads": 4, "hidden_size": 64, "num_hidden_layers": 2}
    assert config_value({"model_type": "llama", **sizes}, "num_key_value_heads") == 4
    gemma = {"model_type": "gemma2", "num_key_value_heads": 2, **sizes}
    assert kv_cache_bytes(gemma, tokens=10) == 2 * 2 * 2 * 256 * 2 * 10


@pytest.fixture
def gemmas(tmp_path):
    """base/ and one/: Gemma 2, tied by default."""
    config = Gemma2Config(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, sliding_window=16,
    )  # fmt: skip
    torch.manual_seed(0)
    base = Gemma2ForCausalLM(config).to(torch.bfloat16)
    for name, model in (("base", base), ("one", moved(base, 1, 0.1))):
        model.save_pretrained(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("lacking", [["base"], ["one"], ["base", "one"]])
@pytest.mark.parametrize("storing", [[], ["one"], ["base"], ["base", "one"]])
def test_models_that_are_tied_by_default(gemmas, lacking, storing):
    """Gemma's published configurations lack the key; fine-tunes have it, and may store the head."""
    wanted = {}
    base, one = load_all(gemmas / "base"), load_all(gemmas / "one")
    for name in base:
        wanted[name] = halfway(base[name], one[name])
    for name in lacking:
        edit_config(gemmas / name, drop=["tie_word_embeddings"])
    for name in storing:
        edit_tensors(gemmas / name, lambda tensors: tensors | {HEAD: tensors[EMBED]})
    merged = load_all(build_model(plain(gemmas), gemmas / "out"))
    if storing:
        assert torch.equal(merged.pop(HEAD), wanted[EMBED])
    assert not differing(merged, wanted)
    model = AutoModelForCausalLM.from_pretrained(gemmas / "base", dtype=torch.bfloat16)
    folders = [open_model(str(gemmas / name)) for name in ("base", "one")]
    live = LiveModel(model, folders[0], folders[1:])
    live.apply(plain(gemmas))
    loaded = AutoModelForCausalLM.from_pretrained(gemmas / "out", dtype=torch.bfloat16)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert not differing(model.state_dict(), loaded.state_dict())
    assert not differing(loaded.state_dict(), wanted | {HEAD: wanted[EMBED]})


def test_a_sibling_that_is_not_tied_and_stores_no_head_does_not_fit(gemmas):
    edit_config(gemmas / "base", drop=["tie_word_embeddings"])
    edit_config(gemmas / "one", tie_word_embeddings=False)
    folders = [open_model(str(gemmas / name)) for name in ("base", "one")]
    with pytest.raises(ModelError, match=r"the files lack.*tie_word_embeddings: false"):
        check_fit(folders[0], folders[1:])


def packed(tensors, suffixes):
    """Every projection as tensors of other dtypes, as a quantised checkpoint stores them."""
    stored = {}
    for name, tensor in tensors.items():
        if "proj" not in name:
            stored[name] = tensor
            continue
        for suffix, dtype in suffixes.items():
            stored[name.removesuffix(".weight") + suffix] = torch.ones(4, 4).to(dtype)
    return stored


QUANTISED = {
    "fp8 of modelopt": (
        {".weight": torch.float8_e4m3fn, ".weight_scale": torch.float32},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        "modelopt",
    ),
    "nf4": (
        {".weight": torch.uint8, ".weight.absmax": torch.float32},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False},
        "bitsandbytes, 4 bits",
    ),
    "int8": (
        {".weight": torch.int8, ".SCB": torch.float32},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "bitsandbytes, 8 bits",
    ),
    "gptq": (
        {".qweight": torch.int32, ".qzeros": torch.int32, ".scales": torch.float16},
        {"quant_method": "gptq", "bits": 4},
        "gptq, 4 bits",
    ),
    "gptq of old": ({".qweight": torch.int32, ".scales": torch.float16}, None, "qweight is I32"),
    "awq": (
        {".qweight": torch.int32, ".scales": torch.float16},
        {"quant_method": "awq", "w_bit": 4},
        "awq, 4 bits",
    ),
    "compressed": (
        {".weight_packed": torch.int32, ".weight_scale": torch.bfloat16},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "compressed-tensors",
    ),
    "fp8 alone": ({".weight": torch.float8_e5m2}, None, "weight is F8_E5M2"),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_models_are_named_with_a_remedy(tmp_path, capsys, kind):
    """As a sibling, as the base, and below an adapter; merging and before a search."""
    family = make_family(tmp_path)
    suffixes, stated, words = QUANTISED[kind]
    edit_tensors(family / "one", lambda tensors: packed(tensors, suffixes))
    if stated:
        edit_config(family / "one", quantization_config=stated)
    base, one = str(family / "base"), str(family / "one")
    for models in ((base, one), (one, base), (base, f"{one}+{base}")):
        recipe = task_arithmetic_recipe(models[0], [models[1]], [(0, 4)], [[0.5]])
        with pytest.raises(ModelError) as caught:
            build_model(recipe, tmp_path / "out")
        assert str(caught.value).startswith(f"{one}: the model is quantised (")
        assert f"{words})" in str(caught.value)
        assert str(caught.value).endswith("or a dequantised copy of it.")
    (tmp_path / "t.jsonl").write_text('{"input": "a", "output": "b"}\n' * 4)
    (tmp_path / "s.yml").write_text(
        f"genome: {{base_model: {base}, models: [{one}]}}\ntasks: [{{file: t.jsonl}}]\n"
    )
    assert main(["check", str(tmp_path / "s.yml")]) != 0
    captured = capsys.readouterr()
    (line,) = [x for x in (captured.out + captured.err).splitlines() if "model is quantised" in x]
    assert words in line


WITHOUT_SCALES = {
    "fp8": (".weight", torch.float8_e4m3fn, ".weight_scale_inv"),
    "mxfp4": ("_blocks", torch.uint8, "_scales"),
}


@pytest.mark.parametrize("kind", WITHOUT_SCALES)
def test_scales_that_are_missing_are_named_with_file_and_remedy(tmp_path, capsys, kind):
    """As a sibling, as the base, and below an adapter; merging and before a search."""
    family = make_family(tmp_path)
    suffix, dtype, scales = WITHOUT_SCALES[kind]
    edit_tensors(family / "one", lambda tensors: packed(tensors, {suffix: dtype}))
    edit_config(family / "one", quantization_config={"quant_method": kind})
    base, one = str(family / "base"), str(family / "one")
    first = "model.layers.0.mlp.down_proj"
    told = (
        f"{one}/model.safetensors: {first}{suffix} is quantised, and the tensor of its scales, "
        f"{first}{scales}, is missing. Copy or download the model again, or name the one that it "
        "was quantised from."
    )
    for models in ((base, one), (one, base), (base, f"{one}+{base}")):
        recipe = task_arithmetic_recipe(models[0], [models[1]], [(0, 4)], [[0.5]])
        with pytest.raises(ModelError) as caught:
            build_model(recipe, tmp_path / "out")
        assert str(caught.value) == told
    (tmp_path / "t.jsonl").write_text('{"input": "a", "output": "b"}\n' * 4)
    (tmp_path / "s.yml").write_text(
        f"genome: {{base_model: {base}, models: [{one}]}}\ntasks: [{{file: t.jsonl}}]\n"
    )
    assert main(["check", str(tmp_path / "s.yml")]) != 0
    captured = capsys.readouterr()
    (line,) = [x for x in (captured.out + captured.err).splitlines() if "is quantised" in x]
    assert told in line


def test_masks_of_old_models_are_copied(tmp_path):
    """GPT-NeoX's files hold them as bytes, which are no quantised weights."""
    family = make_family(tmp_path)
    name = "gpt_neox.layers.0.attention.bias"
    mask = {name: torch.ones(4, 4).bool().to(torch.uint8)}
    for model in ("base", "one"):
        edit_tensors(family / model, lambda tensors: tensors | mask)
    merged = load_all(build_model(plain(family), tmp_path / "out"))
    assert torch.equal(merged[name], mask[name])


def test_plain_weights_that_were_trained_in_4_bits_are_merged(tmp_path):
    """A merged QLoRA keeps the key; what comes out holds plain numbers and says nothing else."""
    family = make_family(tmp_path)
    wanted = load_all(build_model(plain(family), tmp_path / "plain"))
    for name in ("base", "one"):
        edit_config(family / name, quantization_config={"quant_method": "bitsandbytes"})
    out = build_model(plain(family), tmp_path / "out")
    assert not differing(load_all(out), wanted)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def sliced(family, *slices, **more):
    """A recipe of [(model, first layer, weight or None), …] and a length for each slice."""
    pieces = []
    for length, *sources in slices:
        pieces.append({"sources": []})
        for name, first, weight in sources:
            source = {"model": str(family / name), "layer_range": [first, first + length]}
            if weight is not None:
                source["parameters"] = {"weight": weight}
            pieces[-1]["sources"].append(source)
    data = {"merge_method": "task_arithmetic", "base_model": str(family / "base")}
    return Recipe.from_dict(data | {"dtype": "bfloat16", "slices": pieces} | more)


def layer(tensors, number):
    start = f"model.layers.{number}."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


@pytest.fixture
def unlike(tmp_path):
    """base/ of 4 layers, deep/ of 6, flat/ of 2, wide/ with more tokens, odd/ in its layer 3."""
    for seed, (name, layers, more) in enumerate(
        [("base", 4, {}), ("deep", 6, {}), ("flat", 2, {}), ("wide", 4, {"vocab_size": 99})]
    ):
        save(make_model(seed, layers=layers, **more), tmp_path / name)
    save(make_model(7), tmp_path / "odd")
    edit_config(tmp_path / "odd", intermediate_size=80)
    edit_tensors(
        tmp_path / "odd",
        lambda tensors: {
            n: torch.zeros(80, 32).bfloat16() if n.endswith("layers.3.mlp.up_proj.weight") else t
            for n, t in tensors.items()
        },
    )
    return tmp_path


def test_slices_of_models_of_other_depths(unlike):
    recipe = sliced(
        unlike,
        (2, ("base", 0, None), ("deep", 4, 0.5)),
        (2, ("base", 2, None), ("flat", 0, 0.5)),
    )
    out = build_model(recipe, unlike / "out")
    merged = load_all(out)
    base, deep, flat = (load_all(unlike / name) for name in ("base", "deep", "flat"))
    for number, (model, taken) in enumerate(((deep, 4), (deep, 5), (flat, 0), (flat, 1))):
        ours, theirs, found = layer(base, number), layer(model, taken), layer(merged, number)
        assert found.keys() == ours.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, halfway(ours[name], theirs[name])), (number, name)
    assert torch.equal(merged[EMBED], halfway(base[EMBED], deep[EMBED]))
    norm = "model.norm.weight"
    assert torch.equal(merged[norm], halfway(base[norm], flat[norm]))
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 4
    assert len(AutoModelForCausalLM.from_pretrained(out).model.layers) == 4


def test_a_deeper_model_alone_in_a_slice(unlike):
    """Linear needs no base in it; the layer's tensors are its own, the configuration the base's."""
    recipe = sliced(
        unlike,
        (3, ("base", 0, 1.0), ("deep", 0, 1.0)),
        (2, ("deep", 4, 1.0)),
        merge_method="linear",
    )
    merged = load_all(build_model(recipe, unlike / "out"))
    assert not differing(layer(merged, 4), layer(load_all(unlike / "deep"), 5))
    config = json.loads((unlike / "out/config.json").read_text())
    assert config["num_hidden_layers"] == 5


@pytest.mark.parametrize(("other", "length"), [("wide", 2), ("odd", 1)])
def test_what_is_not_merged_need_not_fit(unlike, other, length):
    """More tokens in a slice that has no part in the embeddings; a wide layer that is not used."""
    recipe = sliced(
        unlike,
        (1, ("base", 0, None), ("deep", 0, 0.5)),
        (length, ("base", 1, None), (other, 1, 0.5)),
        (1, ("base", 3, None), ("flat", 1, 0.5)),
    )
    merged = load_all(build_model(recipe, unlike / "out"))
    base, theirs = (layer(load_all(unlike / name), 1) for name in ("base", other))
    for name, tensor in layer(merged, 1).items():
        assert torch.equal(tensor, halfway(base[name], theirs[name]))


@pytest.mark.parametrize(
    ("other", "first", "words"),
    [
        ("wide", 0, "`vocab_size` is 99, the base has 26"),
        ("odd", 3, "`intermediate_size` is 80, the base has 64"),
        ("odder", 3, "model.layers.3.mlp.up_proj.weight is (80, 32), the base has (64, 32)"),
    ],
)
def test_what_is_merged_must_fit(unlike, other, first, words):
    shutil.copytree(unlike / "odd", unlike / "odder")
    edit_config(unlike / "odder", intermediate_size=64)
    recipe = sliced(unlike, (1, ("base", 0, None), (other, first, 0.5)))
    with pytest.raises(ModelError) as caught:
        build_model(recipe, unlike / "out")
    assert words in str(caught.value)
    assert ("tokenizer_source" in str(caught.value)) == (other == "wide")


def test_a_head_of_slices_is_untied_where_one_of_its_models_is(unlike):
    """A model that is tied gives its embeddings."""
    save(make_model(8, tie_word_embeddings=True), unlike / "tied")
    recipe = sliced(unlike, (2, ("base", 0, None), ("tied", 1, 0.5)))
    merged = load_all(build_model(recipe, unlike / "out"))
    base, tied = load_all(unlike / "base"), load_all(unlike / "tied")
    assert torch.equal(merged[HEAD], halfway(base[HEAD], tied[EMBED]))
    other = sliced(
        unlike,
        (2, ("tied", 0, None), ("base", 1, 0.5)),
        base_model=str(unlike / "tied"),
    )
    merged = load_all(build_model(other, unlike / "out2"))
    assert torch.equal(merged[HEAD], halfway(tied[EMBED], base[HEAD]))
    assert json.loads((unlike / "out2/config.json").read_text())["tie_word_embeddings"] is False


def test_a_head_that_only_tied_models_give_is_merged_for_an_untied_base(unlike):
    """The last slice is another model's alone: without a head the output would be tied to the
    embeddings of the first slice.
    """
    save(make_model(8, tie_word_embeddings=True), unlike / "tied")
    slices = [
        {"sources": [{"model": str(unlike / name), "layer_range": [i, i + 1]}]}
        for i, name in enumerate(("base", "tied"))
    ]
    for piece in slices:
        piece["sources"][0]["parameters"] = {"weight": 1.0}
    data = {"merge_method": "linear", "dtype": "bfloat16", "slices": slices}
    merged = load_all(build_model(Recipe.from_dict(data), unlike / "out"))
    assert torch.equal(merged[HEAD], load_all(unlike / "tied")[EMBED])
    assert torch.equal(merged[EMBED], load_all(unlike / "base")[EMBED])


def test_a_slice_ends_at_the_end_of_its_own_model(unlike):
    recipe = sliced(unlike, (3, ("base", 0, None), ("flat", 0, 0.5)))
    with pytest.raises(RecipeError, match="beyond the model's 2 layers"):
        build_model(recipe, unlike / "out")
    with pytest.raises(ModelError, match="`num_hidden_layers` is 6, the base has 4"):
        build_model(Recipe.from_dict(whole(unlike, "deep")), unlike / "out")


def whole(family, sibling):
    models = [{"model": str(family / sibling), "parameters": {"weight": 0.5}}]
    base = {"base_model": str(family / "base"), "merge_method": "task_arithmetic"}
    return base | {"models": models}


def test_layers_whose_heads_mean_something_else_do_not_fit(unlike):
    """The shapes are the same: 4 heads of 8 numbers, or 8 of 4."""
    edit_config(unlike / "deep", num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    recipe = sliced(unlike, (2, ("base", 0, None), ("deep", 0, 0.5)))
    with pytest.raises(ModelError, match="`num_attention_heads` is 8"):
        build_model(recipe, unlike / "out")
