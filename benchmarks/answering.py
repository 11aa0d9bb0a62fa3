"""How fast answers come, as ratios within one run on the CPU. The last line is one JSON object.

batched_vs_loop: tokens per second of the transformers engine over those of plain `generate`, a
prompt at a time; 32 prompts, 64 new tokens. engine_vs_generate: over one plain batched `generate`
of 64 prompts whose answers end after 4 to 128 tokens; the lengths are drawn once, and a rule on the
number of new tokens ends them, the same in both.
candidate_vs_mergekit_evolve: seconds per candidate (merge and answers) of mergekit-evolve's on-disk
mode over ours, same pair, 20 prompts, 64 new tokens. It is what its OnDiskMergeEvaluator does for
one genotype, in a process that has imported all, with lm-eval's batches set to 20 (mergekit's
default is 1); null unless EVOMERGE_MERGEKIT_EVOLVE_PYTHON names a Python with mergekit, lm_eval,
ray and cma (vLLM, which its helpers import, is not needed).
population_gain: see population.py; null where that is absent.

With one thread, seconds are the process's CPU seconds, so that other load does not count;
otherwise they are wall-clock seconds.

The models are Llamas of about 20 M random parameters with a tokenizer of one token per character,
in a temporary folder. `--model DIR` measures the first two on that model as well, in keys that end
in _model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
)
from transformers.utils import logging as transformers_logging

from evomerge.answering.engine import EngineSpec
from evomerge.answering.hf.decode import Hooks, decode
from evomerge.answering.hf.engine import TransformersEngine
from evomerge.answering.hf.sampling import SamplingParams
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.recipe import task_arithmetic_recipe
from evomerge.study import EngineSection, GenerationSection

LAYERS, HIDDEN, FFN, HEADS, ROUNDS = 24, 256, 640, 4, 3  # deep and narrow, as small models are
CHARACTERS = "".join(chr(ord("ぁ") + i) for i in range(80)) + "".join(
    chr(ord("一") + i) for i in range(1900)
)
SHORTEST, LONGEST = 4, 128  # tokens of the answers that end on their own
EVOLVE_PYTHON = os.environ.get("EVOMERGE_MERGEKIT_EVOLVE_PYTHON")
# What OnDiskMergeEvaluator.evaluate_genotype does, without its ray actor, which needs a GPU.
EVOLVE = """
import gc, statistics, sys, time
import lm_eval.tasks, torch, yaml
from mergekit.evo.config import EvolMergeConfiguration
from mergekit.evo.genome import ModelGenome
from mergekit.evo.helpers import evaluate_model, merge_model
from mergekit.evo import helpers
from mergekit.options import MergeOptions

# it would import vLLM, which is not used here
helpers.monkeypatch_lmeval_vllm = lambda: None
folder, rounds, clock = sys.argv[1], int(sys.argv[2]), getattr(time, sys.argv[3])
with open(f"{folder}/evolve.yaml") as file:
    config = EvolMergeConfiguration.model_validate(yaml.safe_load(file))
genome, times = ModelGenome(config.genome), []
manager = lm_eval.tasks.TaskManager(include_path=folder)
for i in range(rounds + 1):
    began = clock()
    gc.collect()
    vector = genome.initial_genotype() + i / 1000
    merged = merge_model(vector, genome, f"{folder}/merged", MergeOptions())
    how = dict(num_fewshot=None, limit=None, vllm=False, batch_size=20, task_manager=manager)
    how |= dict(apply_chat_template=False, model_kwargs={"device": "cpu"})
    evaluate_model(merged, config.tasks, **how)
    times.append(clock() - began)
print(statistics.median(times[1:]))
"""
Work = Callable[[], object]
Clock = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a model folder to measure as well")
    parser.add_argument(
        "--dtype",
        default="float32",
        help="dtype of the live model; float32 is faster on most CPUs",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # CPU seconds: a busy machine does not count
    clock = time.process_time if args.threads == 1 else time.perf_counter
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="evomerge-bench-") as name:
        folder = make_pair(Path(name))
        figures = answer_figures(folder / "base", args.dtype, clock)
        figures["candidate_vs_mergekit_evolve"] = candidate_figure(folder, clock)
        figures["population_gain"] = population_gain(args.threads)
        if args.model is not None:
            figures |= {
                f"{key}_model": value
                for key, value in answer_figures(args.model, args.dtype, clock).items()
            }
    print(json.dumps(figures))


def answer_figures(folder: Path, dtype: str, clock: Clock) -> dict[str, float | None]:
    """batched_vs_loop and engine_vs_generate."""
    engine = make_engine(folder, (), dtype, 64)
    parameters = sum(p.numel() for p in engine.model.parameters())
    rng = random.Random(0)
    prompts = make_prompts(rng, 64)
    lengths = [rng.randint(SHORTEST, LONGEST) for _ in prompts]
    half = prompts[:32]
    ours, loop = medians(
        clock,
        [lambda: engine.answer(half), lambda: [generate(engine, [prompt], 64) for prompt in half]],
    )
    print(
        f"{parameters / 1e6:.0f} M, {dtype}, 32 x 64 tokens: {2048 / ours:.0f} tokens/s, a "
        f"prompt at a time {2048 / loop:.0f}",
        flush=True,
    )
    ending, plain = medians(
        clock,
        [
            lambda: answer_until(engine, prompts, lengths),
            lambda: generate(engine, prompts, LONGEST, lengths),
        ],
    )
    total = sum(lengths)
    print(
        f"64 answers of {SHORTEST} to {LONGEST} tokens: {total / ending:.0f} tokens/s, plain "
        f"generate {total / plain:.0f}",
        flush=True,
    )
    return {
        "batched_vs_loop": round(loop / ours, 2),
        "engine_vs_generate": round(plain / ending, 2),
    }


def make_engine(
    folder: Path, siblings: Sequence[Path], dtype: str, new_tokens: int
) -> TransformersEngine:
    """An engine without end tokens, so that all engines do the same work."""
    section = EngineSection(device="cpu", batch_size=64)
    settings = GenerationSection(max_new_tokens=new_tokens)
    models = [open_model(str(sibling)) for sibling in siblings]
    spec = EngineSpec(open_model(str(folder)), models, section, settings, dtype)
    engine = TransformersEngine(spec)
    engine.executor.end_tokens = frozenset()
    return engine


def answer_until(
    engine: TransformersEngine, prompts: Sequence[str], lengths: Sequence[int]
) -> list[list[int]]:
    """The engine's loop on one batch, with a given length for each answer."""
    order = engine.batches(prompts)[0]
    hooks = Hooks(is_complete=lambda i, tokens: len(tokens) >= lengths[order[i]])
    outputs = decode(
        engine.model,
        engine.executor.encode([prompts[i] for i in order]),
        SamplingParams(LONGEST),
        hooks=hooks,
    )
    assert [len(output.tokens) for output in outputs] == [lengths[i] for i in order]
    return [output.tokens for output in outputs]


@torch.inference_mode()
def generate(
    engine: TransformersEngine, prompts: Sequence[str], new_tokens: int, lengths: Sequence[int] = ()
) -> torch.Tensor:
    """One call of transformers' `generate`; `lengths` end answers earlier."""
    inputs = engine.tokenizer(
        list(prompts), add_special_tokens=False, padding=True, return_tensors="pt"
    )
    width = inputs["input_ids"].shape[1]
    wanted = torch.tensor(lengths)
    stop = (
        StoppingCriteriaList([lambda ids, scores: ids.shape[1] - width >= wanted])
        if lengths
        else None
    )
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=engine.tokenizer.pad_token_id,
    )
    output: torch.Tensor = engine.model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        generation_config=config,
        stopping_criteria=stop,
    )
    assert output.shape[1] - width == (max(lengths) if lengths else new_tokens)
    return output


def candidate_figure(folder: Path, clock: Clock) -> float | None:
    """candidate_vs_mergekit_evolve."""
    if not EVOLVE_PYTHON:
        return None
    prompts = make_prompts(random.Random(1), 20)
    (folder / "tasks.jsonl").write_text(
        "".join(json.dumps({"input": p, "output": "あ"}) + "\n" for p in prompts), encoding="utf-8"
    )
    theirs = float(run_child(EVOLVE_PYTHON, folder, clock))
    engine = make_engine(folder / "base", [folder / "sibling"], "bfloat16", 64)
    weights = iter(range(1, 1000))

    def candidate() -> None:
        recipe = task_arithmetic_recipe(
            str(folder / "base"), [str(folder / "sibling")], [(0, LAYERS)], [[next(weights) / 1000]]
        )
        engine.apply(recipe)
        for batch in engine.batches(prompts):
            engine.answer([prompts[i] for i in batch])

    (ours,) = medians(clock, [candidate])
    print(
        f"a candidate with 20 prompts x 64 tokens: {ours:.2f} s, mergekit-evolve on disk "
        f"{theirs:.2f} s",
        flush=True,
    )
    return round(theirs / ours, 2)


def run_child(python: str, folder: Path, clock: Clock) -> str:
    """The last line that EVOLVE prints, run by another Python: seconds per candidate."""
    config = {
        "genome": {
            "base_model": str(folder / "base"),
            "models": [str(folder / "sibling")],
            "merge_method": "task_arithmetic",
            "layer_granularity": LAYERS,
        },
        "tasks": [{"name": "bench", "metric": "exact_match,none"}],
    }
    task = {
        "task": "bench",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "tasks.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{input}}",
        "doc_to_target": "{{output}}",
        "generation_kwargs": {"until": ["\x00"], "max_gen_toks": 64, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    (folder / "bench.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    (folder / "evolve.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    environment = os.environ | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "HF_HUB_OFFLINE": "1",
    }
    environment |= {"HF_DATASETS_CACHE": str(folder / "cache")}
    command = [python, "-c", EVOLVE, str(folder), str(ROUNDS), clock.__name__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"mergekit-evolve failed:\n{done.stderr[-2000:]}")
    return done.stdout.splitlines()[-1]


def population_gain(threads: int) -> float | None:
    """The figures of population.py, run as a script."""
    script = Path(__file__).with_name("population.py")
    if not script.is_file():
        return None
    command = [sys.executable, str(script), "--quick", "--threads", str(threads)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    print("\n".join(lines[:-1]), flush=True)
    return float(json.loads(lines[-1])["population_gain"])


def medians(clock: Clock, works: Sequence[Work]) -> list[float]:
    """Seconds of each, a few rounds by turns after a warm-up: a busy machine then slows all of
    them.
    """
    rounds = [[seconds(clock, work) for work in works] for _ in range(ROUNDS + 1)]
    return [statistics.median(times[1:]) for times in zip(*rounds, strict=True)]


def seconds(clock: Clock, work: Work) -> float:
    began = clock()
    work()
    return clock() - began


def make_prompts(rng: random.Random, count: int) -> list[str]:
    """Random kana, 20 to 60 characters."""
    return [
        "".join(rng.choice(CHARACTERS[:80]) for _ in range(rng.randint(20, 60)))
        for _ in range(count)
    ]


def make_pair(folder: Path) -> Path:
    """base/ and sibling/: Llamas of random numbers in bfloat16, 19.2 M parameters, with a
    tokenizer.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(CHARACTERS) + 3,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).bfloat16()
    tokenizer = make_tokenizer()
    for name in ("base", "sibling"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * torch.randn(p.shape))
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=1024,
    )


if __name__ == "__main__":
    main()
