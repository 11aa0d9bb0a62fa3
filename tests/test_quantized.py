"""A live 4-bit model, quantised again in place: the reference is always a model freshly loaded in 4
bits.
"""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import make_model, save
from merging_tools import make_family, random_recipe, same_bits
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from evomerge.answering.hf.loading import load_model
from evomerge.errors import EngineError
from evomerge.merging import quantized
from evomerge.merging.build import build_model
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.live import LiveModel
from evomerge.recipe import Recipe
from evomerge.study import EngineSection

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install 'evomerge[4bit]'",
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
double_or_not = pytest.mark.parametrize("quantization", ["4bit", "4bit-double"])
# Multiples of the block (64) and of what the CPU's fused kernel takes (32 rows).
SIZES = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16, "layers": 2}
PROMPT = [[1, 5, 6, 7, 8, 9]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models of one shape."""
    folder = tmp_path_factory.mktemp("quantized")
    for seed, name in enumerate(("one", "two")):
        save(make_model(seed, **SIZES), folder / name)
    return folder


def load(folder, quantization, device="cpu", dtype=torch.bfloat16):
    """By the engine's own way."""
    return load_model(
        open_model(str(folder)), EngineSection(device=device, quantization=quantization), dtype
    )


def load_fresh(folder, quantization, device="cpu", dtype=torch.bfloat16):
    """By transformers alone: the reference."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=quantization == "4bit-double",
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=config, device_map={"": device}
    ).eval()


def write_all(model, folder):
    """Every weight of a folder into the live model."""
    weights = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    for name, parameter in model.named_parameters():
        quantized.copy_or_quantize(parameter, weights[name].detach().to(parameter.device))


def held(state, prefix=""):
    """Every field of a QuantState, the nested one's too, by name."""
    fields = {}
    for name, value in vars(state).items():
        fields |= (
            held(value, f"{prefix}{name}.")
            if type(value) is type(state)
            else {prefix + name: value}
        )
    return fields


def different(ours, theirs):
    """What differs in any bit between two models' parameters and quantisation states."""
    wrong = []
    for (name, a), (other, b) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert name == other
        wrong += [] if same_bits(a.data, b.data) else [name]
        if quantized.is_quantized(b):
            x, y = held(a.quant_state), held(b.quant_state)
            wrong += [f"{name}: {key}" for key in x.keys() ^ y.keys()]
            wrong += [f"{name}: {key}" for key in x.keys() & y.keys() if not same(x[key], y[key])]
    return wrong


def same(a, b):
    return (
        same_bits(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    )


@torch.inference_mode()  # as the engine answers
def logits(model):
    return model(torch.tensor(PROMPT, device=model.device)).logits


def test_without_bitsandbytes_nothing_is_quantised_and_nothing_imports_it(monkeypatch):
    files = Path(quantized.__file__).parents[1].rglob("*.py")
    assert not [
        path
        for path in files
        if re.search(r"^(import|from) bitsandbytes", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # an import of it now fails
    parameter = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
    assert not quantized.is_quantized(parameter)
    assert (quantized.shape(parameter), quantized.dtype(parameter)) == ((2, 3), torch.bfloat16)
    quantized.copy_or_quantize(parameter, torch.ones(2, 3, dtype=torch.bfloat16))
    assert parameter.eq(1).all()


def test_a_missing_bitsandbytes_is_one_line(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        EngineError, match=r"engine.quantization.*found: '4bit'.*pip install 'evomerge\[4bit\]'"
    ):
        load(folders / "one", "4bit")


@needs_bitsandbytes
@on_devices
@double_or_not
def test_the_engine_loads_as_transformers_does(folders, quantization, device):
    ours = load(folders / "one", quantization, device)
    assert not different(ours, load_fresh(folders / "one", quantization, device))
    names = {name for name, p in ours.named_parameters() if quantized.is_quantized(p)}
    assert len(names) == 14  # seven linears in each of two layers; embeddings, head and norms stay
    assert {p.device.type for p in ours.parameters()} == {device}


@needs_bitsandbytes
@on_devices
@double_or_not
def test_written_again_and_again_it_equals_a_fresh_load(folders, quantization, device):
    """Answers come in between: the CPU's first forward pass reorders the packed weights."""
    live = load(folders / "one", quantization, device)
    for name in ("two", "one", "two"):
        fresh = load_fresh(folders / name, quantization, device)
        write_all(live, folders / name)
        assert not different(live, fresh)
        assert same_bits(logits(live), logits(fresh))
        assert not different(live, fresh)
        ids = torch.tensor(PROMPT, device=device)
        assert (
            live.generate(ids, max_new_tokens=8, do_sample=False).tolist()
            == fresh.generate(ids, max_new_tokens=8, do_sample=False).tolist()
        )


@needs_bitsandbytes
def test_the_two_models_differ(folders):
    """Or the tests above prove nothing."""
    one, two = (load_fresh(folders / name, "4bit") for name in ("one", "two"))
    assert any("absmax" in what for what in different(one, two))
    assert not torch.equal(logits(one), logits(two))


@needs_bitsandbytes
@on_devices
@double_or_not
def test_references_stay_good(folders, quantization, device):
    """Also through answers where no kernel reorders the weights: a captured graph would go on
    reading the right memory.
    """
    live = load(folders / "one", quantization, device)
    for module in live.modules():
        module.support_avx512bf16_for_cpu = False
    linear = live.model.layers[0].mlp.down_proj
    parameter, state = linear.weight, linear.weight.quant_state

    def addresses():
        return [
            parameter.data_ptr(),
            *(v.data_ptr() for v in held(state).values() if isinstance(v, torch.Tensor)),
        ]

    before = addresses()
    for name in ("two", "one"):
        write_all(live, folders / name)
        assert linear.weight is parameter
        assert parameter.quant_state is linear.quant_state is state
        assert addresses() == before
        assert torch.isfinite(logits(live)).all()
    assert not different(live, load_fresh(folders / "one", quantization, device))


@needs_bitsandbytes
def test_what_was_written_inside_inference_mode_can_be_written_again(folders):
    live = load(folders / "one", "4bit-double")
    with torch.inference_mode():
        live(torch.tensor(PROMPT))
        write_all(live, folders / "two")  # every tensor made here is locked outside
    write_all(live, folders / "one")
    assert not different(live, load_fresh(folders / "one", "4bit-double"))


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_shape_and_dtype_are_those_of_the_unpacked_weight(folders, dtype):
    live = load(folders / "one", "4bit-double", dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(folders / "one", dtype=dtype)
    shapes = {name: (tuple(p.shape), p.dtype) for name, p in plain.named_parameters()}
    assert {
        name: (quantized.shape(p), quantized.dtype(p)) for name, p in live.named_parameters()
    } == shapes
    logits(live)
    assert {
        name: (quantized.shape(p), quantized.dtype(p)) for name, p in live.named_parameters()
    } == shapes
    # bfloat16 in the file, `dtype` in the live model, as after a load
    write_all(live, folders / "two")
    assert not different(live, load_fresh(folders / "two", "4bit-double", dtype=dtype))


@needs_bitsandbytes
def test_weights_that_lie_the_other_way_round(tmp_path):
    """GPT-2's Conv1D; its attention's output is square, where a wrong turn would go unnoticed."""
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=32,
            n_positions=32,
            n_embd=64,
            n_layer=1,
            n_head=2,
            bos_token_id=1,
            eos_token_id=2,
        )
        GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path / name)
    live = load(tmp_path / "one", "4bit")
    assert quantized.shape(live.transformer.h[0].attn.c_attn.weight) == (64, 192)
    write_all(live, tmp_path / "two")
    fresh = load_fresh(tmp_path / "two", "4bit")
    assert not different(live, fresh)
    assert same_bits(logits(live), logits(fresh))


@needs_bitsandbytes
def test_the_packed_numbers_are_nf4():
    """By a plain formula: each number becomes the nearest of 16 times its block's largest
    magnitude.
    """
    from bitsandbytes.nn import Linear4bit

    linear = (
        Linear4bit(128, 32, bias=False, quant_type="nf4", compress_statistics=False)
        .to(torch.bfloat16)
        .to("cpu")
    )
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    quantized.copy_or_quantize(linear.weight, weight)
    state = linear.weight.quant_state
    blocks = weight.double().reshape(-1, 64)
    assert torch.equal(state.absmax.double(), blocks.abs().amax(dim=1))
    packed = linear.weight.data.flatten().long()
    ours = state.code.double()[torch.stack([packed >> 4, packed & 15], dim=1)].reshape(-1, 64)
    scaled = blocks / blocks.abs().amax(dim=1, keepdim=True)
    nearest = (scaled[..., None] - state.code.double()).abs().amin(dim=-1)
    assert torch.allclose((scaled - ours).abs(), nearest, rtol=0, atol=1e-6)


@needs_bitsandbytes
@on_devices
@double_or_not
@pytest.mark.parametrize("residency", ["device", "host", "disk"])
def test_a_recipe_in_place_equals_the_merged_folder_loaded_in_4_bits(
    tmp_path, quantization, device, residency
):
    """From merge to answer, with answers before each: packed bytes, absmax and logits."""
    family = make_family(tmp_path, **(SIZES | {"layers": 4}))
    # of the live model; the merges stay in bfloat16
    dtype = torch.float16 if residency == "host" else torch.bfloat16
    model = load(family / "base", quantization, device, dtype)
    folders = [open_model(str(family / name)) for name in ("base", "one", "two")]
    live = LiveModel(model, folders[0], folders[1:], residency=residency)
    models = [
        {"model": str(family / name), "parameters": {"weight": [0.4, 1.2], "density": 0.5}}
        for name in ("one", "two")
    ]
    others = {"base_model": str(family / "base"), "models": models, "dtype": "bfloat16"}
    generator = torch.Generator().manual_seed(5)
    recipes = [
        random_recipe(family, ["one"], generator),
        random_recipe(family, ["one", "two"], generator, normalize=True),
        Recipe.from_dict({"merge_method": "ties"} | others),
        Recipe.from_dict({"merge_method": "dare_linear"} | others),
        random_recipe(family, ["two"], generator),
    ]
    logits(model)
    for i, recipe in enumerate(recipes):
        live.apply(recipe)
        fresh = load_fresh(build_model(recipe, tmp_path / f"out{i}"), quantization, device, dtype)
        assert not different(model, fresh), i
        assert same_bits(logits(model), logits(fresh)), i
    live.apply(recipes[-1])  # nothing changed, nothing is written: the reordered weights stay
    assert not different(model, fresh)


@needs_bitsandbytes
@needs_cuda
def test_loading_never_holds_the_unquantised_model(tmp_path):
    """What lets a 13B model load on 24 GB: the peak stays near the size in 4 bits."""
    model = make_model(
        0,
        layers=24,
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=64,
    )
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    save(model, tmp_path)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    live = load(tmp_path, "4bit", "cuda")
    assert torch.cuda.max_memory_allocated() - before < 0.45 * whole
    assert quantized.is_quantized(live.model.layers[0].mlp.up_proj.weight)
