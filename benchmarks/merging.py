"""How fast models are merged, in place and to disk, as ratios within one run. The last line is one
JSON object.

live_vs_copy: bytes per second of `LiveModel.apply` (reads base and delta, writes live) over those
of Tensor.copy_ on the same tensors. live_vs_naive: its speed over `live.copy_(base + weight *
delta)`. moe_live_vs_copy: live_vs_copy for a mixture of experts, whose files have each expert's
tensors and whose live model has them stacked. All on the CPU, every weight changed.
build_vs_floor: time of `evomerge merge` after its imports over that of a plain script, `floor`
below, which checks nothing.
build_vs_mergekit: time of the whole process of mergekit-yaml over that of `evomerge merge`; null
where mergekit is absent.
build_peak_mb_over_import: the most memory of a build beyond that of its imports. Counted are
RssAnon and RssShmem of /proc/self/status, read every 2 ms: pages of the mapped models, which the
system can drop at any time, are RssFile.

The models are llama-shaped, bf16, 420 M parameters, in a temporary folder (TMPDIR), and in the page
cache when they are merged. `--deep` also prints the peak for three times the layers; `--peaks` for
the methods that need whole tensors.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import evomerge.merging.build  # noqa: F401
from evomerge.cli import main as evomerge_main
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.live import LiveModel
from evomerge.recipe import Recipe

ROUNDS = 5
# a layer of llm-jp-3-13b, and a small vocabulary
LAYERS, HIDDEN, FFN, VOCAB = 1, 5120, 13_824, 10_000
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
WEIGHT = 0.7310585786300049
MERGEKIT_PYTHON = os.environ.get("EVOMERGE_MERGEKIT_PYTHON")
Seconds = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--deep", action="store_true", help="also the peak for a model with three times the layers"
    )
    parser.add_argument("--peaks", action="store_true", help="also the peaks of all methods")
    # what a process of its own does
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        {"ours": ours, "floor": floor, "peak": peak}[args.child[0]](*map(Path, args.child[1:]))
        return
    with tempfile.TemporaryDirectory(prefix="evomerge-bench-") as folder:
        recipe = make_pair(Path(folder), LAYERS)
        figures = live_figures(Path(folder)) | build_figures(recipe)
        figures |= moe_figures(Path(folder) / "moe")
        if args.deep:
            print(
                f"{3 * LAYERS} layers: "
                f"{peak_mb(make_pair(Path(folder) / 'deep', 3 * LAYERS)):.0f} MB over the "
                "imports"
            )
        if args.peaks:
            print_peaks(Path(folder))
    print(json.dumps(figures))


def live_figures(folder: Path) -> dict[str, float | None]:
    """live_vs_copy and live_vs_naive."""
    models = [open_model(str(folder / name)) for name in ("base", "one")]
    names = sorted(models[0].keys)
    parameters = {
        name: torch.nn.Parameter(models[0].get_tensor(name).clone(), requires_grad=False)
        for name in names
    }
    live = LiveModel(
        cast(torch.nn.Module, SimpleNamespace(named_parameters=parameters.items)),
        models[0],
        [models[1]],
        residency="device",
    )
    kept = dict(live.resident.stream(names, deltas=True))
    weights = itertools.count(1)

    def in_place() -> None:
        live.apply(recipe_of(folder, next(weights) / 16))

    def copy() -> None:
        for name, out in parameters.items():
            out.copy_(kept[name].base)

    def naive() -> None:
        for name, out in parameters.items():
            out.copy_(kept[name].base + WEIGHT * kept[name].others[0])

    fast, plain, slow = medians([timed(in_place), timed(copy), timed(naive)])
    numbers = sum(p.numel() for p in parameters.values())
    print(
        f"{numbers / 1e6:.0f} M parameters: in place {fast:.3f} s, copy {plain:.3f} s, with "
        f"temporaries {slow:.3f} s"
    )
    return {
        "live_vs_copy": round((3 / fast) / (2 / plain), 3),
        "live_vs_naive": round(slow / fast, 2),
    }


def moe_figures(folder: Path) -> dict[str, float | None]:
    """moe_live_vs_copy: three layers of Qwen3-MoE's kind, 64 experts each, 464 M parameters."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    make: Any = Qwen3MoeConfig  # typed without some of its fields
    config = make(
        hidden_size=1024,
        moe_intermediate_size=768,
        intermediate_size=768,
        num_hidden_layers=3,
        num_experts=64,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        vocab_size=1024,
    )
    for name in ("base", "one"):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        made.save_pretrained(folder / name)
    models = [open_model(str(folder / name)) for name in ("base", "one")]
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    live = LiveModel(model, models[0], [models[1]], residency="device")
    kept = dict(live.resident.stream(live.names, deltas=True))
    weights = itertools.count(1)

    def in_place() -> None:
        live.apply(recipe_of(folder, next(weights) / 16))

    def copy() -> None:
        for name in live.names:
            live.live[name].data.copy_(kept[name].base)

    fast, plain = medians([timed(in_place), timed(copy)])
    print(f"mixture of experts: in place {fast:.3f} s, copy {plain:.3f} s")
    return {"moe_live_vs_copy": round((3 / fast) / (2 / plain), 3)}


def build_figures(recipe: Path) -> dict[str, float | None]:
    """build_vs_floor, build_vs_mergekit and build_peak_mb_over_import."""
    fast, plain = medians(
        [lambda: float(child("ours", recipe)), lambda: float(child("floor", recipe))]
    )
    print(f"to disk, without imports: evomerge {fast:.2f} s, plain script {plain:.2f} s")
    figures: dict[str, float | None] = {
        "build_vs_floor": round(fast / plain, 3),
        "build_vs_mergekit": None,
    }
    script = shutil.which("mergekit-yaml")
    if MERGEKIT_PYTHON or script:
        theirs = (
            [MERGEKIT_PYTHON, "-m", "mergekit.scripts.run_yaml"]
            if MERGEKIT_PYTHON
            else [str(script)]
        )
        commands = [[sys.executable, "-m", "evomerge", "merge"], theirs]
        fast, slow = medians([process(command, recipe) for command in commands])
        print(f"to disk, whole process: evomerge {fast:.2f} s, mergekit {slow:.2f} s")
        figures["build_vs_mergekit"] = round(slow / fast, 2)
    return figures | {"build_peak_mb_over_import": round(peak_mb(recipe), 1)}


def print_peaks(folder: Path) -> None:
    """Peaks of the methods that need whole tensors, also in units of the largest tensor."""
    largest = max(VOCAB, FFN) * HIDDEN * 2 / 1e6
    for method in ("linear", "slerp", "dare_linear", "dare_ties", "ties"):
        recipe = write_recipe(folder, method)
        print(
            f"{method}: {(peak := peak_mb(recipe)):.0f} MB over the imports, "
            f"{peak / largest:.1f} largest tensors"
        )


def medians(works: list[Seconds]) -> list[float]:
    """Seconds of each, a few rounds by turns after a warm-up: a busy machine then slows all of
    them.
    """
    rounds = [[work() for work in works] for _ in range(ROUNDS + 1)]
    return [statistics.median(times[1:]) for times in zip(*rounds, strict=True)]


def timed(work: Callable[[], object]) -> Seconds:
    def run() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return run


def process(command: list[str], recipe: Path) -> Seconds:
    """A whole process `command RECIPE OUT`, with no output folder and an idle disk."""

    def run() -> float:
        out = fresh(recipe)
        return timed(
            lambda: subprocess.run(
                [*command, str(recipe), str(out)], check=True, capture_output=True
            )
        )()

    return run


def child(what: str, recipe: Path) -> str:
    """The last line that this script prints as `--child what`."""
    command = [sys.executable, __file__, "--child", what, str(recipe), str(fresh(recipe))]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[
        -1
    ]


def fresh(recipe: Path) -> Path:
    """An output path that does not exist, once nothing waits to be written."""
    out = recipe.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    return out


def peak_mb(recipe: Path) -> float:
    return float(child("peak", recipe))


def ours(recipe: Path, out: Path) -> None:
    """Print the seconds of `evomerge merge`, without the imports."""
    print(timed(lambda: evomerge_main(["merge", str(recipe), str(out)]))())


def floor(recipe: Path, out: Path) -> None:
    """Print the seconds of the plain script."""

    def work() -> None:
        out.mkdir()
        merged = {}
        weight = torch.tensor(WEIGHT, dtype=torch.bfloat16)
        paths = [recipe.parent / name / "model.safetensors" for name in ("base", "one")]
        with safe_open(paths[0], "pt") as base, safe_open(paths[1], "pt") as one:
            for name in base.keys():  # noqa: SIM118
                b = base.get_tensor(name)
                merged[name] = b + (one.get_tensor(name) - b) * weight
        save_file(merged, out / "model.safetensors", metadata={"format": "pt"})
        with (out / "model.safetensors").open("rb") as file:
            os.fsync(file.fileno())

    print(timed(work)())


def peak(recipe: Path, out: Path) -> None:
    """Print the peak megabytes of `evomerge merge` beyond those of its imports."""
    before, most, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    evomerge_main(["merge", str(recipe), str(out)])
    done.set()
    watcher.join()
    print((most - before) / 1000)


def resident() -> int:
    """Resident kilobytes that are not backed by a file."""
    fields = dict(
        line.split(":")
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    )
    return sum(int(fields[key].split()[0]) for key in ("RssAnon", "RssShmem"))


def make_pair(folder: Path, layers: int) -> Path:
    """A llama-shaped base and sibling of random numbers, and the recipe that merges them."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (VOCAB, HIDDEN),
        "lm_head": (VOCAB, HIDDEN),
        "model.norm": (HIDDEN,),
    }
    for i in range(layers):
        room = f"model.layers.{i}."
        shapes |= {f"{room}self_attn.{name}": (HIDDEN, HIDDEN) for name in ATTENTION}
        shapes |= {
            f"{room}mlp.gate_proj": (FFN, HIDDEN),
            f"{room}mlp.up_proj": (FFN, HIDDEN),
            f"{room}mlp.down_proj": (HIDDEN, FFN),
        }
        shapes |= {
            f"{room}input_layernorm": (HIDDEN,),
            f"{room}post_attention_layernorm": (HIDDEN,),
        }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": HIDDEN,
    }
    config |= {
        "intermediate_size": FFN,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": VOCAB,
        "torch_dtype": "bfloat16",
    }
    config |= {
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
    }
    for seed, name in enumerate(("base", "one")):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"{key}.weight": (0.02 * torch.randn(shape, generator=generator)).bfloat16()
            for key, shape in shapes.items()
        }
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    return write_recipe(folder, "task_arithmetic")


def write_recipe(folder: Path, method: str) -> Path:
    recipe = folder / f"{method}.yml"
    recipe.write_text(recipe_of(folder, WEIGHT, method).to_yaml(), encoding="utf-8")
    return recipe


def recipe_of(folder: Path, weight: float, method: str = "task_arithmetic") -> Recipe:
    parameters = {"weight": weight, "density": 0.5, "t": 0.3}
    data = {
        "base_model": str(folder / "base"),
        "merge_method": method,
        "dtype": "bfloat16",
        "parameters": parameters,
    }
    return Recipe.from_dict(
        data | {"models": [{"model": str(folder / name)} for name in ("base", "one")]}
    )


if __name__ == "__main__":
    main()
