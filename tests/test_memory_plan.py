"""What fits a GPU: tables worked out by hand, what `check --gpu` says, and where models wait."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import LlamaConfig

import evomerge
from evomerge.cli import main
from evomerge.errors import InputError
from evomerge.merging import placement
from evomerge.merging.memory_plan import batch_cache_bytes, largest_batch, plan_memory

GB = 1e9
# live model, keys and values of 32 x 1,024 tokens, base and one sibling: GB in bfloat16; the live
# model of 70 B in 4 bits (4.2 GB of embeddings and head, 68.4 B numbers of 4.5 bits)
MODELS = {
    "1B": (2.472, 1.074, 4.944),
    "8B": (16.06, 4.295, 32.12),
    "13B": (27.42, 26.84, 54.83),
    "70B": (42.71, 10.74, 282.2),
}
GPUS = {"H200": 141, "H100": 80, "A100": 40, "L4": 24}
# (base and siblings on the device, too small by), GB. Free is what the GPU has less .6 of CUDA and
# the live model; models get .6 of that, or .95 of it less keys and values. 13 B on an H100:
# 80 - .6 - 27.42 = 51.98; .6 of it 31.19; .95 of it 49.38, less 26.84 = 22.54.
WANTED = {
    ("1B", "H200"): (4.944, 0),
    ("1B", "H100"): (4.944, 0),
    ("1B", "A100"): (4.944, 0),
    ("1B", "L4"): (4.944, 0),
    ("8B", "H200"): (32.12, 0),
    ("8B", "H100"): (32.12, 0),
    ("8B", "A100"): (14.00, 0),
    ("8B", "L4"): (2.678, 0),
    ("13B", "H200"): (54.83, 0),
    ("13B", "H100"): (22.54, 0),
    ("13B", "A100"): (0, 15.46),
    ("13B", "L4"): (0, 30.86),
    ("70B", "H200"): (58.61, 0),
    ("70B", "H100"): (22.01, 0),
    ("70B", "A100"): (0, 14.05),
    ("70B", "L4"): (0, 30.05),
}
LLM_JP_13B = LlamaConfig(
    vocab_size=99584,
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=40,
    max_position_embeddings=4096,
)


@pytest.mark.parametrize(("model", "gpu"), WANTED)
def test_plans_are_those_worked_out_by_hand(model, gpu):
    live, cache, models = MODELS[model]
    plan = plan_memory(GPUS[gpu] * GB, live * GB, cache * GB, models * GB)
    found = plan.on_device / GB, plan.short / GB
    assert found == pytest.approx(WANTED[model, gpu], abs=0.01)


def test_the_largest_batch_fits_and_one_more_does_not():
    """13 B on 40 GB: .839 GB an answer, 11.98 GB free, 11.38 of it for them."""
    one = batch_cache_bytes(LLM_JP_13B.to_dict(), 1, 512, 2)
    assert one == 2 * 40 * 5120 * 2 * 1024
    rows = largest_batch(40 * GB, 27.42 * GB, one)
    assert rows == 13
    assert not plan_memory(40 * GB, 27.42 * GB, rows * one, 0).short
    assert plan_memory(40 * GB, 27.42 * GB, (rows + 1) * one, 0).short
    assert largest_batch(24 * GB, 27.42 * GB, one) == 0


def test_a_limit_on_tokens_is_a_limit_on_the_cache():
    config = LLM_JP_13B.to_dict()
    assert batch_cache_bytes(config, 32, 512, 2, 4096) == batch_cache_bytes(config, 4, 512, 2)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of models that are not here, and the base's config.json."""
    monkeypatch.chdir(tmp_path)
    LLM_JP_13B.save_pretrained(tmp_path)
    data = {
        "genome": {"base_model": "some/base", "models": ["some/one"]},
        "tasks": [{"file": "tasks.jsonl"}],
        "generation": {"max_new_tokens": 512},
    }
    rows = [
        json.dumps({"task_id": i, "input": f"1 + {i}?", "output": str(i + 1)}) for i in range(40)
    ]
    (tmp_path / "tasks.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    return tmp_path


def planned(study, gpus, **settings):
    """GPU -> (level, text)."""
    found = evomerge.check(
        study / "study.yaml", base_config=study / "config.json", gpus=gpus, overrides=settings
    )
    return {f.subject: (f.level, f.text) for f in found if f.subject.startswith("gpu")}


def test_check_compares_gpus(study):
    found = planned(study, ["24GB", "40GB", "80GB", "141GB"])
    assert [level for level, _ in found.values()] == ["wrong", "low", "ok", "ok"]
    assert "27.4 GB live, about 26.8 GB of keys and values (32 answers)" in found["gpu 80.0 GB"][1]
    assert "22.5 GB of 54.8 GB of base and siblings" in found["gpu 80.0 GB"][1]
    assert "base and siblings too (54.8 GB)" in found["gpu 141.0 GB"][1]
    assert "too small by 15.5 GB" in found["gpu 40.0 GB"][1]
    # 1.02 B numbers of embeddings and head x 2 bytes + 12.69 B x 4.5 bits = 9.2 GB
    assert found["gpu 40.0 GB"][1].partition("Set ")[2] == (
        "engine.batch_size: 13, or engine.quantization: 4bit (9.2 GB live), or "
        "engine.device_map: auto on 2 such GPUs."
    )
    # no batch alone helps a GPU that cannot hold the live model; in 4 bits .95 x 14.2 GB are left
    assert found["gpu 24.0 GB"][1].partition("Set ")[2] == (
        "engine.quantization: 4bit (9.2 GB live) with batch_size: 16, or "
        "engine.device_map: auto on 3 such GPUs."
    )


@pytest.mark.parametrize(
    ("gpu", "settings"),
    [
        ("40GB", {"engine.batch_size": 13}),
        ("40GB", {"engine.quantization": "4bit"}),
        ("24GB", {"engine.quantization": "4bit", "engine.batch_size": 16}),
    ],
)
def test_what_check_advises_fits(study, gpu, settings):
    ((level, _),) = planned(study, gpu, **settings).values()
    assert level == "ok"
    more = settings | {"engine.batch_size": settings.get("engine.batch_size", 35) + 1}
    ((level, _),) = planned(study, gpu, **more).values()
    assert level == "low"


def test_of_vllm(study):
    """It merges in host memory, and runs as many answers as it has room for."""
    found = planned(study, ["24GB", "40GB"], **{"engine.kind": "vllm"})
    assert found["gpu 40.0 GB"] == (
        "ok",
        "27.4 GB live, about 838.9 MB of keys and values (1 answer); base and siblings in host "
        "memory",
    )
    level, text = found["gpu 24.0 GB"]
    assert level == "wrong"
    assert text.endswith("Set engine.vllm.tensor_parallel_size: 2 on 2 such GPUs.")


def test_on_the_command_line(study, capsys):
    arguments = ["check", "study.yaml", "--base-config", "config.json", "--gpu", "80GB"]
    main([*arguments, "--gpu", "24 GB"])
    out = capsys.readouterr().out
    assert "ok      gpu 80.0 GB: " in out
    assert "wrong   gpu 24.0 GB: too small by 30.9 GB" in out


@pytest.mark.parametrize("text", ["24", "huge", "-1GB", ""])
def test_no_memory_of_a_gpu(study, text):
    with pytest.raises(InputError, match="--gpu: is not the memory of a GPU"):
        planned(study, [text])
    assert main(["check", "study.yaml", f"--gpu={text}"]) == 2


def test_a_gpu_keeps_room_for_keys_and_values(monkeypatch):
    """Ten tensors of base and sibling, 4,000 bytes each; 50,000 are free on the GPU."""
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    slots = {
        f"model.layers.{i}.w": placement.LiveParameter(gpu, torch.bfloat16, 1000) for i in range(10)
    }
    free = {gpu: 50_000, cpu: 1_000_000}
    monkeypatch.setattr(placement, "free_bytes", lambda device: free[device])
    nowhere = SimpleNamespace()

    def on_gpu(cache):
        places = placement.Resident(nowhere, [nowhere], slots, cache=cache).places
        return list(places.values()).count("device")

    assert on_gpu(0) == 7  # .6 of what is free
    assert on_gpu(17_500) == 7  # 47,500 - 17,500 = 30,000
    assert on_gpu(27_500) == 5
    assert on_gpu(60_000) == 0
