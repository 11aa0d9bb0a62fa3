"""fp8 and mxfp4 checkpoints: read, merged and loaded as the bfloat16 models that they stand for.

The references are transformers' own dequantised loads, and formulas written out here.
"""

import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from merging_tools import differing, load_all, same_bits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from evomerge import once
from evomerge.answering.engine import EngineSpec
from evomerge.answering.hf.loading import load_model
from evomerge.answering.vllm.engine import VllmEngine
from evomerge.cli import main
from evomerge.errors import ModelError
from evomerge.merging.architecture.architecture import EMBED
from evomerge.merging.build import build_model
from evomerge.merging.checkpoints.dequantize import dequantize_fp8, dequantize_mxfp4, fp8_block
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.checkpoints.safetensors_reader import SafetensorsReader
from evomerge.merging.live import LiveModel
from evomerge.recipe import Recipe
from evomerge.study import EngineSection, GenerationSection

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import architectures
import tiny_models

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
BLOCK = 8  # rows and columns that share a scale in the tiny fp8 models
LARGEST = 448.0  # of e4m3
CPU = EngineSection(device="cpu")
NUMBERS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # of e2m1
SAYS = "weights are dequantised to bfloat16 as they are read"


@pytest.fixture(autouse=True)
def _told_anew():
    once.said.clear()


def edit(folder, change, **config):
    """The folder's tensors as `change` makes them; keys of config.json, None removes one."""
    file, settings = folder / "model.safetensors", folder / "config.json"
    tensors = change(load_file(file))
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, metadata={"format": "pt"})
    content = json.loads(settings.read_text()) | config
    for key in [key for key, value in config.items() if value is None]:
        del content[key]
    settings.write_text(json.dumps(content))


def to_blocks(weight, size=BLOCK):
    """fp8 numbers and a scale for each block, of which the last ones may be cut off."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // size), -(-columns // size))
    packed = torch.empty(rows, columns, dtype=FP8)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = (slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size))
            scales[i, j] = weight[here].float().abs().max() / LARGEST
            packed[here] = (weight[here].float() / scales[i, j]).to(FP8)
    return packed, scales


def to_fp8(folder, size=BLOCK):
    """As DeepSeek-V3 and Qwen3-…-FP8 lie on disk."""

    def change(tensors):
        stored = dict(tensors)
        for name, tensor in tensors.items():
            if "_proj" in name and tensor.ndim == 2:
                stored[name], stored[f"{name}_scale_inv"] = to_blocks(tensor, size)
        return stored

    stated = {"quant_method": "fp8", "weight_block_size": [size, size], "fmt": "e4m3"}
    edit(folder, change, quantization_config={**stated, "activation_scheme": "dynamic"})


def to_mxfp4(folder):
    """As gpt-oss lies on disk: experts in groups of 32 numbers along what they multiply."""

    def change(tensors):
        stored = {}
        for name, tensor in tensors.items():
            if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                stored[name] = tensor
                continue
            groups = tensor.float().transpose(1, 2).unflatten(-1, (-1, 32))
            exponents = torch.log2(groups.abs().amax(-1) / 6).ceil()
            scaled = groups / torch.exp2(exponents).unsqueeze(-1)
            nearest = (scaled.abs().unsqueeze(-1) - NUMBERS).abs().argmin(-1)
            nibbles = (nearest + 8 * (scaled < 0)).to(torch.uint8)
            stored[f"{name}_blocks"] = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
            stored[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
        return stored

    stated = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    edit(folder, change, quantization_config=stated)


KINDS = {
    "qwen3": (to_fp8, FineGrainedFP8Config),
    "deepseek_v3": (to_fp8, FineGrainedFP8Config),
    "qwen3_moe": (to_fp8, FineGrainedFP8Config),
    "gpt_oss": (to_mxfp4, Mxfp4Config),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """base/ and one/ of a type, quantised, and plain/, the base as it was."""
    families = {}

    def make(name):
        if name not in families:
            folder = families[name] = tmp_path_factory.mktemp(name)
            config = tiny_models.tiny_config(name)
            for seed, model in enumerate(("base", "one")):
                tiny_models.make_tiny(config, folder / model, seed)
            shutil.copytree(folder / "base", folder / "plain")
            for model in ("base", "one"):
                KINDS[name][0](folder / model)
        return families[name]

    return make


@pytest.fixture
def family(made, tmp_path):
    """A copy that a test may change and write to."""

    def copy(name):
        return Path(shutil.copytree(made(name), tmp_path / name))

    return copy


def theirs(folder, name, dtype=BF16):
    """transformers' own dequantised load."""
    config = KINDS[name][1](dequantize=True)
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)
    except AttributeError as error:  # its plan for several devices lacks these models
        pytest.skip(f"transformers {transformers.__version__} cannot load it: {error}")


def alone(folder, name="base"):
    """The model by itself."""
    data = {"merge_method": "passthrough", "models": [{"model": str(folder / name)}]}
    return Recipe.from_dict(data)


@pytest.mark.parametrize("name", KINDS)
def test_it_looks_as_the_checkpoint_that_was_quantised(made, name, monkeypatch):
    """Names, shapes and dtypes, without reading a number."""
    monkeypatch.setattr(SafetensorsReader, "tensor", lambda *_: pytest.fail("was read"))
    packed, plain = (open_model(str(made(name) / model)) for model in ("base", "plain"))
    assert packed.is_dequantized
    assert not plain.is_dequantized
    assert packed.keys == plain.keys
    for tensor in plain.keys:
        assert packed.shape(tensor) == plain.shape(tensor), tensor
        assert packed.dtype(tensor) == plain.dtype(tensor), tensor
        assert packed.stored_dtype(tensor) == plain.stored_dtype(tensor), tensor
    assert packed.config == plain.config


@pytest.mark.parametrize("name", KINDS)
def test_the_numbers_are_those_of_transformers(family, name):
    """Loaded to answer, and as a plain folder that a passthrough of it writes."""
    folder = family(name)
    reference = theirs(folder / "base", name)
    ours = load_model(open_model(str(folder / "base")), CPU, BF16, merged=True)
    assert not differing(ours.state_dict(), reference.state_dict())
    assert not hasattr(ours.config, "quantization_config")
    assert ours.generation_config.eos_token_id == 1
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(ours(input_ids=ids).logits, reference.eval()(input_ids=ids).logits)
    out = build_model(alone(folder), folder / "out")
    assert not differing(architectures.load(out).state_dict(), reference.state_dict())
    close = load_all(folder / "plain")
    for tensor, numbers in load_all(out).items():
        assert torch.allclose(numbers.float(), close[tensor].float(), rtol=0.2, atol=0.02)


@pytest.mark.parametrize("packed", [("base", "one"), ("base",), ("one",)])
@pytest.mark.parametrize("name", KINDS)
def test_merged_by_the_formula_and_live_as_a_fresh_load(family, name, packed):
    """Both quantised, or one of the two."""
    folder = family(name)
    for model in {"base", "one"} - set(packed):
        build_model(alone(folder, model), folder / "bf16")
        shutil.rmtree(folder / model)
        (folder / "bf16").rename(folder / model)
    architectures.check_build(folder)
    assert not {"quantization_config"} & json.loads((folder / "out/config.json").read_text()).keys()
    base, one = (open_model(str(folder / model)) for model in ("base", "one"))
    live = load_model(base, CPU, BF16, merged=True)
    LiveModel(live, base, [one]).apply(architectures.recipe_of(folder))
    fresh = architectures.load(folder / "out")
    assert not differing(live.state_dict(), fresh.state_dict())
    assert open_model(str(folder / "out")).is_dequantized is False


@pytest.mark.parametrize(("name", "kind"), [("qwen3", "fp8"), ("gpt_oss", "mxfp4")])
def test_the_command_says_it_once_for_each_model(family, name, kind, capsys):
    folder = family(name)
    (folder / "r.yml").write_text(architectures.recipe_of(folder).to_yaml())
    assert main(["merge", str(folder / "r.yml"), str(folder / "out")]) == 0
    captured = capsys.readouterr()
    lines = [line for line in (captured.out + captured.err).splitlines() if SAYS in line]
    assert len(lines) == 2
    for model in ("base", "one"):
        assert any(f"{folder / model}: {kind} {SAYS}" in line for line in lines)


def test_a_search_over_them(family):
    architectures.check_search(family("qwen3"))


def test_every_number_of_fp8_by_the_formula():
    """All 256 but NaN, in blocks that are cut off at two edges, as DeepSeek-V3's 576 rows are."""
    numbers = [number for number in range(256) if number & 127 != 127]
    weight = torch.tensor(numbers * 5, dtype=torch.uint8).view(FP8)[:1260].reshape(36, 35)
    generator = torch.Generator().manual_seed(0)
    scales = torch.rand(3, 3, generator=generator) * 10.0 ** torch.arange(-30, 6, 4)[:9].view(3, 3)
    assert fp8_block(weight.shape, scales.shape, (16, 16)) == (16, 16)
    found = dequantize_fp8(weight, scales, (16, 16))
    for i in range(36):
        for j in range(35):
            wanted = (weight[i, j].float() * scales[i // 16, j // 16]).to(BF16)
            assert same_bits(found[i, j], wanted), (i, j)


@pytest.mark.parametrize(
    ("shape", "grid", "stated", "wanted"),
    [
        ((576, 7168), (5, 56), (128, 128), (128, 128)),
        ((576, 7168), (5, 56), None, None),
        ((256, 64), (), (128, 128), (256, 64)),
        ((256, 64), (1,), None, (256, 64)),
        ((256, 64), (256, 1), None, (1, 64)),
        ((256, 64), (256,), None, None),
        ((4, 256, 64), (4, 2, 1), (128, 128), (128, 128)),
        ((4, 256, 64), (2, 1), (128, 128), None),
        ((256, 64), (3, 1), (128, 128), None),
        ((256, 64), (0, 1), None, None),
        ((64,), (1,), None, None),
    ],
)
def test_what_a_scale_of_fp8_is_for(shape, grid, stated, wanted):
    assert fp8_block(shape, grid, stated) == wanted


def test_large_weights_are_dequantised_in_parts():
    """With scales for blocks, for rows, and for experts."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 2500, 6, generator=generator).to(FP8)
    for grid in ((2, 20, 1), (2, 2500, 1), (2, 1, 1)):
        scales = torch.rand(grid, generator=generator)
        block = fp8_block(weight.shape, grid, (128, 128))
        across = scales.repeat_interleave(block[0], 1)[:, :2500]
        assert torch.equal(
            dequantize_fp8(weight, scales, block), (weight.float() * across).bfloat16()
        )


def test_every_number_of_mxfp4_is_transformers():
    """256 bytes by 255 scales; the last one is no number."""
    scales = torch.arange(255, dtype=torch.uint8).reshape(1, 255, 1).repeat(1, 1, 16)
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 255, 1, 1)
    found = dequantize_mxfp4(blocks, scales)
    assert found.shape == (1, 512, 255)
    assert same_bits(found, convert_moe_packed_tensors(blocks, scales))
    low_first = torch.tensor([[[[0x72] * 16]]], dtype=torch.uint8)
    two = dequantize_mxfp4(low_first, torch.tensor([[[128]]], dtype=torch.uint8))
    assert two[0, :2, 0].tolist() == [2.0, 12.0]


STRATEGIES = {"tensor": ((1,), None), "channel": ((64, 1), None), "block": ((8, 4), [8, 8])}


def to_compressed(folder, strategy, **more):
    """fp8 as compressed-tensors saves it, its scales in bfloat16."""
    grid, structure = STRATEGIES[strategy]
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    weights["block_structure"] = structure
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    wanted = {}

    def change(tensors):
        stored = dict(tensors)
        for name, tensor in tensors.items():
            if name.endswith("up_proj.weight"):
                scales = torch.rand(grid, generator=torch.Generator().manual_seed(len(wanted)))
                stored[name] = (tensor * 100).to(FP8)
                stored[f"{name}_scale"] = scales.to(BF16)
                stored[name.replace("weight", "input_scale")] = torch.ones(1)
                rows = scales.reshape(-1, scales.shape[-1] if scales.ndim > 1 else 1).to(BF16)
                for axis in (0, 1):
                    rows = rows.repeat_interleave(tensor.shape[axis] // rows.shape[axis], axis)
                # compressed-tensors multiplies in the scales' dtype
                wanted[name] = stored[name].to(BF16) * rows
        return stored

    stated = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    edit(folder, change, quantization_config=stated | {"config_groups": groups} | more)
    return wanted


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fp8_of_compressed_tensors(family, strategy):
    folder = family("qwen3")
    wanted = load_all(folder / "plain")
    wanted |= to_compressed(folder / "plain", strategy, sparsity_config={"format": "dense"})
    merged = load_all(build_model(alone(folder, "plain"), folder / "out"))
    assert not differing(merged, wanted)
    live = load_model(open_model(str(folder / "plain")), CPU, BF16, merged=True)
    assert not differing(live.state_dict(), architectures.load(folder / "out").state_dict())


@pytest.mark.parametrize(
    "more",
    [
        {"format": "nvfp4-pack-quantized"},
        {"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        {"sparsity_config": 1},
        {"config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}}}},
        {"config_groups": {"g": {"weights": {"num_bits": 8, "type": "float", "symmetric": False}}}},
        {"config_groups": {"g": {"weights": None}}},
        {"config_groups": [1]},
    ],
)
def test_what_else_compressed_tensors_does_is_refused(family, more):
    folder = family("qwen3")
    to_compressed(folder / "plain", "channel", **more)
    with pytest.raises(ModelError, match=r"the model is quantised \(compressed-tensors\)"):
        build_model(alone(folder, "plain"), folder / "out")


def without(end):
    return lambda tensors: {name: t for name, t in tensors.items() if not name.endswith(end)}


def with_misfit(end):
    def change(tensors):
        name = next(name for name in sorted(tensors) if name.endswith(end))
        return tensors | {name: tensors[name][..., :3].contiguous()}

    return change


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (
            "qwen3",
            without("0.mlp.up_proj.weight_scale_inv"),
            r"one/model.safetensors: model.layers.0.mlp.up_proj.weight is quantised, and the "
            "tensor of its scales, model.layers.0.mlp.up_proj.weight_scale_inv, is missing",
        ),
        (
            "gpt_oss",
            without("down_proj_scales"),
            r"one/model.safetensors: \S+down_proj_blocks is quantised, and the tensor of its "
            r"scales, \S+down_proj_scales, is missing",
        ),
        (
            "qwen3",
            with_misfit("k_proj.weight_scale_inv"),
            "does not fit the weights",
        ),
        ("gpt_oss", with_misfit("down_proj_blocks"), "does not fit the weights"),
    ],
)
def test_scales_that_lack_or_do_not_fit_are_one_line(family, name, change, words, capsys):
    folder = family(name)
    edit(folder / "one", change)
    (folder / "r.yml").write_text(architectures.recipe_of(folder).to_yaml())
    assert main(["merge", str(folder / "r.yml"), str(folder / "out")]) == 2
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(ModelError, match=words):
        build_model(architectures.recipe_of(folder), folder / "out")


def test_plain_weights_of_a_model_that_was_trained_in_fp8_are_what_they_are(family, caplog):
    folder = family("qwen3")
    wanted = load_all(folder / "plain")
    edit(folder / "plain", lambda tensors: tensors, quantization_config={"quant_method": "fp8"})
    model = open_model(str(folder / "plain"))
    assert not model.is_dequantized
    assert not caplog.records
    assert not differing({name: model.get_tensor(name) for name in model.keys}, wanted)


def test_a_lora_on_it_is_the_lora_on_the_dequantised_model(family):
    folder = family("qwen3")
    build_model(alone(folder), folder / "bf16")
    adapter, target = folder / "adapter", "model.layers.0.self_attn.q_proj"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    rows, columns = open_model(str(folder / "bf16")).shape(f"{target}.weight")
    tensors = {}
    for layer in range(tiny_models.LAYERS):
        for part, shape in (("A", (2, columns)), ("B", (rows, 2))):
            generator = torch.Generator().manual_seed(layer)
            name = f"base_model.model.{target.replace('.0.', f'.{layer}.')}.lora_{part}.weight"
            tensors[name] = torch.randn(shape, generator=generator)
    save_file(tensors, adapter / "adapter_model.safetensors")
    ours, wanted = (open_model(f"{folder / name}+{adapter}") for name in ("base", "bf16"))
    assert ours.keys == wanted.keys
    for name in ours.keys:
        assert same_bits(ours.get_tensor(name), wanted.get_tensor(name)), name


def test_vllm_is_told_to_take_a_plain_copy(family):
    base = open_model(str(family("qwen3") / "base"))
    section = EngineSection(kind="vllm")
    spec = EngineSpec(base, [base], section, GenerationSection(), "bfloat16")
    with pytest.raises(ModelError, match=r"vLLM would load the base quantised.*passthrough"):
        VllmEngine(spec)


def test_a_type_that_transformers_does_not_know_is_merged_and_not_loaded(family, caplog):
    folder = family("qwen3")
    edit(folder / "base", lambda tensors: tensors, architectures=None, model_type="ours")
    build_model(alone(folder), folder / "out")
    with pytest.raises(ModelError):
        load_model(open_model(str(folder / "base")), CPU, BF16, merged=True)


def one_shard(folder, names, index):
    """The weights in files of these names, with an index of them or without."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    parts = [*range(0, len(tensors), -(-len(tensors) // len(names))), len(tensors)]
    for file, (start, end) in zip(names, pairwise(parts), strict=True):
        held = dict(sorted(tensors.items())[start:end])
        save_file(held, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    if index:
        content = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("model", ["plain", "base"])
def test_the_only_shard_needs_no_index(family, model, index):
    folder = family("qwen3")
    wanted = load_all(build_model(alone(folder, model), folder / "before"))
    one_shard(folder / model, ["model-00001-of-00001.safetensors"], index)
    out = build_model(alone(folder, model), folder / "after")
    assert not differing(load_all(out), wanted)
    live = load_model(open_model(str(folder / model)), CPU, BF16, merged=True)
    assert not differing(live.state_dict(), architectures.load(out).state_dict())


def test_other_shards_need_one(family):
    folder = family("qwen3")
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    one_shard(folder / "base", names, index=False)
    with pytest.raises(ModelError, match="shards, but no"):
        open_model(str(folder / "base"))
    (folder / "base" / names[0]).unlink()
    with pytest.raises(ModelError, match="shards, but no"):
        open_model(str(folder / "base"))


def test_it_is_said_once_as_the_first_weight_is_read(family, caplog):
    model = open_model(str(family("qwen3") / "base"))
    model.get_tensor(EMBED)
    assert not caplog.records
    for name in sorted(model.keys):
        model.get_tensor(name)
        open_model(model.ref).get_tensor(name)
    assert [record.getMessage() for record in caplog.records] == [f"{model.ref}: fp8 {SAYS}"]


def test_what_is_not_merged_is_loaded_as_transformers_loads_it(family):
    """With float32 for the product, which is rounded where the model is merged."""
    base = open_model(str(family("qwen3") / "base"))
    reference = theirs(base.path, "qwen3", torch.float32)
    assert not differing(load_model(base, CPU, torch.float32).state_dict(), reference.state_dict())
    merged = load_model(base, CPU, torch.float32, merged=True).state_dict()
    for name in base.keys:
        assert same_bits(merged[name], base.get_tensor(name).float()), name


def test_the_map_of_devices_counts_here_too(family):
    base = open_model(str(family("qwen3") / "base"))
    section = EngineSection(device_map="cpu")
    ours = load_model(base, section, BF16, merged=True).state_dict()
    assert not differing(ours, load_model(base, CPU, BF16, merged=True).state_dict())
