"""MODEL+ADAPTER: the merged tensors are peft's, bit for bit; what cannot be merged is refused in
one line.
"""

import json
import logging

import pytest
import torch
from conftest import make_model
from lora_tools import merge_with_peft, peft_adapter, tensors_of
from merging_tools import differing, load_all, same_bits
from safetensors.torch import save_file

from evomerge.errors import ModelError
from evomerge.merging.adapters.lora import add_to_embedding, add_to_linear
from evomerge.merging.adapters.lora_plan import open_lora
from evomerge.merging.architecture.architecture import EMBED, HEAD
from evomerge.merging.checkpoints.model_folder import ModelFolder
from evomerge.merging.checkpoints.open_model import open_model

PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj"],
    "init_lora_weights": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """plain/ (biased projections, head of its own), tied/, and the same two in other dtypes."""
    folder = tmp_path_factory.mktemp("lora")
    for name, config in {
        "plain": {"attention_bias": True},
        "tied": {"tie_word_embeddings": True},
    }.items():
        model = make_model(0, layers=2, **config)
        with torch.no_grad():
            for p in model.parameters():
                p.view(-1)[::7] = -0.0
        model.save_pretrained(folder / name)
    make_model(0, layers=2, attention_bias=True).to(torch.float16).save_pretrained(folder / "half")
    make_model(0, layers=2, attention_bias=True).to(torch.float32).save_pretrained(
        folder / "single"
    )
    return folder


def noise(*shape, seed=0):
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write_adapter(folder, tensors=None, **config):
    """An adapter on q_proj of the first layer, written by hand: what peft would save."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config), encoding="utf-8")
    if tensors is None:
        tensors = {f"{Q}.lora_A.weight": noise(4, 32), f"{Q}.lora_B.weight": noise(32, 4, seed=1)}
    save_file(
        {PREFIX + name: t for name, t in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return str(folder)


CASES = {
    "plain": ("plain", {}),
    "half": ("half", {}),
    "single": ("single", {}),
    "saved in bf16": ("plain", {"dtype": torch.bfloat16}),
    "all linear, rslora": ("plain", {"target_modules": "all-linear", "use_rslora": True}),
    "regular expression": ("plain", {"target_modules": r".*\.(gate|up)_proj"}),
    "patterns": (
        "plain",
        {
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 3},
            "alpha_pattern": {r"layers\.0\..*q_proj": 11},
        },
    ),
    "one layer": ("plain", {"layers_to_transform": [1]}),
    "excluded": ("plain", {"exclude_modules": ["layers.0.mlp.down_proj"]}),
    "dora": ("plain", {"use_dora": True}),
    "dora in half": ("half", {"use_dora": True}),
    "lora_bias": ("plain", {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "biases": ("plain", {"bias": "all"}),
    "biases of targets": ("plain", {"bias": "lora_only"}),
    "embeddings": ("plain", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embeddings, dora": ("plain", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "head": ("plain", {"target_modules": ["lm_head"]}),
    "tied embeddings": ("tied", {"target_modules": ["embed_tokens"]}),
    "tied head": ("tied", {"target_modules": ["lm_head", "v_proj"]}),
    "tied both": ("tied", {"target_modules": ["lm_head", "embed_tokens"]}),
    "tied both, dora": ("tied", {"target_modules": ["lm_head", "embed_tokens"], "use_dora": True}),
    "saved norm": ("plain", {"modules_to_save": ["norm"]}),
    "saved head": ("plain", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "saved head unties": ("tied", {"modules_to_save": ["lm_head"]}),
    "saved embeddings untie": ("tied", {"modules_to_save": ["embed_tokens"]}),
    "saved embeddings, head with LoRA": (
        "tied",
        {"modules_to_save": ["embed_tokens"], "target_modules": ["lm_head"]},
    ),
    "fan_in_fan_out": ("plain", {"fan_in_fan_out": True}),
    "gaussian": ("plain", {"init_lora_weights": "gaussian"}),
    "orthogonal": ("plain", {"init_lora_weights": "orthogonal"}),
    "saved in layers": ("plain", {"modules_to_save": ["layers.0.mlp", "input_layernorm"]}),
    "saved with biases": (
        "plain",
        {"target_modules": ["down_proj"], "modules_to_save": ["self_attn"]},
    ),
    "a saved layer": ("plain", {"modules_to_save": ["layers.1"], "layers_to_transform": [0]}),
    "saved embeddings and head untie": ("tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "saved and tied": ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "both saved and tied": (
        "tied",
        {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "saved, tying an untied base": (
        "plain",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "tied LoRAs": (
        "tied",
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "tied LoRAs by an expression": (
        "tied",
        {"target_modules": r".*(embed_tokens|q_proj)", "ensure_weight_tying": True},
    ),
    "nothing to tie": ("tied", {"ensure_weight_tying": True}),
    "tokens": ("plain", {"trainable_token_indices": [3, 7, 9]}),
    "tokens of a tied base": ("tied", {"trainable_token_indices": [9, 3]}),
    "tokens of both": (
        "plain",
        {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [1]}},
    ),
    "the same tokens of both, tied": (
        "tied",
        {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [3, 7]}},
    ),
    "other tokens of both, tied": (
        "tied",
        {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [1, 3]}},
    ),
    "tokens, saved head": (
        "plain",
        {"trainable_token_indices": [3, 7], "modules_to_save": ["lm_head"]},
    ),
    "tokens in half": ("half", {"trainable_token_indices": [3, 7]}),
    "parameters": (
        "plain",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.down_proj.weight", "up_proj.weight"],
        },
    ),
    "parameters alone": (
        "half",
        {"target_modules": [], "target_parameters": ["layers.1.mlp.down_proj.weight"]},
    ),
    "a parameter of a tied base": (
        "tied",
        {"target_modules": [], "target_parameters": ["embed_tokens.weight"]},
    ),
    "kept embeddings": ("plain", {"save": {"save_embedding_layers": True}}),
    "kept embeddings, tied": ("tied", {"save": {"save_embedding_layers": True}}),
    "kept embeddings with LoRA": (
        "plain",
        {"target_modules": ["embed_tokens"], "save": {"save_embedding_layers": True}},
    ),
    "kept embeddings with tokens": (
        "plain",
        {"trainable_token_indices": [3, 7], "save": {"save_embedding_layers": True}},
    ),
    "blocks": ("plain", {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}}),
    "blocks of B in half": (
        "half",
        {"use_bdlora": {"target_modules_bd_b": ["self_attn"], "nblocks": 4}},
    ),
    "velora": ("plain", {"velora_config": {"num_groups": 4}}),
    "monteclora": ("plain", {"monteclora_config": {"num_samples": 2}}),
    "qalora": ("plain", {"use_qalora": True, "qalora_group_size": 16}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_tensors_are_those_of_peft(folder, tmp_path, case):
    """All settings that change the arithmetic; `differing` names tensors that only one side has as
    well.
    """
    base, config = CASES[case]
    adapter = peft_adapter(folder / base, tmp_path / "adapter", **config)
    model = open_lora(open_model(str(folder / base)), adapter)
    theirs = merge_with_peft(folder / base, adapter, tmp_path / "merged")
    assert differing(tensors_of(model), theirs) == []
    assert differing(load_all(folder / base), theirs), "the adapter must change something"
    config = json.loads((tmp_path / "merged/config.json").read_text(encoding="utf-8"))
    assert bool(model.config.get("tie_word_embeddings")) == bool(config["tie_word_embeddings"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("named", ["float32", "bfloat16", None])
def test_the_first_tensor_on_disk_decides_the_dtype(folder, tmp_path, first, named):
    """Not config.json: mergekit's `torch_dtype=None` clears what it names."""
    base = tmp_path / "base"
    base.mkdir()
    tensors = {
        name: t.to(first if name == HEAD else torch.float16)
        for name, t in load_all(folder / "plain").items()
    }
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "plain/config.json").read_text(encoding="utf-8"))
    config.pop("dtype")
    (base / "config.json").write_text(
        json.dumps(config | ({"dtype": named} if named else {})), encoding="utf-8"
    )
    adapter = write_adapter(tmp_path / "adapter")
    model = open_lora(open_model(str(base)), adapter)
    assert {t.dtype for t in tensors_of(model).values()} == {first}
    assert differing(tensors_of(model), merge_with_peft(base, adapter, tmp_path / "merged")) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_that_is_on_disk(folder, tmp_path, same):
    """transformers ties it only where it equals the embeddings."""
    base = tmp_path / "base"
    base.mkdir()
    tensors = load_all(folder / "tied")
    tensors[HEAD] = tensors[EMBED].clone() if same else tensors[EMBED] + 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_bytes((folder / "tied/config.json").read_bytes())
    adapter = write_adapter(
        tmp_path / "adapter",
        {
            "lm_head.lora_A.weight": noise(4, 32),
            "lm_head.lora_B.weight": noise(45, 4)[: tensors[HEAD].shape[0]],
        },
        target_modules=["lm_head"],
    )
    model = open_lora(open_model(str(base)), adapter)
    assert (HEAD in model.keys) is not same
    assert differing(tensors_of(model), merge_with_peft(base, adapter, tmp_path / "merged")) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_by_its_formula(tmp_path, dtype, rslora):
    """W + alpha/r BA in float32, rounded once; without peft."""
    make_model(0, layers=1).to(dtype).save_pretrained(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", use_rslora=rslora)
    base = open_model(str(tmp_path / "base"))
    model = open_lora(base, adapter, "base+adapter")
    delta = (noise(32, 4, seed=1) @ noise(4, 32)) * (6 / 4**0.5 if rslora else 6 / 4)
    assert same_bits(
        model.get_tensor(f"{Q}.weight"), (base.get_tensor(f"{Q}.weight").float() + delta).to(dtype)
    )
    others = model.keys - {f"{Q}.weight"}
    assert others == base.keys - {f"{Q}.weight"}
    assert all(same_bits(model.get_tensor(name), base.get_tensor(name)) for name in others)
    assert (model.ref, model.path, str(model.adapter)) == (
        "base+adapter",
        tmp_path / "base",
        adapter,
    )


def test_an_embeddings_delta_is_rounded_before_the_sum():
    weight, a, b = noise(50, 32).bfloat16(), noise(4, 50, seed=1), noise(32, 4, seed=2)
    delta = ((b @ a).T * 1.5).bfloat16()
    assert same_bits(
        add_to_embedding(weight, a, b, 1.5), (weight.float() + delta.float()).bfloat16()
    )
    assert not torch.equal(
        add_to_embedding(weight, a, b, 1.5), add_to_linear(weight, b.T, a.T, 1.5)
    )


def test_dora_by_its_formula():
    """Rows of m_i length in the direction of W + s BA; columns for embeddings. Float64 within
    float32's rounding.
    """
    weight, a, b, rows, columns = (
        noise(50, 32),
        noise(4, 32, seed=1),
        noise(50, 4, seed=2),
        noise(50, seed=3).abs(),
        noise(32, seed=4).abs(),
    )
    direction = weight.double() + 1.5 * (b.double() @ a.double())
    by_row = rows[:, None] * direction / direction.norm(dim=1, keepdim=True)
    by_column = columns * direction / direction.norm(dim=0, keepdim=True)
    torch.testing.assert_close(add_to_linear(weight, a, b, 1.5, rows), by_row.float())
    torch.testing.assert_close(add_to_embedding(weight, b.T, a.T, 1.5, columns), by_column.float())


def test_a_tensor_is_computed_when_asked_for(folder, tmp_path):
    """Opening reads headers alone."""
    read = []

    class Watched(ModelFolder):
        def get_tensor(self, name):
            read.append(name)
            return super().get_tensor(name)

    base = open_model(str(folder / "plain"))
    model = open_lora(
        Watched(base.path, base.config, base.files), write_adapter(tmp_path / "adapter")
    )
    model.get_tensor(f"{Q}.weight")
    assert read == [f"{Q}.weight"]


TOKENS = "model.embed_tokens.token_adapter.trainable_tokens_delta"
LINE = {"lora_A.weight": (4, 32), "lora_B.weight": (32, 4)}


def parts(module, **shapes):
    return {f"{module}.{part}": torch.zeros(shape) for part, shape in (LINE | shapes).items()}


BAD = {
    "a target that the base lacks": (
        parts("model.layers.9.self_attn.q_proj"),
        {},
        "layers.9.self_attn.q_proj, which the base lacks",
    ),
    "another model's shape": (
        parts(Q, **{"lora_A.weight": (4, 48)}),
        {},
        r"lora_A.weight of .*q_proj has shape \(4, 48\)",
    ),
    "another rank": (None, {"r": 8}, r"lora_A.weight of .*q_proj has shape \(4, 32\)"),
    "half a LoRA": (
        {f"{Q}.lora_A.weight": torch.zeros(4, 32)},
        {},
        "lora_B.weight of .*q_proj has shape None",
    ),
    "DoRA without magnitudes": (
        None,
        {"use_dora": True},
        "lora_magnitude_vector of .*q_proj has shape None",
    ),
    "magnitudes without DoRA": (
        parts(Q, lora_magnitude_vector=(32,)),
        {},
        "lora_magnitude_vector of .*q_proj has shape",
    ),
    "a bias that the base lacks": (
        parts(f"{Q[:-6]}o_proj", **{"lora_B.bias": (32,)}),
        {"lora_bias": True, "target_modules": ["down_proj", "o_proj"]},
        None,
    ),
    "a module that is not targeted": (
        None,
        {"target_modules": ["k_proj"]},
        "which its `target_modules` leave out",
    ),
    "a layer that is not targeted": (
        None,
        {"layers_to_transform": 1},
        "which its `target_modules` leave out",
    ),
    "a larger vocabulary, in a LoRA": (
        {
            "model.embed_tokens.lora_embedding_A": torch.zeros(4, 64),
            "model.embed_tokens.lora_embedding_B": torch.zeros(32, 4),
        },
        {"target_modules": ["embed_tokens"]},
        "resized embeddings are not supported: its vocabulary has 64 rows",
    ),
    "a larger vocabulary, in a head's LoRA": (
        parts("lm_head", **{"lora_B.weight": (64, 4)}),
        {"target_modules": ["lm_head"]},
        "resized embeddings are not supported: its vocabulary has 64 rows",
    ),
    "tokens of a larger vocabulary": (
        {TOKENS: torch.zeros(2, 32)},
        {"trainable_token_indices": [3, 63]},
        "resized embeddings are not supported: its vocabulary has 64 rows",
    ),
    "fewer rows than tokens": (
        {TOKENS: torch.zeros(1, 32)},
        {"trainable_token_indices": [3, 5]},
        r"the rows of model.embed_tokens.weight have shape \(1, 32\), .* give \(2, 32\)",
    ),
    "rows without tokens": (
        {TOKENS: torch.zeros(1, 32)},
        {},
        "the rows of model.embed_tokens.weight have shape",
    ),
    "rows of another module": (
        {TOKENS.replace("embed", "other"): torch.zeros(1, 32)},
        {"trainable_token_indices": [3]},
        "rows of model.other_tokens.weight, which the base lacks",
    ),
    "tokens without rows": (
        None,
        {"trainable_token_indices": [3]},
        "`trainable_token_indices` names rows, which .* lacks",
    ),
    "tokens of another kind": (
        None,
        {"trainable_token_indices": {"embed_tokens": [-1]}},
        "`trainable_token_indices` has a value that peft does not write",
    ),
    "blocks of another kind": (
        None,
        {"use_bdlora": {"nblocks": 0}},
        "`use_bdlora` has a value that peft does not write",
    ),
    "blocks of another number": (
        None,
        {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}},
        r"lora_A.weight of .*q_proj has shape \(4, 32\), .* give \(4, 16\)",
    ),
    "biases that it trained and the base lacks": (
        {"model.norm.bias": torch.zeros(32)},
        {"bias": "all"},
        r"it contains model.norm.bias, which the base lacks",
    ),
    "a larger vocabulary": (
        {EMBED: torch.zeros(64, 32)},
        {},
        "resized embeddings are not supported: its vocabulary has 64 rows",
    ),
    "another width": ({EMBED: torch.zeros(64, 16)}, {}, r"has shape \(64, 16\)"),
    "a whole tensor that the base lacks": (
        {"score.weight": torch.zeros(2, 32)},
        {},
        "it contains score.weight, which the base lacks",
    ),
    "a missing saved module": (
        None,
        {"modules_to_save": ["lm_head"]},
        "`modules_to_save` names lm_head",
    ),
    "another kind": (None, {"peft_type": "IA3"}, "not a LoRA .*IA3"),
    "no kind": (None, {"peft_type": None}, "the adapter is not a LoRA"),
    "replicated layers": (
        None,
        {"layer_replication": [[0, 2]]},
        "`layer_replication` is not supported",
    ),
    "aLoRA": (None, {"alora_invocation_tokens": [1]}, "`alora_invocation_tokens` is not supported"),
    "PiSSA": (
        None,
        {"init_lora_weights": "pissa_niter_4"},
        "`init_lora_weights` changes the base's weights.*pissa",
    ),
    "half a DoRA": (
        parts(Q, lora_magnitude_vector=(32,)),
        {"use_dora": True},
        "it lacks a LoRA for model.layers.1.self_attn.q_proj",
    ),
    "no rank": (None, {"r": None}, "`r` or `lora_alpha` of .*q_proj is not a number"),
    "a pattern of another kind": (None, {"rank_pattern": [1]}, "`rank_pattern`"),
    "layers of another kind": (None, {"layers_to_transform": ["0"]}, "`layers_to_transform`"),
    "a pattern that is none": (None, {"alpha_pattern": {"(": 1}}, "`alpha_pattern`"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_in_one_line(folder, tmp_path, case):
    tensors, config, message = BAD[case]
    base = "tied" if message is None else "plain"
    adapter = write_adapter(tmp_path / "adapter", tensors, **config)
    with pytest.raises(
        ModelError, match=message or "`lora_bias` needs .*o_proj.bias, which the base lacks"
    ) as error:
        open_lora(open_model(str(folder / base)), adapter)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "adapter") in str(error.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", ["plain", "tied"])
@pytest.mark.parametrize("name", [f"{Q}.lora_B.bias", f"{Q}.lora_A.bias", "model.norm.bias"])
def test_biases_that_the_settings_switch_off_are_not_used(folder, tmp_path, caplog, base, name):
    """As mergekit-extract-lora writes them; peft has no place for them."""
    caplog.set_level(logging.WARNING)
    lora = {f"{Q}.lora_A.weight": noise(4, 32), f"{Q}.lora_B.weight": noise(32, 4, seed=1)}
    write_adapter(tmp_path / "plain", lora)
    adapter = write_adapter(tmp_path / "biased", lora | {name: torch.ones(32)})
    wanted = tensors_of(open_lora(open_model(str(folder / base)), str(tmp_path / "plain")))
    model = open_lora(open_model(str(folder / base)), adapter)
    assert differing(tensors_of(model), wanted) == []
    (said,) = caplog.messages
    assert name in said
    assert adapter in said
    theirs = merge_with_peft(folder / base, adapter, tmp_path / "merged")
    assert differing(wanted, theirs) == []


def test_a_head_is_untied_on_a_base_without_the_key(folder, tmp_path):
    """Families that are tied by default leave it out of config.json."""
    base = tmp_path / "base"
    base.mkdir()
    config = json.loads((folder / "tied/config.json").read_text(encoding="utf-8"))
    del config["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(load_all(folder / "tied"), base / "model.safetensors", metadata={"format": "pt"})
    head = noise(*load_all(base)[EMBED].shape)
    adapter = write_adapter(tmp_path / "adapter", {HEAD: head}, modules_to_save=["lm_head"])
    model = open_lora(open_model(str(base)), adapter)
    assert model.config["tie_word_embeddings"] is False
    assert same_bits(model.get_tensor(HEAD), head.bfloat16())


def test_a_stored_head_is_untied_on_a_base_that_is_tied_by_default(folder, tmp_path):
    """Gemma's config.json has no key, and a fine-tune's files may hold the head as well."""
    base = tmp_path / "base"
    base.mkdir()
    config = json.loads((folder / "tied/config.json").read_text(encoding="utf-8"))
    del config["tie_word_embeddings"]
    config["model_type"] = "gemma"
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_all(folder / "tied")
    tensors[HEAD] = tensors[EMBED].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    head = noise(*tensors[EMBED].shape)
    adapter = write_adapter(tmp_path / "saved", {HEAD: head}, modules_to_save=["lm_head"])
    model = open_lora(open_model(str(base)), adapter)
    assert model.config["tie_word_embeddings"] is False
    assert same_bits(model.get_tensor(HEAD), head.bfloat16())
    plain = open_lora(open_model(str(base)), write_adapter(tmp_path / "plain", parts(Q)))
    assert plain.config.get("tie_word_embeddings") is not False, "still tied"


def test_a_lora_on_experts_is_refused(folder, tmp_path):
    """transformers 5 holds them in one tensor, and peft converts the adapter: other arithmetic."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((folder / "plain/config.json").read_bytes())
    expert = "model.layers.0.mlp.experts.0.up_proj"
    save_file({f"{expert}.weight": torch.zeros(32, 32)}, base / "model.safetensors")
    adapter = write_adapter(tmp_path / "adapter", parts(expert), target_modules=["up_proj"])
    with pytest.raises(ModelError, match="a LoRA on experts is not supported"):
        open_lora(open_model(str(base)), adapter)


def test_a_folder_that_is_no_adapter(folder, tmp_path):
    base = open_model(str(folder / "plain"))
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        open_lora(base, str(folder / "plain"))
    with pytest.raises(ModelError, match="there is no such adapter folder"):
        open_lora(base, str(tmp_path / "nowhere"))
    adapter = tmp_path / "adapter"
    write_adapter(adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        open_lora(base, str(adapter))
    (adapter / "adapter_model.bin").rename(adapter / "elsewhere")
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        open_lora(base, str(adapter))
    (adapter / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ModelError, match="damaged"):
        open_lora(base, str(adapter))
    (adapter / "adapter_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be read"):
        open_lora(base, str(adapter))


def test_an_adapter_beside_the_base_name(folder, tmp_path):
    """The whole reference, as a recipe names it."""
    adapter = write_adapter(tmp_path / "adapter")
    model = open_model(f"{folder / 'plain'}+{adapter}")
    assert model.ref == f"{folder / 'plain'}+{adapter}"
    assert not torch.equal(
        model.get_tensor(f"{Q}.weight"), open_model(str(folder / "plain")).get_tensor(f"{Q}.weight")
    )


def test_the_real_adapter_opens(shared):
    """What peft saved for a model of 30 layers: every tensor of it is understood, on a base that
    has headers alone.
    """
    from evomerge.merging.adapters.adapter import open_adapter

    adapter = open_adapter(str(shared / "smollm-sibling/adapter"))
    modules = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in adapter.shapes}
    assert len(modules) == 30 * 7
    assert all(adapter.targets(module) for module in modules)
    assert adapter.rank_and_scaling("model.layers.0.self_attn.q_proj") == (16, 2.0)
