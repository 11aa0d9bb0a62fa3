"""MODEL+ADAPTER of every architecture: the merged tensors are peft's, bit for bit.

peft names modules as the loaded model does, and files may have other names, stacked experts, or
fused projections. The models are tiny and random, saved by transformers.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from lora_tools import merge_with_peft, peft_adapter, tensors_of
from merging_tools import differing, load_all
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import WeightConverter

from evomerge.cli import main
from evomerge.errors import ModelError
from evomerge.merging.adapters import live_modules
from evomerge.merging.adapters.lora import add_to_convolution, add_to_experts, add_transposed
from evomerge.merging.build import build_model
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.live import LiveModel
from evomerge.recipe import task_arithmetic_recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import architectures
import tiny_models

pytestmark = pytest.mark.filterwarnings("ignore")
PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
ALL = {"target_modules": "all-linear"}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

CASES = {
    "gpt2: transposed": ("gpt2", ALL | {"use_rslora": True}),
    "gpt2: a square matrix": ("gpt2", {"target_modules": ["attn.c_proj"]}),
    "gpt2: dora": ("gpt2", {"target_modules": ["c_attn", "c_proj", "wte"], "use_dora": True}),
    "gpt2: biases": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}),
    "gpt2: all biases": ("gpt2", {"target_modules": ["c_fc"], "bias": "all"}),
    "gpt2: fan_in_fan_out": ("gpt2", {"target_modules": ["c_fc"], "fan_in_fan_out": True}),
    "gpt2: patterns": (
        "gpt2",
        ALL
        | {
            "rank_pattern": {"c_proj": 2, "h.1.attn.c_attn": 3},
            "alpha_pattern": {r".*\.2\.mlp\.c_fc": 11},
        },
    ),
    "gpt2: layers": (
        "gpt2",
        {"target_modules": ["c_attn"], "layers_to_transform": [1, 3], "layers_pattern": "h"},
    ),
    "gpt2: tokens": ("gpt2", {"target_modules": ["c_fc"], "trainable_token_indices": [3, 9]}),
    "gpt2: saved": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["ln_f", "h.1.mlp"]}),
    "gpt2: an untied head": ("gpt2", {"target_modules": ["c_fc"], "modules_to_save": ["lm_head"]}),
    "gpt2: tied embeddings that peft does not know": (
        "gpt2",
        {"target_modules": ["c_fc"], "modules_to_save": ["wte"], "ensure_weight_tying": True},
    ),
    "gpt2: embeddings and head": ("gpt2", {"target_modules": ["wte", "lm_head"]}),
    "gpt2: parameters": (
        "gpt2",
        {
            "target_modules": [],
            "target_parameters": ["c_attn.weight"],
            "rank_pattern": {"c_attn": 2},
        },
    ),
    "gpt_neox": ("gpt_neox", ALL | {"lora_bias": True}),
    "gpt_neox: biases of what is saved": (
        "gpt_neox",
        {"target_modules": ["dense"], "bias": "all", "modules_to_save": ["final_layer_norm"]},
    ),
    "gpt_neox: head": ("gpt_neox", {"target_modules": ["embed_in", "embed_out"]}),
    "opt": ("opt", ALL | {"exclude_modules": ["decoder.layers.0.fc1"]}),
    "bloom": ("bloom", ALL | {"modules_to_save": ["ln_f"]}),
    "phi": ("phi", ALL),
    "falcon": ("falcon", {"target_modules": r".*\.(query_key_value|dense)", "use_dora": True}),
    "mamba2": ("mamba2", {"target_modules": ["in_proj", "embeddings"]}),
    "gemma3 with vision": ("gemma3", ALL),
    "gemma3: text alone": (
        "gemma3",
        {
            "target_modules": ["q_proj", "down_proj"],
            "exclude_modules": r".*vision_tower.*",
            "layers_to_transform": [0, 2],
            "modules_to_save": ["multi_modal_projector", "lm_head"],
        },
    ),
    "gemma3: tokens": ("gemma3", {"target_modules": ["o_proj"], "trainable_token_indices": [3, 7]}),
    "gemma3: a convolution": ("gemma3", {"target_modules": ["patch_embedding", "v_proj"]}),
    "qwen3_vl: a convolution in time": (
        "qwen3_vl",
        {"target_modules": ["patch_embed.proj"], "lora_bias": True},
    ),
    "qwen3_moe: attention, router and experts": ("qwen3_moe", ALL),
    "qwen3_moe: experts alone": (
        "qwen3_moe",
        {
            "target_modules": [],
            "target_parameters": EXPERTS,
            "rank_pattern": {r"layers\.1\.mlp\.experts\.down_proj": 2},
            "use_rslora": True,
        },
    ),
    "qwen3_moe: saved experts": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "modules_to_save": ["layers.2.mlp"]},
    ),
    "mixtral: router": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["gate.weight"]},
    ),
    "mixtral": ("mixtral", ALL),
    "gpt_oss: attention": ("gpt_oss", ALL | {"modules_to_save": ["layers.1.mlp.router"]}),
    "gpt_oss: experts (in, out)": (
        "gpt_oss",
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
    "qwen3_next": ("qwen3_next", ALL),
    "lfm2": ("lfm2", ALL | {"bias": "lora_only"}),
    "granitemoe": (
        "granitemoe",
        {"target_modules": ["q_proj"], "target_parameters": ["input_linear.weight"]},
    ),
    "deepseek_v3: float32 within bfloat16": (
        "deepseek_v3",
        {"target_modules": ["q_a_proj"], "modules_to_save": ["layers.2.mlp.gate"]},
    ),
}


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """A type -> a tiny random model of it, with negative zeros, whose sign a sum of 0 loses."""
    made = {}

    def make(name):
        if name not in made:
            folder = made[name] = tmp_path_factory.mktemp(name) / "base"
            config = tiny_models.tiny_config(name)
            if name == "lfm2":
                config.layer_types = ["conv", "full_attention"] * 2
            tiny_models.make_tiny(config, folder, 0)
            tensors = load_all(folder)
            for tensor in tensors.values():
                tensor.view(-1)[::7] = -0.0
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return made[name]

    return make


def with_tensors(base, folder, rename, tensors=None):
    """A copy of the base with other names, or with other tensors."""
    folder.mkdir(parents=True)
    for file in base.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    stored = {rename(name): t for name, t in (tensors or load_all(base)).items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def renamed_adapter(adapter, rename):
    """The adapter with other names in its file, as transformers 4 had them."""
    file = Path(adapter) / WEIGHTS
    tensors = {rename(name): t for name, t in load_file(file).items()}
    assert tensors.keys() != load_file(file).keys()
    save_file(tensors, file)
    return adapter


@pytest.mark.parametrize("case", CASES)
def test_tensors_are_those_of_peft(base_of, tmp_path, case):
    name, config = CASES[case]
    base = base_of(name)
    adapter = peft_adapter(base, tmp_path / "adapter", **config)
    merged = tensors_of(open_model(f"{base}+{adapter}"))
    theirs = merge_with_peft(base, adapter, tmp_path / "merged")
    assert differing(merged, theirs) == []
    assert differing(load_all(base), theirs), "the adapter must change something"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe"])
def test_other_dtypes(base_of, tmp_path, name, dtype):
    tensors = {key: t.to(dtype) for key, t in load_all(base_of(name)).items()}
    base = with_tensors(base_of(name), tmp_path / "base", str, tensors)
    adapter = peft_adapter(base, tmp_path / "adapter", **ALL)
    merged = tensors_of(open_model(f"{base}+{adapter}"))
    assert differing(merged, merge_with_peft(base, adapter, tmp_path / "merged")) == []


def test_files_without_the_prefix_of_the_loaded_model(base_of, tmp_path):
    """As the hub's gpt2 has them."""
    adapter = peft_adapter(base_of("gpt2"), tmp_path / "adapter", **ALL)
    wanted = tensors_of(open_model(f"{base_of('gpt2')}+{adapter}"))

    def short(name):
        return name.removeprefix("transformer.")

    base = with_tensors(base_of("gpt2"), tmp_path / "base", short)
    merged = tensors_of(open_model(f"{base}+{adapter}"))
    assert differing(merged, {short(name): t for name, t in wanted.items()}) == []


def test_an_adapter_with_transformers_4_s_names(base_of, tmp_path):
    """peft renames its tensors as transformers renames the base's."""
    config = {"target_modules": r".*language_model.*\.(q_proj|down_proj)"}
    adapter = peft_adapter(base_of("gemma3"), tmp_path / "adapter", **config)
    wanted = tensors_of(open_model(f"{base_of('gemma3')}+{adapter}"))
    renamed_adapter(
        adapter, lambda name: name.replace("model.language_model.", "language_model.model.")
    )
    assert differing(tensors_of(open_model(f"{base_of('gemma3')}+{adapter}")), wanted) == []


def test_a_router_s_lora_of_transformers_4(base_of, tmp_path):
    """It was a module there, and is a tensor that peft targets by name now."""
    base = base_of("mixtral")
    adapter = peft_adapter(
        base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=["gate.weight"]
    )
    renamed_adapter(adapter, lambda name: name.replace(".mlp.gate.", ".block_sparse_moe.gate."))
    file = Path(adapter) / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"target_modules": ["q_proj", "gate"], "target_parameters": None}
    file.write_text(json.dumps(config), encoding="utf-8")
    merged = tensors_of(open_model(f"{base}+{adapter}"))
    assert differing(merged, merge_with_peft(base, adapter, tmp_path / "merged")) == []


EXPERTS_OF_4 = {
    "mixtral": ("block_sparse_moe.experts.{}.", {"w1": (64, 32), "w3": (64, 32), "w2": (32, 64)}),
    "qwen3_moe": (
        "mlp.experts.{}.",
        {"gate_proj": (16, 32), "up_proj": (16, 32), "down_proj": (32, 16)},
    ),
}


def adapter_of_4(name, folder, rank=4, **config):
    """A LoRA on every expert, as peft saved it with transformers 4; 4 layers of 4 experts."""
    folder.mkdir()
    before, modules = EXPERTS_OF_4[name]
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(4):
        for expert in range(4):
            for module, (rows, columns) in modules.items():
                place = f"{PREFIX}model.layers.{layer}.{before.format(expert)}{module}."
                for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                    drawn = 0.3 * torch.randn(shape, generator=generator)
                    tensors[f"{place}lora_{part}.weight"] = drawn
    save_file(tensors, folder / WEIGHTS)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": [*modules]}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("name", EXPERTS_OF_4)
def test_loras_on_single_experts_of_transformers_4(base_of, tmp_path, name, rank):
    """peft stacks them as transformers stacks the experts; the numbers are the same."""
    adapter = adapter_of_4(name, tmp_path / "adapter", rank)
    merged = tensors_of(open_model(f"{base_of(name)}+{adapter}"))
    assert differing(merged, merge_with_peft(base_of(name), adapter, tmp_path / "merged")) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "an expert, with `use_dora`.* Merge it with transformers 4 and peft"),
        ({"target_modules": ["q_proj"]}, "which its `target_modules` leave out"),
        ({"r": 8}, r"has shape \(4, 16\), .* give \(8, 16\)"),
    ],
)
def test_loras_on_single_experts_that_do_not_fit(base_of, tmp_path, config, message):
    adapter = adapter_of_4("qwen3_moe", tmp_path / "adapter", **config)
    with pytest.raises(ModelError, match=message):
        open_model(f"{base_of('qwen3_moe')}+{adapter}")


def test_an_adapter_that_peft_reads_only_in_part(base_of, tmp_path):
    """Renaming twice, peft loses a LoRA on Laguna's shared experts; the trained model has it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = base_of("laguna")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(str(base)), LoraConfig(**ALL))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = tensors_of(open_model(f"{base}+{tmp_path / 'adapter'}"))
    assert differing(merged, load_all(tmp_path / "merged")) == []


REFUSED = {
    "a convolution in groups": (
        "lfm2",
        "model.layers.0.conv.conv",
        {"target_modules": ["conv.conv"]},
        "a convolution in groups, which peft cannot merge either. Train it without that module.",
    ),
    "DoRA on a convolution": (
        "gemma3",
        "model.vision_tower.embeddings.patch_embedding",
        {"target_modules": ["patch_embedding"], "use_dora": True},
        "DoRA on a convolution is not supported. Merge it with peft first",
    ),
    "torch's attention": (
        "gemma3",
        "model.vision_tower.head.attention.base_layer.out_proj",
        {"target_modules": ["head.attention"]},
        "MultiheadAttention is not supported. Merge it with peft first",
    ),
    "another model's module": (
        "gpt2",
        "transformer.h.9.attn.c_attn",
        {"target_modules": ["c_attn"]},
        "which the base lacks. Use it with the model that it was trained on.",
    ),
    "an untransposed shape": (
        "gpt2",
        "transformer.h.0.attn.c_attn",
        {"target_modules": ["c_attn"]},
        r"lora_B.weight of .*c_attn has shape \(32, 4\), .* give \(96, 4\)",
    ),
    "a wrapped LoRA too many": (
        "qwen3_moe",
        "model.layers.0.mlp.experts.base_layer",
        {"target_modules": [], "target_parameters": ["experts.down_proj"]},
        "which its settings leave out. Correct adapter_config.json",
    ),
    "experts that are not targeted": (
        "qwen3_moe",
        "model.layers.0.mlp.experts",
        {"target_modules": ["q_proj"]},
        "which its settings leave out. Correct adapter_config.json",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(base_of, tmp_path, case):
    name, module, config, message = REFUSED[case]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6} | config
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    parts = {"lora_A.weight": torch.zeros(4, 32), "lora_B.weight": torch.zeros(32, 4)}
    save_file({f"{PREFIX}{module}.{part}": t for part, t in parts.items()}, adapter / WEIGHTS)
    with pytest.raises(ModelError, match=message) as error:
        open_model(f"{base_of(name)}+{adapter}")
    assert "\n" not in str(error.value)


def test_a_conversion_without_a_way_back_is_refused(base_of, tmp_path, monkeypatch):
    base = base_of("qwen3_moe")
    adapter = peft_adapter(base, tmp_path / "adapter", **ALL)

    def refuse(self):
        raise NotImplementedError

    monkeypatch.setattr(WeightConverter, "reverse_transform", refuse)
    with pytest.raises(ModelError, match=r"makes of .* and others\. Merge it with peft first"):
        open_model(f"{base}+{adapter}")


def test_the_command_writes_it(base_of, tmp_path):
    """Stacked experts and transposed weights are stored as the base's files have them."""
    for name in ("gpt2", "qwen3_moe"):
        base = base_of(name)
        adapter = peft_adapter(base, tmp_path / name / "adapter", **ALL)
        recipe = tmp_path / name / "recipe.yml"
        recipe.write_text(
            f"merge_method: linear\ndtype: bfloat16\n"
            f"models: [{{model: {base}+{adapter}, parameters: {{weight: 1}}}}]\n",
            encoding="utf-8",
        )
        assert main(["merge", str(recipe), str(tmp_path / name / "out")]) == 0
        wanted = tensors_of(open_model(f"{base}+{adapter}"))
        out = load_all(tmp_path / name / "out")
        assert out.keys() == wanted.keys()
        assert all(torch.equal(out[key], tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe"])
def test_a_live_merge_is_the_one_on_disk(base_of, tmp_path, name):
    base = str(base_of(name))
    ref = f"{base}+{peft_adapter(base, tmp_path / 'adapter', **ALL)}"
    slices, weights = [(0, 2), (2, 4)], [[0.7], [1.2]]
    recipe = task_arithmetic_recipe(base, [ref], slices, weights, dtype="bfloat16")
    build_model(recipe, tmp_path / "out")
    model, fresh = architectures.load(base), architectures.load(tmp_path / "out")
    LiveModel(model, open_model(base), [open_model(ref)]).apply(recipe)
    assert differing(model.state_dict(), fresh.state_dict()) == []


def test_names_like_llama_s_need_no_model(base_of, tmp_path, monkeypatch):
    adapter = peft_adapter(base_of("llama"), tmp_path / "adapter", **ALL)

    def refuse(config):
        raise AssertionError("a model was made")

    monkeypatch.setattr(live_modules, "empty_model", refuse)
    open_model(f"{base_of('llama')}+{adapter}")


def test_a_transposed_lora_by_its_formula():
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(n, generator=generator) for n in [(32, 96), (4, 32), (96, 4)])
    wanted = weight.double() + 1.5 * (b.double() @ a.double()).T
    torch.testing.assert_close(add_transposed(weight, a, b, 1.5), wanted.float())


@pytest.mark.parametrize("kernel", [(3,), (1, 1), (2, 3), (2, 1, 3)])
def test_a_lora_on_a_convolution_by_its_formula(kernel):
    generator = torch.Generator().manual_seed(0)
    weight, a = (torch.randn(n, 5, *kernel, generator=generator) for n in (6, 4))
    b = torch.randn(6, 4, generator=generator)
    wanted = weight + 1.5 * (b @ a.flatten(1)).view(weight.shape)
    found = add_to_convolution(weight, a, b.view(6, 4, *(1 for _ in kernel)), 1.5)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("is_in_out", [False, True])
def test_a_lora_on_experts_by_its_formula(is_in_out):
    """Rows of A belong to an expert together, columns of B by turns."""
    generator = torch.Generator().manual_seed(0)
    experts, rank, rows, columns = 3, 2, 5, 7
    a = torch.randn(experts * rank, columns, generator=generator)
    b = torch.randn(rows, rank * experts, generator=generator)
    weight = torch.randn(experts, rows, columns, generator=generator)
    wanted = weight.clone()
    for expert in range(experts):
        its_a = a[expert * rank : (expert + 1) * rank]
        wanted[expert] += 1.5 * (b[:, expert::experts] @ its_a)
    if is_in_out:
        weight, wanted = weight.mT, wanted.mT
    torch.testing.assert_close(add_to_experts(weight, a, b, 1.5, is_in_out), wanted)
