"""Weights in memory that another process reads as a file."""

import json
import subprocess
import sys

import pytest
import torch
from merging_tools import SLICES, differing, load_all, make_family
from safetensors import safe_open
from safetensors.torch import save_file

from evomerge.answering.vllm.host_weights import HostWeights, host_weights_of
from evomerge.errors import EngineError
from evomerge.merging.build import build_model
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.live import LiveModel
from evomerge.recipe import task_arithmetic_recipe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's")
READ = """
import json, sys
from safetensors import safe_open
with safe_open(sys.argv[1], "pt") as file:
    print(json.dumps({name: file.get_tensor(name).float().sum().item() for name in file.keys()}))
"""


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_merged_here_is_what_a_build_writes(tmp_path, tied, dtype):
    family = make_family(tmp_path, tied)
    base, one = open_model(str(family / "base")), open_model(str(family / "one"))
    weights = host_weights_of(base, getattr(torch, dtype))
    live = LiveModel(weights.module, base, [one])
    for weight in (0.3, 1.7):
        recipe = task_arithmetic_recipe(
            str(family / "base"),
            [str(family / "one")],
            SLICES,
            [[weight], [1.0], [0.0]],
            dtype=dtype,
        )
        live.apply(recipe)
    build_model(recipe, tmp_path / "built")
    assert not differing(load_all(weights.folder), load_all(tmp_path / "built"))
    weights.close()


def test_an_adapter_that_unties_the_head_is_refused(tmp_path):
    """vLLM would keep the embeddings in its place."""
    family = make_family(tmp_path, tied=True)
    shape = load_all(family / "base")["model.embed_tokens.weight"].shape
    (family / "lora").mkdir()
    settings = {"peft_type": "LORA", "target_modules": [], "modules_to_save": ["lm_head"]}
    (family / "lora/adapter_config.json").write_text(json.dumps(settings))
    tensors = {"base_model.model.lm_head.weight": torch.ones(shape)}
    save_file(tensors, family / "lora/adapter_model.safetensors")
    base = open_model(f"{family}/base+{family}/lora")
    with pytest.raises(EngineError, match="gives the head weights of its own"):
        host_weights_of(base, torch.bfloat16)


def test_another_process_sees_what_is_written_later():
    weights = HostWeights({"a.weight": (3, 5), "b": (7,), "c.0.bias": ()}, torch.bfloat16)
    path = weights.folder / "model.safetensors"
    for value in (1.0, 2.0):
        for parameter in weights.module.parameters():
            parameter.fill_(value)
        seen = json.loads(
            subprocess.run(
                [sys.executable, "-c", READ, path], capture_output=True, check=True, text=True
            ).stdout
        )
        assert seen == {"a.weight": 15 * value, "b": 7 * value, "c.0.bias": value}
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        shapes = {name: list(file.get_slice(name).get_shape()) for name in names}
    assert shapes == {"a.weight": [3, 5], "b": [7], "c.0.bias": []}


def test_nothing_is_left_behind():
    weights = HostWeights({"a": (3,)}, torch.float32)
    folder = weights.folder
    weights.close()
    assert not folder.exists()


def test_too_little_memory_is_one_line():
    with pytest.raises(EngineError, match=r"need 18446744073.7 GB of host memory"):
        HostWeights({"a": (1 << 22, 1 << 40)}, torch.float32)
