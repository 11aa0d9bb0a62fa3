"""Tokens per second of the vLLM engine over those of the transformers engine. The last line is one
JSON object.

vllm_vs_hf: 32 prompts of 8 to 48 tokens, 64 new tokens each, on a random Llama of 20 M parameters
in bfloat16 (--dtype), on a GPU if there is one. Each engine has a process of its own, by turns;
null where vLLM is not installed. The seconds that a candidate's weights take, merged and handed
over, are printed beside it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPTS, NEW, ROUNDS, TURNS = 32, 64, 3, 2
VOCABULARY, HIDDEN, FFN, LAYERS, HEADS = 8192, 384, 1024, 8, 6
KINDS = ("transformers", "vllm")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--graphs", action="store_true", help="vLLM with compiled graphs instead of enforce_eager"
    )
    # an engine's kind and the folder of the pair
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], Path(args.child[1]), args.dtype, not args.graphs)
        return
    figure = None
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed: `make test-vllm` measures it")
    else:
        with tempfile.TemporaryDirectory(prefix="evomerge-bench-") as folder:
            make_pair(Path(folder))
            figure = compare([__file__, *sys.argv[1:], "--child"], folder)
    print(json.dumps({"vllm_vs_hf": figure}))


def compare(command: list[str], folder: str) -> float:
    """The ratio of the medians."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(TURNS):
        for kind in KINDS:
            run = subprocess.run(
                [sys.executable, *command, kind, folder],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            found[kind].append(json.loads(run.stdout.splitlines()[-1]))
    for kind, runs in found.items():
        figures = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        print(
            f"{kind}: {figures['rate']:.0f} tokens/s, a candidate's weights in "
            f"{figures['apply']:.3f} s, loaded in {figures['load']:.0f}"
        )
    ours, theirs = (
        statistics.median(run["rate"] for run in found[kind]) for kind in reversed(KINDS)
    )
    return round(ours / theirs, 2)


def child(kind: str, folder: Path, dtype: str, eager: bool) -> None:
    """Print one engine's figures: tokens per second, seconds to load and to apply a recipe."""
    from evomerge.answering.engine import EngineSpec
    from evomerge.answering.make_engine import make_engine
    from evomerge.merging.checkpoints.open_model import open_model
    from evomerge.recipe import task_arithmetic_recipe
    from evomerge.study import EngineSection, GenerationSection, VllmSection

    section = EngineSection(
        kind="vllm" if kind == "vllm" else "transformers",
        batch_size=PROMPTS,
        vllm=VllmSection(enforce_eager=eager),
    )
    base, sibling = open_model(str(folder / "base")), open_model(str(folder / "sibling"))
    began = time.perf_counter()
    generation = GenerationSection(max_new_tokens=NEW)
    engine = make_engine(EngineSpec(base, [sibling], section, generation, dtype))
    load = time.perf_counter() - began
    rng = random.Random(0)
    applied, rates = [], []
    for i in range(1 + ROUNDS):  # the first is a warm-up
        prompts = [
            " ".join(f"t{rng.randrange(VOCABULARY)}" for _ in range(rng.randint(8, 48)))
            for _ in range(PROMPTS)
        ]
        began = time.perf_counter()
        engine.apply(
            task_arithmetic_recipe(
                base.ref, [sibling.ref], [(0, LAYERS)], [[0.5 + 0.1 * i]], dtype=dtype
            )
        )
        applied.append(time.perf_counter() - began)
        began = time.perf_counter()
        tokens = sum(
            answer.tokens
            for batch in engine.batches(prompts)
            for answer in engine.answer([prompts[j] for j in batch])
        )
        rates.append(tokens / (time.perf_counter() - began))
    print(
        json.dumps(
            {
                "rate": statistics.median(rates[1:]),
                "apply": statistics.median(applied[1:]),
                "load": load,
            }
        )
    )


def make_pair(folder: Path) -> None:
    """base/ and sibling/: random Llamas, and a tokenizer whose words are t0, t1, …"""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    backend = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="t0", eos_token="t1", bos_token="t2"
    )
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    for seed, name in enumerate(("base", "sibling")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


if __name__ == "__main__":
    main()
