"""Siblings of one base whose files differ as releases of transformers write them: heads under other
names, tensors that are not loaded, configurations with or without a part for the text decoder.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from merging_tools import load_all
from safetensors.torch import save_file

from evomerge.cli import main
from evomerge.errors import ModelError
from evomerge.merging.build import build_model
from evomerge.merging.checkpoints import config_fault
from evomerge.merging.checkpoints.model_kind import check_usable
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.live import LiveModel
from evomerge.recipe import Recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import architectures

HALF = torch.tensor(0.5).bfloat16()
MASK = torch.ones(1, 1, 8, 8).bool()


def edit_tensors(folder, change):
    tensors = {name: tensor.contiguous() for name, tensor in change(load_all(folder)).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, change):
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def whole(folder, **more):
    """base + 0.5 (one - base), of whole models."""
    models = [
        {"model": f"{folder}/base"},
        {"model": f"{folder}/one", "parameters": {"weight": 0.5}},
    ]
    data = {"merge_method": "task_arithmetic", "base_model": f"{folder}/base", "models": models}
    return Recipe.from_dict(data | {"dtype": "bfloat16"} | more)


def merged(folder, recipe, out="out"):
    """What is written to disk; a live merge must be a load of it, bit for bit."""
    build_model(recipe, folder / out)
    live = architectures.load(folder / "base")
    base, one = (open_model(str(folder / name)) for name in ("base", "one"))
    LiveModel(live, base, [one]).apply(recipe)
    ours, theirs = live.state_dict(), architectures.load(folder / out).state_dict()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    return load_all(folder / out)


def halfway(base, other):
    return base + (other - base) * HALF


@pytest.mark.parametrize("storing", ["base", "one"])
@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_a_head_that_one_model_stores_under_another_name_than_the_live_one(
    tmp_path, storing, scale, kind
):
    """The other's embeddings stand in for it, as in models like Llama."""
    architectures.make(kind, tmp_path)
    embed, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    for name in ("base", "one"):
        edit_config(tmp_path / name, lambda config: config | {"tie_word_embeddings": True})
        edit_tensors(tmp_path / name, lambda t: {n: x for n, x in t.items() if n != head})
    heads = {name: load_all(tmp_path / name)[embed] for name in ("base", "one")}
    heads[storing] = heads[storing] * scale
    edit_tensors(tmp_path / storing, lambda tensors: tensors | {head: heads[storing].clone()})
    assert torch.equal(merged(tmp_path, whole(tmp_path))[head], halfway(*heads.values()))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is (scale == 1)


@pytest.mark.parametrize("stored", [("embed_out.weight", None), (None, "embed_out.weight"),
                                    ("embed_out.weight", "lm_head.weight"),
                                    (None, "lm_head.weight")])  # fmt: skip
def test_a_head_that_has_two_names_of_which_the_embeddings_tell_none(tmp_path, stored):
    """GPT-NeoX's, as older and newer files name it."""
    architectures.make("gpt_neox", tmp_path)
    heads = []
    for name, wanted in zip(("base", "one"), stored, strict=True):
        tensors = load_all(tmp_path / name)
        head = tensors.pop("embed_out.weight")
        if wanted is None:
            edit_config(tmp_path / name, lambda config: config | {"tie_word_embeddings": True})
            head = tensors["gpt_neox.embed_in.weight"]
        else:
            tensors[wanted] = head
        heads.append(head)
        edit_tensors(tmp_path / name, lambda _, tensors=tensors: tensors)
    out = merged(tmp_path, whole(tmp_path))
    assert torch.equal(out["embed_out.weight"], halfway(*heads))
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_a_head_beside_embeddings_with_the_live_model_s_name(tmp_path):
    """Files that are saved without the original format."""
    architectures.make("gemma3", tmp_path)
    for name in ("base", "one"):
        model = architectures.load(tmp_path / name)
        model.save_pretrained(tmp_path / name, save_original_format=False)
    embed = "model.language_model.embed_tokens.weight"
    edit_tensors(tmp_path / "one", lambda tensors: tensors | {"lm_head.weight": tensors[embed] * 2})
    out = merged(tmp_path, whole(tmp_path))
    base, one = (load_all(tmp_path / name) for name in ("base", "one"))
    assert torch.equal(out["lm_head.weight"], halfway(base[embed], one[embed] * 2))


SPARE = [
    ("gpt_neox", "gpt_neox.layers.1.attention.bias", MASK),
    ("gpt2", "transformer.h.1.attn.bias", MASK.float()),
    ("gpt2", "transformer.h.1.attn.masked_bias", torch.tensor(-1e9).half()),  # infinite
    ("llava", "vision_tower.vision_model.embeddings.position_ids", torch.arange(4)[None]),
    ("llama", "model.layers.1.self_attn.masked_bias", torch.tensor(-1e9)),  # names like Llama's
    ("qwen3_next", "mtp.fc.weight", torch.ones(4, 8).bfloat16()),
    ("deepseek_v3", "model.layers.4.eh_proj.weight", torch.ones(4, 8).bfloat16()),
]


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("having", ["base", "one"])
@pytest.mark.parametrize(("kind", "name", "tensor"), SPARE)
def test_what_transformers_does_not_load_may_be_in_one_model_alone(
    tmp_path, caplog, kind, name, tensor, having, sliced
):
    """The base's is kept, a sibling's is left out, each with one line."""
    architectures.make(kind, tmp_path)
    second = name.replace(".1.", ".2.") if ".1." in name else f"{name}2"
    if kind == "llava":
        second = "vision_tower.vision_model.position_ids"
    edit_tensors(
        tmp_path / having, lambda tensors: tensors | {name: tensor, second: tensor.clone()}
    )
    caplog.clear()
    recipe = architectures.recipe_of(tmp_path) if sliced else whole(tmp_path)
    out = merged(tmp_path, recipe)
    assert out.keys() == load_all(tmp_path / "base").keys()
    if having == "base":
        wanted = tensor.bfloat16() if tensor.is_floating_point() else tensor
        assert torch.equal(out[name], wanted)
    outcome = "not in every model: the output has this model's"
    if having == "one":
        outcome = "not in the base: the output has none"
    ours = [record for record in caplog.records if record.name.startswith("evomerge")]
    assert [record.getMessage() for record in ours] == [
        f"{tmp_path}/{having}: 2 tensors that transformers does not load, such as "
        f"{min(name, second)}, are {outcome}"
    ]


@pytest.mark.parametrize("having", ["base", "one"])
@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.q_proj.bias", "model.projection.weight", "value.weight"]
)
def test_what_may_be_a_weight_must_be_in_every_model(tmp_path, name, having):
    architectures.make("llama", tmp_path)
    edit_tensors(tmp_path / having, lambda tensors: tensors | {name: torch.ones(8)})
    with pytest.raises(ModelError, match=f"does not fit the base: the .* lacks {name}"):
        build_model(whole(tmp_path), tmp_path / "out")


def test_infinite_numbers_behind_masks_are_copied_and_others_are_not(tmp_path):
    architectures.make("gpt_neox", tmp_path)
    name = "gpt_neox.layers.1.attention.masked_bias"
    for model in ("base", "one"):
        edit_tensors(tmp_path / model, lambda t: t | {name: torch.tensor(-1e9).half()})
    for dtype in ("bfloat16", "float16"):
        build_model(whole(tmp_path, dtype=dtype), tmp_path / dtype)
        assert load_all(tmp_path / dtype)[name].item() == -float("inf")
    wrong = "gpt_neox.layers.1.attention.dense.bias"
    edit_tensors(tmp_path / "one", lambda t: t | {wrong: t[wrong] - float("inf")})
    with pytest.raises(ModelError, match=f"{wrong} contains NaN or infinite numbers"):
        build_model(whole(tmp_path), tmp_path / "out")


def test_masks_do_not_hide_that_files_have_other_names(tmp_path):
    """GPT-2's on the hub have masks and no prefix."""
    architectures.make("gpt2", tmp_path)

    def as_on_the_hub(tensors):
        named = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        return named | {"h.0.attn.bias": MASK.float()}

    edit_tensors(tmp_path / "base", as_on_the_hub)
    with pytest.raises(ModelError) as caught:
        build_model(whole(tmp_path), tmp_path / "out")
    told = "one: does not fit the base: it names transformer.h.0.attn.c_attn.bias what the base "
    assert f"{told}names h.0.attn.c_attn.bias. Load both with" in str(caught.value)


@pytest.mark.parametrize("flat", [["base"], ["one"]])
def test_a_flat_config_beside_one_with_a_part_for_the_text_decoder(tmp_path, capsys, flat):
    """As older releases write it; merged, and checked before a search."""
    architectures.make("qwen2_5_vl", tmp_path)

    def older(config):
        text = config.pop("text_config")
        del text["rope_parameters"]
        rope = {"type": "mrope", "mrope_section": [2, 1, 1]}
        return {**text, **config, "rope_theta": 10_000.0, "rope_scaling": rope}

    for name in flat:
        edit_config(tmp_path / name, older)
    base, one = (load_all(tmp_path / name) for name in ("base", "one"))
    for name, tensor in merged(tmp_path, whole(tmp_path)).items():
        assert torch.equal(tensor, halfway(base[name], one[name])), name
    (tmp_path / "t.jsonl").write_text('{"input": "a", "output": "b"}\n' * 4)
    (tmp_path / "s.yml").write_text(
        f"genome: {{base_model: {tmp_path}/base, models: [{tmp_path}/one]}}\n"
        f"tasks: [{{file: {tmp_path}/t.jsonl}}]\n"
    )
    main(["check", str(tmp_path / "s.yml")])
    assert "does not fit" not in capsys.readouterr().out
    edit_config(tmp_path / flat[0], lambda config: config | {"num_attention_heads": 8})
    with pytest.raises(ModelError, match="`num_attention_heads` is "):
        build_model(whole(tmp_path), tmp_path / "out2")


def test_a_part_for_the_text_decoder_that_does_not_name_its_type(tmp_path):
    architectures.make("gemma3", tmp_path)

    def untyped(config):
        del config["text_config"]["model_type"]
        return config

    edit_config(tmp_path / "one", untyped)
    build_model(whole(tmp_path), tmp_path / "out")
    edit_config(
        tmp_path / "base",
        lambda config: config | {"text_config": config["text_config"] | {"model_type": "llama"}},
    )
    with pytest.raises(ModelError, match="`model_type` is gemma3_text, the base has llama"):
        build_model(whole(tmp_path), tmp_path / "out2")


@pytest.mark.parametrize(
    ("kind", "key"), [("gpt2", "n_head"), ("gpt_neo", "num_heads"), ("mpt", "n_heads")]
)
def test_attention_heads_are_compared_by_the_key_of_the_type(tmp_path, kind, key):
    architectures.make(kind, tmp_path)
    # what says the same otherwise is no difference
    edit_config(tmp_path / "one", lambda config: config | {"num_attention_heads": config[key]})
    build_model(whole(tmp_path), tmp_path / "out")

    def fewer(config):
        del config["num_attention_heads"]
        return config | {key: 2}

    edit_config(tmp_path / "one", fewer)
    with pytest.raises(ModelError, match=f"`{key}` is 2, the base has 4"):
        build_model(whole(tmp_path), tmp_path / "out2")


def test_heads_of_two_names_are_merged(tmp_path):
    """transformers saves one by the live name where the file that it has loaded lacked it."""
    architectures.make("gemma3", tmp_path)
    embed = "language_model.model.embed_tokens.weight"
    head = "language_model.lm_head.weight"
    edit_tensors(tmp_path / "base", lambda tensors: tensors | {head: tensors[embed] * 2})
    edit_tensors(tmp_path / "one", lambda tensors: tensors | {"lm_head.weight": tensors[embed] * 3})
    out = merged(tmp_path, whole(tmp_path))
    base, one = (load_all(tmp_path / name)[embed] for name in ("base", "one"))
    assert torch.equal(out[head], halfway(base * 2, one * 3))


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "gpt2"])
def test_a_layer_that_config_json_forgets_is_no_head(tmp_path, name):
    """A head for further tokens among the layers has the modules that join two tokens."""
    architectures.make(name, tmp_path)
    edit_tensors(
        tmp_path / "one",
        lambda tensors: (
            tensors | {n.replace(".3.", ".4."): t.clone() for n, t in tensors.items() if ".3." in n}
        ),
    )
    with pytest.raises(ModelError, match="the base lacks"):
        build_model(whole(tmp_path), tmp_path / "out")


def test_a_package_that_transformers_lacks_is_no_fault_of_a_configuration(monkeypatch):
    def lacking(config):
        raise ImportError("SomeModel requires a library. You can install it.")

    monkeypatch.setattr(config_fault, "made_without_weights", lacking)
    config = {"model_type": "gemma3n", "text_config": {"num_hidden_layers": 2}}
    check_usable(config, "folder", has_model=False)
    with pytest.raises(ModelError, match=r"requires a library\. Install it"):
        config_fault.check_config(config, "folder")


def test_a_kernel_that_is_not_here_hides_no_layers(tmp_path):
    architectures.make("gemma3", tmp_path)
    for name in ("base", "one"):
        edit_config(tmp_path / name, lambda c: c | {"_attn_implementation": "flash_attention_2"})
    architectures.check_build(tmp_path)
