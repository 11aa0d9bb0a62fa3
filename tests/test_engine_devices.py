"""Engines on several devices and in 4 bits; the reference is transformers' own load and `generate`,
one prompt at a time.

Several GPUs are there only where the tests find them. What can be shown without: accelerate's
placing with one device, and its hooks around modules (weights on disk), which move every argument
as they would between GPUs.
"""

import json
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from engine_contract import CONTEXT, NEW, PROMPTS, RECIPES, contract_family, recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from evomerge.answering.engine import EngineSpec
from evomerge.answering.hf import loading
from evomerge.answering.hf.engine import TransformersEngine
from evomerge.answering.make_engine import make_engine
from evomerge.answering.vllm import engine as vllm_engine
from evomerge.cli import main
from evomerge.errors import EngineError
from evomerge.merging.build import build_model
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.live import LiveModel
from evomerge.study import EngineSection, GenerationSection

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install 'evomerge[4bit]'",
)
needs_accelerate = pytest.mark.skipif(
    find_spec("accelerate") is None, reason="accelerate is not installed"
)
needs_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs here")
# Multiples of the block (64) and of what the CPU's fused kernel takes (32 rows).
SIZES = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16}
PARTS = (
    "model.embed_tokens",
    "model.rotary_emb",
    *(f"model.layers.{i}" for i in range(4)),
    "model.norm",
    "lm_head",
)
SECOND_LAYER_ON_DISK = {part: "disk" if part == "model.layers.1" else "cpu" for part in PARTS}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return contract_family(tmp_path_factory.mktemp("devices"), **SIZES)


def make(family, siblings=(), dtype="float32", model="base", device_map=None, **engine):
    folders = open_model(str(family / model)), [open_model(str(family / name)) for name in siblings]
    section = EngineSection(**({"device": "cpu", "batch_size": 1} | engine))
    # unchecked: a study file holds no map of modules
    section = section.model_copy(update={"device_map": device_map})
    generation = GenerationSection(max_new_tokens=NEW)
    return make_engine(EngineSpec(*folders, section, generation, dtype))


def texts_of(engine, prompts):
    return [answer.text for prompt in prompts for answer in engine.answer([prompt])]


def plain(folder, prompts, dtype=torch.float32, **load):
    """Texts by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **load).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
        )
        found.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def in_4_bits(folder, quantization):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=quantization == "4bit-double",
    )
    prompts = [
        prompt for prompt in PROMPTS if prompt and "\ud83d" not in prompt and "\udc00" not in prompt
    ]
    return prompts, plain(
        folder, prompts, torch.bfloat16, quantization_config=config, device_map={"": "cpu"}
    )


@needs_bitsandbytes
@pytest.mark.parametrize("quantization", ["4bit", "4bit-double"])
def test_a_model_in_4_bits_answers_as_it_lies_on_disk(family, quantization):
    prompts, wanted = in_4_bits(family / "one", quantization)
    engine = make(family, dtype="bfloat16", model="one", quantization=quantization)
    assert texts_of(engine, prompts) == wanted
    assert len(set(wanted)) > 4
    assert wanted != texts_of(make(family, dtype="bfloat16", model="one"), prompts), (
        "4 bits change nothing here"
    )
    batched = make(family, dtype="bfloat16", model="one", quantization=quantization, batch_size=4)
    sections = [GenerationSection(max_new_tokens=1 + i % 5) for i in range(len(prompts))]
    seen = []
    answers = batched.answer(prompts[:4], sections[:4], on_answer=lambda *of: seen.append(of))
    assert sorted(seen) == list(enumerate(answers))
    assert all(
        answer.tokens <= section.max_new_tokens
        for answer, section in zip(answers, sections, strict=False)
    )


@needs_bitsandbytes
def test_a_recipe_in_4_bits_answers_as_its_folder_does(family, tmp_path):
    merged = recipe(family, *RECIPES["task_arithmetic"][:1], dtype="bfloat16")
    engine = make(family, ("one", "two"), dtype="bfloat16", quantization="4bit")
    engine.apply(recipe(family, {"one": 1.9, "two": 0.1}, dtype="bfloat16"))
    texts_of(engine, PROMPTS[:2])
    engine.apply(merged)
    prompts, wanted = in_4_bits(build_model(merged, tmp_path / "merged"), "4bit")
    assert texts_of(engine, prompts) == wanted


@needs_bitsandbytes
def test_infer_in_4_bits(family, tmp_path):
    prompts, wanted = in_4_bits(family / "one", "4bit")
    rows = [{"task_id": i, "input": prompt} for i, prompt in enumerate(prompts)]
    (tmp_path / "tasks.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    command = [
        "infer",
        "--model",
        str(family / "one"),
        "--tasks",
        str(tmp_path / "tasks.jsonl"),
        "--out",
        str(tmp_path / "a.jsonl"),
    ]
    command += ["--quantization", "4bit", "--batch-size", "1", "--max-new-tokens", str(NEW)]
    command += [
        "--set",
        "prompt.format=template",
        "--set",
        'prompt.template="{input}"',
        "--set",
        "search.dtype=bfloat16",
    ]
    assert main([*command, "--set", "engine.device=cpu"]) == 0
    assert [
        json.loads(line)["output"]
        for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    ] == wanted


@needs_accelerate
@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential"])
def test_a_device_map_on_one_device_changes_nothing(family, device_map):
    spread = make(family, ("one", "two"), device="auto", device_map=device_map)
    usual = make(family, ("one", "two"), device="auto")
    for weights, top in RECIPES.values():
        for engine in (spread, usual):
            engine.apply(recipe(family, weights, **top))
        assert spread.answer(PROMPTS) == usual.answer(PROMPTS)


@needs_accelerate
def test_accelerates_hooks_around_modules_are_gone_through(family):
    """The map is none that a study file can hold; it stands for what `auto` makes where memory is
    short.
    """
    engine = make(family, device_map=SECOND_LAYER_ON_DISK, batch_size=8)
    assert engine.model.hf_device_map == SECOND_LAYER_ON_DISK
    assert {p.device.type for p in engine.model.model.layers[1].parameters()} == {"meta"}
    assert engine.answer(PROMPTS) == make(family, batch_size=8).answer(PROMPTS)
    assert engine.context == CONTEXT


def test_a_model_is_loaded_straight_to_its_device(family, monkeypatch):
    """The CPU's memory must not have to hold a model that is for a GPU."""
    folder, asked = open_model(str(family / "base")), []

    def load(folder, trusted, merged, settings):
        asked.append(settings["device_map"])
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(loading, "_load", load)
    with pytest.raises(EngineError, match="does not fit the device"):
        loading.load_model(folder, EngineSection(device="cuda:1"), torch.bfloat16)
    with pytest.raises(EngineError, match="does not fit"):
        loading.load_model(folder, EngineSection(device="cpu"), torch.bfloat16)
    assert asked == [{"": "cuda:1"}, None]


@needs_accelerate
def test_loading_straight_to_a_device_changes_nothing_else(family):
    """No hooks around the modules, which would keep parameters from being merged in place."""
    straight = make(family, device_map={"": "cpu"}).model
    before = make(family).model
    assert not [module for module in straight.modules() if hasattr(module, "_hf_hook")]
    wanted = before.state_dict()
    assert wanted.keys() == straight.state_dict().keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in straight.state_dict().items())


def test_attention_leaves_cudnn_out(family):
    """Its plans take as long as a step, and every step of an answer would make one."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cuda.enable_flash_sdp(False)
    make(family)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch.backends.cuda.math_sdp_enabled()


def test_vllm_leaves_merging_its_threads(family, monkeypatch):
    """vLLM takes all but one thread from torch when it loads, for its own sake."""
    merged, most = [], torch.get_num_threads()

    class OneThread:
        """Stands in for vLLM's LLM."""

        llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=CONTEXT))

        def __init__(self, *_):
            torch.set_num_threads(1)

        def collective_rpc(self, *_, **__):
            merged.append(torch.get_num_threads())

    apply = LiveModel.apply

    def watched(live, wanted):
        merged.append(torch.get_num_threads())
        apply(live, wanted)

    monkeypatch.setattr(
        vllm_engine.importlib.util, "find_spec", lambda name: name == "vllm" or find_spec(name)
    )
    monkeypatch.setattr(vllm_engine, "load_llm", OneThread)
    monkeypatch.setattr(LiveModel, "apply", watched)
    base, one = open_model(str(family / "base")), open_model(str(family / "one"))
    section = EngineSection(kind="vllm", threads=3)
    spec = EngineSpec(base, [one], section, GenerationSection(max_new_tokens=NEW), "float32")
    try:
        engine = vllm_engine.VllmEngine(spec)
        engine.apply(recipe(family, {"one": 0.5}))
        assert merged == [3, 1], "three to merge with, then vLLM's one"
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(most)


@needs_gpus
@pytest.mark.parametrize("quantization", [None, pytest.param("4bit", marks=needs_bitsandbytes)])
def test_two_gpus_answer_as_one(family, tmp_path, quantization):
    merged = recipe(family, *RECIPES["task_arithmetic"][:1])
    build_model(merged, tmp_path / "merged")
    engine = make(
        family,
        ("one", "two"),
        device="auto",
        device_map="balanced",
        quantization=quantization,
        batch_size=4,
    )
    assert isinstance(engine, TransformersEngine)
    assert len({p.device for p in engine.model.parameters()}) > 1
    engine.apply(merged)
    alone = make(tmp_path, model="merged", device="cuda", quantization=quantization, batch_size=4)
    assert engine.answer(PROMPTS) == alone.answer(PROMPTS)
