"""Final inference on the CPU, as ratios within one run. The last line is one JSON object.

tasks_vs_template: tasks a second of the whole runner (prompts, batches, answers on the disk as they
come, the final file) over those of the competition template's loop, a prompt at a time through
plain `generate`; 100 Japanese inputs of 20 to 200 tokens, 64 new tokens each, on the model of about
20 M parameters of answering.py, in bfloat16 as it lies on disk, which is what `infer` does;
tasks_vs_template_fp32: both in float32. `--model DIR` measures tasks_vs_template_model on that
model as well, in `--model-dtype` (bfloat16). classify_accuracy, classify_per_s: see classify.py.

With one thread, seconds are the process's CPU seconds, so that other load does not count;
otherwise they are wall-clock seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import answering
import classify
import torch
from transformers.utils import logging as transformers_logging

from evomerge.answering.engine import EngineSpec
from evomerge.answering.hf.engine import TransformersEngine
from evomerge.answering.prompts import Prompter
from evomerge.inference import run_inference
from evomerge.inference.opening import BATCH_SIZE
from evomerge.knowledge.chooser import Chooser
from evomerge.knowledge.read_base import read_knowledge
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.study import EngineSection, GenerationSection, PromptSection
from evomerge.tasks import Task

TASKS, SHORTEST, LONGEST, NEW_TOKENS = 100, 20, 200, 64
EVERY = 4  # the loop answers every fourth task, for it is slow; lengths do not depend on the place


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a model folder to measure as well")
    parser.add_argument("--model-dtype", default="bfloat16", help="dtype of that model")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers_logging.disable_progress_bar()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="evomerge-bench-") as name:
        folder = answering.make_pair(Path(name)) / "base"
        figures["tasks_vs_template"] = tasks_vs_template(
            folder, "bfloat16", args.threads, args.batch_size
        )
        figures["tasks_vs_template_fp32"] = tasks_vs_template(
            folder, "float32", args.threads, args.batch_size
        )
    if args.model is not None:
        figures["tasks_vs_template_model"] = tasks_vs_template(
            args.model, args.model_dtype, args.threads, args.batch_size
        )
    base, rows = read_knowledge(classify.BASE), classify.labelled()
    figures["classify_accuracy"] = classify.accuracy(Chooser(base), rows)["second"]
    texts = [f"{i}. {rows[i % len(rows)]['input']}" for i in range(2000)]
    figures["classify_per_s"] = round(classify.per_second(Chooser(classify.large(base)), texts))
    print(json.dumps(figures))


def tasks_vs_template(folder: Path, dtype: str, threads: int, batch_size: int) -> float:
    """The ratio of tasks per second: the loop once, ours before and after it."""
    clock = time.process_time if threads == 1 else time.perf_counter
    section = EngineSection(device="cpu", batch_size=batch_size)
    generation = GenerationSection(max_new_tokens=NEW_TOKENS)
    engine = TransformersEngine(EngineSpec(open_model(str(folder)), [], section, generation, dtype))
    # all answers have 64 tokens: the same work for both
    engine.executor.end_tokens = frozenset()
    tasks = [Task(i, text) for i, text in enumerate(inputs(engine))]
    prompter = Prompter(engine.tokenizer, PromptSection(format="competition"), generation)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as place:
            assert (
                run_inference(engine, prompter, tasks, Path(place) / "answers.jsonl").answered
                == TASKS
            )

    def template(some: Sequence[Task] = tasks[::EVERY]) -> None:
        for task in some:
            tokens = answering.generate(engine, [prompter.render(task.input)], NEW_TOKENS, ())
            engine.tokenizer.decode(tokens[0], skip_special_tokens=True)

    template(tasks[:4])  # warm
    ours()
    first, slow, second = (answering.seconds(clock, work) for work in (ours, template, ours))
    fast, slow = (first + second) / 2, slow * EVERY
    print(
        f"{folder.name}, {dtype}: {TASKS / fast:.1f} tasks/s, the template's loop "
        f"{TASKS / slow:.2f}",
        flush=True,
    )
    return round(slow / fast, 2)


def inputs(engine: TransformersEngine) -> list[str]:
    """Japanese texts of SHORTEST to LONGEST tokens, cut from the labelled tasks one behind the
    other.
    """
    rng = random.Random(0)
    whole = "".join(row["input"] for row in classify.labelled()) * 4
    found, at = [], 0
    for _ in range(TASKS):
        wanted = rng.randint(SHORTEST, LONGEST)
        text = whole[at : at + wanted]
        while len(engine.tokenizer(text, add_special_tokens=False)["input_ids"]) > wanted:
            text = text[: -max(1, len(text) // 20)]
        found.append(text)
        at += len(text)
    return found


if __name__ == "__main__":
    main()
