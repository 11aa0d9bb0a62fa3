"""merge, infer, demo: what needs no study."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.cli.options import (
    Commands,
    add_command,
    build,
    say_written,
    seed,
    shard_option,
    storage_option,
    storage_url,
)
from evomerge.console import Console, duration
from evomerge.errors import InputError

if TYPE_CHECKING:
    from evomerge.answering.engine import Engine
    from evomerge.inference.run import Renders
    from evomerge.tasks import Task


def model_commands(commands: Commands) -> None:
    """merge, infer, judge grade, demo: what needs no study."""
    p = add_command(
        commands,
        "merge",
        merge,
        "merge a mergekit YAML to a model folder",
        "evomerge merge best.yaml merged/\n  evomerge merge best.yaml merged/ --out-shard-size 2GB --random-seed 42",
    )
    p.add_argument("config", type=Path, metavar="CONFIG_YAML", help="a mergekit configuration; mergekit merges what evomerge does not know")
    p.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    shard_option(p)
    p.add_argument("--random-seed", type=seed, default=0, metavar="N", help="decides what DARE drops, as in mergekit (default: 0)")

    p = add_command(
        commands,
        "infer",
        infer,
        "answer tasks with a model, with a study's winner, or through a server",
        "evomerge infer --model merged/ --tasks tasks.jsonl --out answers.jsonl\n"
        "  evomerge infer --study demo --tasks tasks.jsonl --out answers.jsonl --knowledge base.xlsx\n"
        "  evomerge infer --server http://localhost:8000/v1 --model NAME --tasks tasks.jsonl --out answers.jsonl\n"
        "  evomerge infer --explain --tasks tasks.jsonl --knowledge base.xlsx",
    )
    p.add_argument("--model", metavar="DIR", help="a model folder or hub name; with --server, the server's name for it")
    p.add_argument("--study", metavar="NAME", help="a study: its winner is merged in place")
    p.add_argument(
        "--server",
        metavar="URL",
        help="an OpenAI-compatible server; a key is taken from OPENAI_API_KEY. --model may be left out if it has but one",
    )
    p.add_argument("--tasks", type=Path, required=True, metavar="FILE", help="JSON lines: task_id, input")
    p.add_argument("--out", type=Path, metavar="FILE", help="JSON lines: task_id, input, output")
    p.add_argument("--knowledge", type=Path, metavar="FILE", help="classes and examples: .xlsx, .yaml, .csv or a folder of CSVs")
    p.add_argument("--format", choices=["chat", "competition"], help="the prompt's format (default: the study's, or chat)")
    p.add_argument("--max-new-tokens", type=int, metavar="N", help="the longest answer (default: the study's, or 256)")
    p.add_argument("--batch-size", type=int, metavar="N", help="prompts answered at once (default: the study's, or 32)")
    p.add_argument("--concurrency", type=int, metavar="N", help="with --server: requests under way at once (default: 8)")
    p.add_argument("--explain", action="store_true", help="show each task's class and examples, without a model")
    p.add_argument("--json", action="store_true", help="with --explain: a JSON object a line")
    p.add_argument("--retriever", metavar="NAME", help="with --explain: tfidf (default), bm25, embeddings:MODEL, or several joined by +")
    storage_option(p)

    p = add_command(commands, "demo", demo, "build the tiny pair and its tasks", "evomerge demo demo/")
    p.add_argument("out", type=Path, metavar="DIR")


def merge(args: argparse.Namespace) -> None:
    """A YAML file to a model folder: by mergekit, when that is installed, where evomerge does not know the method."""
    from evomerge.errors import UnsupportedRecipe
    from evomerge.merging.elsewhere import is_installed, merge_with_mergekit
    from evomerge.recipe import read_recipe

    try:
        recipe = read_recipe(args.config)
        build(recipe, args.out, args.out_shard_size, args.config.read_text(encoding="utf-8"), args.random_seed)
    except UnsupportedRecipe as error:  # found before anything is written
        if not is_installed():
            raise
        console = Console()
        found = "" if error.found is None else f" ({error.found})"
        console.say(f"{error.where or args.config}: {error.what}{found} here; mergekit merges it")
        merge_with_mergekit(args.config, args.out, args.out_shard_size, args.random_seed, console.status)
        say_written(console, [args.out])


def infer(args: argparse.Namespace) -> None:
    """Answer a task file."""
    from evomerge.inference import run_inference
    from evomerge.knowledge.base import read_knowledge

    if args.explain:  # other options may stand: one adds --explain to a command to see what it would do
        from evomerge.cli.explaining import explain

        explain(args)
        return
    _check_infer(args)
    tasks = _inference_tasks(args.tasks)
    knowledge = read_knowledge(args.knowledge) if args.knowledge is not None else None
    engine, prompter, identity = _inference_engine(args)
    console = Console()
    run_inference(engine, prompter, tasks, args.out, knowledge, _answered(console), model=identity)
    say_written(console, [args.out])


def demo(args: argparse.Namespace) -> None:
    from evomerge.demo import build_demo

    console = Console()
    build_demo(args.out, progress=console.status)
    console.say(f"the demo pair and its tasks are in {args.out}")


def _check_infer(args: argparse.Namespace) -> None:
    """Raise InputError for options that do not go together."""
    for option in ("json", "retriever"):
        if getattr(args, option):
            raise InputError("is for --explain", where=f"--{option}", remedy="Add --explain, or leave it out.")
    if args.out is None:
        raise InputError("where do the answers go?", where="evomerge infer", remedy="Name a file with --out.")
    if args.server is None and (args.model is None) == (args.study is None):
        raise InputError("who answers is not clear", where="evomerge infer", remedy="Give one of --model, --study and --server.")
    if args.server is not None and args.study is not None:
        raise InputError("--study merges in place, a server does not", where="--server", remedy="Leave one of the two out.")
    if args.server is not None and args.batch_size is not None:
        raise InputError("a server makes its own batches", where="--batch-size", remedy="Use --concurrency.")
    if args.server is None and args.concurrency is not None:
        raise InputError("is for a server", where="--concurrency", remedy="Use --batch-size.")
    for option in ("concurrency", "max_new_tokens", "batch_size"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise InputError("must be 1 or more", where=f"--{option.replace('_', '-')}", found=value)


def _inference_engine(args: argparse.Namespace) -> tuple[Engine, Renders, str]:
    """Engine, prompts, and what the answers depend on."""
    overrides = {key: getattr(args, key) for key in ("format", "max_new_tokens", "batch_size") if getattr(args, key) is not None}
    if args.server is not None:
        from evomerge.answering.server import CONCURRENCY, open_server
        from evomerge.study import GenerationSection, PromptSection

        generation = GenerationSection(max_new_tokens=overrides.get("max_new_tokens", GenerationSection.max_new_tokens))
        prompt = PromptSection(format=overrides.get("format", "chat"))
        return open_server(args.server, args.model, generation, prompt, args.concurrency or CONCURRENCY)
    from evomerge.search.inferring import model_engine, study_engine

    if args.study is not None:
        return study_engine(storage_url(args.storage, args.study), args.study, overrides)
    return model_engine(args.model, overrides)


def _inference_tasks(path: Path) -> tuple[Task, ...]:
    from evomerge.tasks import load_tasks

    if not path.is_file():
        raise InputError("no such task file", where=path, remedy="Name a file of JSON lines: task_id, input.")
    return load_tasks(path)


def _answered(console: Console) -> Callable[[int, int], None]:
    began = time.monotonic()
    first: list[int] = []

    def progress(done: int, total: int) -> None:
        if not first:
            first.append(done)  # what an earlier run had answered says nothing about the pace
        fresh = done - first[0]
        eta = f"  ETA {duration((time.monotonic() - began) / fresh * (total - done))}" if fresh else ""
        console.status(f"answered {done}/{total}{eta}")

    return progress
