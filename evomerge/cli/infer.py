"""infer: answers to a task file."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.cli.options import Commands, add_command, say_written, seed, storage_option, storage_url
from evomerge.console import Console, duration, seconds
from evomerge.errors import InputError

if TYPE_CHECKING:
    from evomerge.inference.opening import Opened
    from evomerge.inference.run import Done, Refining
    from evomerge.judging.grade import Judge
    from evomerge.tasks import Task

EXAMPLES = """evomerge infer --study demo --tasks tasks.jsonl --out answers.jsonl --knowledge base.xlsx
  evomerge infer --model merged/ --tasks tasks.jsonl --out answers.jsonl --time-limit 55m
  evomerge infer --recipe best.yaml --tasks tasks.jsonl --out answers.jsonl --quantization 4bit
  evomerge infer --server http://localhost:8000/v1 --model NAME --tasks tasks.jsonl --out answers.jsonl
  evomerge infer --explain --tasks tasks.jsonl --knowledge base.xlsx"""
# option -> the key of a study file that it sets
KEYS = {
    "format": "prompt.format",
    "knowledge": "prompt.knowledge",
    "retriever": "prompt.retriever",
    "default_class": "prompt.default_class",
    "threshold": "prompt.threshold",
    "max_new_tokens": "generation.max_new_tokens",
    "batch_size": "engine.batch_size",
    "engine": "engine.kind",
    "quantization": "engine.quantization",
    "device_map": "engine.device_map",
    "seed": "search.seed",
}


def infer_command(commands: Commands) -> None:
    """infer."""
    p = add_command(commands, "infer", infer, "answer tasks with a model, a recipe, a study's winner, or through a server", EXAMPLES)
    who = p.add_argument_group("who answers")
    who.add_argument("--model", metavar="DIR", help="a model folder or hub name; with --server, the server's name for it")
    who.add_argument("--recipe", type=Path, metavar="YAML", help="a mergekit configuration, merged in place")
    who.add_argument("--study", metavar="NAME", help="a study: its winner is merged in place, and asked as in the search")
    who.add_argument("--server", metavar="URL", help="an OpenAI-compatible server; a key is taken from OPENAI_API_KEY")
    storage_option(who)
    files = p.add_argument_group("files")
    files.add_argument("--tasks", type=Path, required=True, metavar="FILE", help="JSON lines: task_id, input")
    files.add_argument("--out", type=Path, metavar="FILE", help="JSON lines: task_id, input, output")
    _knowledge_options(p)
    how = p.add_argument_group("how (default: as the study says)")
    how.add_argument("--format", choices=["chat", "competition"], help="the prompt's format (default: chat)")
    how.add_argument("--max-new-tokens", type=int, metavar="N", help="the longest answer of all, whatever a class says (default: 256)")
    how.add_argument("--engine", choices=["transformers", "vllm"], help="what runs the model (default: transformers)")
    how.add_argument("--quantization", choices=["4bit", "4bit-double"], help="the model in 4 bits (bitsandbytes)")
    how.add_argument("--device-map", metavar="MAP", help="auto: one model over several GPUs")
    how.add_argument("--batch-size", type=int, metavar="N", help="prompts answered at once (default: 64)")
    how.add_argument("--concurrency", type=int, metavar="N", help="with --server: requests under way at once (default: 8)")
    how.add_argument(
        "--self-check",
        nargs="?",
        const="all",
        metavar="FAULTS",
        help="answer again what is faulty: all, or some of empty,repetitive,language,cut",
    )
    how.add_argument("--best-of", type=int, metavar="N", help="answer N times and keep the best")
    how.add_argument("--judge", metavar="JUDGE", help="with --best-of: agreement (default), rules, learned:FILE, llm, or local:DIR")
    how.add_argument("--seed", type=seed, metavar="N", help="of draws, where answers are sampled")
    how.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any key of prompt, generation or engine, as in a study file"
    )
    how.add_argument(
        "--time-limit",
        metavar="TIME",
        help="90s, 55m, 2h: then the file is written, what is unfinished is marked; cheap tasks go first",
    )


def _knowledge_options(p: argparse.ArgumentParser) -> None:
    base = p.add_argument_group("knowledge base")
    base.add_argument("--knowledge", metavar="FILE", help="classes and examples: .xlsx, .yaml, .csv or a folder of CSVs")
    base.add_argument("--retriever", metavar="NAME", help="tfidf (default), bm25, embeddings:MODEL, or several joined by +")
    base.add_argument("--default-class", metavar="NAME", help="of tasks whose class is less sure than --threshold")
    base.add_argument("--threshold", type=float, metavar="SHARE", help="confidence from 0 to 1 (default: 0.35)")
    base.add_argument(
        "--classify",
        choices=["neighbours", "model", "both"],
        default="neighbours",
        help="by nearest examples (default), the model, or both",
    )
    base.add_argument("--explain", action="store_true", help="show each task's class and examples, without a model")
    base.add_argument("--json", action="store_true", help="with --explain: a JSON object a line")


def infer(args: argparse.Namespace) -> None:
    """Answer a task file."""
    if args.explain:  # other options may stand: one adds --explain to a command to see what it would do
        from evomerge.cli.explaining import explain

        explain(args)
        return
    limit = _check(args)
    began = time.monotonic()
    steps = _refine(args)
    from evomerge.answering.prompts import make_prompter
    from evomerge.inference import run_inference
    from evomerge.inference.best_of import BestOf
    from evomerge.inference.opening import open_chooser
    from evomerge.judging.choose import check_tasks

    console = Console()
    tasks = _tasks(args.tasks)
    opened = _open(args, console)
    _check_base(args, opened)
    chooser = open_chooser(opened, args.classify, console.say)
    prompter = make_prompter(
        opened.engine.tokenizer, opened.prompt, opened.study.generation, chooser, opened.engine.context, args.max_new_tokens
    )
    for step in steps:
        if isinstance(step, BestOf) and step.judge is not None:
            check_tasks(step.judge, tasks)
            if step.judge.name == "rules" and any(task.output for task in tasks):
                console.say("note: the rules choose by the tasks' own references: do not grade these answers by them")
    done = run_inference(
        opened.engine,
        prompter,
        tasks,
        args.out,
        _answered(console),
        model=opened.identity,
        deadline=None if limit is None else began + limit,
        refine=steps,
    )
    _report(console, args, done)


def _check(args: argparse.Namespace) -> float | None:
    """The time limit in seconds. Raises InputError for options that do not go together."""
    if args.json:
        raise InputError("is for --explain", where="--json", remedy="Add --explain, or leave it out.")
    if args.out is None:
        raise InputError("where do the answers go?", where="evomerge infer", remedy="Name a file with --out.")
    given = [option for option in ("model", "recipe", "study", "server") if getattr(args, option) is not None]
    if len(given) != 1 and sorted(given) != ["model", "server"]:
        raise InputError("who answers is not clear", where="evomerge infer", remedy="Give one of --model, --recipe, --study and --server.")
    if args.server is None and args.concurrency is not None:
        raise InputError("is for a server", where="--concurrency", remedy="Use --batch-size.")
    for option in ("batch_size", "engine", "quantization", "device_map", "seed") if args.server is not None else ():
        if getattr(args, option) is not None:
            raise InputError("is the server's own business", where=f"--{option.replace('_', '-')}", remedy="Leave it out.")
    if args.classify != "neighbours" and (args.server is not None or args.engine == "vllm"):
        raise InputError("asks a transformers model", where="--classify", found=args.classify, remedy="Use --classify neighbours.")
    for option, least in (("concurrency", 1), ("max_new_tokens", 1), ("batch_size", 1), ("best_of", 2)):
        value = getattr(args, option)
        if value is not None and value < least:
            raise InputError(f"must be {least} or more", where=f"--{option.replace('_', '-')}", found=value)
    limit = None if args.time_limit is None else seconds(args.time_limit)
    if args.time_limit is not None and limit is None:
        raise InputError("is no duration", where="--time-limit", found=args.time_limit, remedy="Write 90s, 55m or 2h.")
    return limit


def _tasks(path: Path) -> tuple[Task, ...]:
    from evomerge.tasks import load_tasks

    if not path.is_file():
        raise InputError("no such task file", where=path, remedy="Name a file of JSON lines: task_id, input.")
    return load_tasks(path)


def _open(args: argparse.Namespace, console: Console) -> Opened:
    """The engine, by the options given; they stand above the study's keys, and --set above both."""
    from evomerge.inference import opening

    overrides = [f"{key}={json.dumps(value)}" for option, key in KEYS.items() if (value := getattr(args, option)) is not None]
    overrides += ["prompt.template=null"] if args.format is not None else []
    overrides += args.set
    if args.server is not None:
        return opening.open_server_at(args.server, args.model, overrides, args.concurrency)
    if args.study is not None:
        return opening.open_study(storage_url(args.storage, args.study), args.study, overrides, console.say)
    return opening.open_folder(args.model, overrides) if args.recipe is None else opening.open_yaml(args.recipe, overrides)


def _check_base(args: argparse.Namespace, opened: Opened) -> None:
    """Raise InputError for options of a base that is not there."""
    if opened.prompt.knowledge is not None:
        return
    for option in ("retriever", "default_class", "threshold"):
        if getattr(args, option) is not None:
            raise InputError("there is no knowledge base", where=f"--{option.replace('_', '-')}", remedy="Name one with --knowledge.")
    if args.classify != "neighbours":
        raise InputError("there is no knowledge base", where="--classify", remedy="Name one with --knowledge.")


def _refine(args: argparse.Namespace) -> list[Refining]:
    """What answers tasks again: best of n first, so that the self-check looks at what was chosen."""
    from evomerge.inference.best_of import BestOf
    from evomerge.inference.selfcheck import SERIOUS, SelfCheck

    steps: list[Refining] = []
    if args.best_of is not None:
        steps.append(BestOf(args.best_of, _judge(args.judge)))
    elif args.judge is not None:
        raise InputError("chooses among several answers", where="--judge", remedy="Add --best-of N.")
    if args.self_check is not None:
        kinds = list(SERIOUS) if args.self_check == "all" else args.self_check.split(",")
        wrong = [kind for kind in kinds if kind not in SERIOUS]
        if wrong:
            raise InputError("no fault of an answer", where="--self-check", found=wrong[0], remedy=f"Use {', '.join(SERIOUS)}, or all.")
        steps.append(SelfCheck(frozenset(kinds)))
    return steps


def _judge(text: str | None) -> Judge | None:
    """The judge of --judge; None: agreement of the answers. Raises InputError, JudgeError, ModelError."""
    from evomerge.judging.choose import judge_from_options

    if text in (None, "agreement"):
        return None
    kind, _, place = text.partition(":")
    return judge_from_options(kind, [f"model={json.dumps(place)}"]) if kind == "local" else judge_from_options(text)


def _answered(console: Console) -> Callable[[int, int], None]:
    began = time.monotonic()
    first: list[int] = []

    def progress(done: int, total: int) -> None:
        if not first:
            first.append(done)  # what an earlier run had answered says nothing about the pace
        fresh = done - first[0]
        eta = f"  ETA {duration((time.monotonic() - began) / fresh * (total - done))}" if fresh and done < total else ""
        console.status(f"answered {done}/{total}{eta}")

    return progress


def _report(console: Console, args: argparse.Namespace, done: Done) -> None:
    """What there is, and what is not."""
    for line in done.told:
        console.say(line)
    if done.unfinished:
        begun = f", {done.partial} of them begun" if done.partial else ""
        console.say(
            f"the time limit of {args.time_limit} left {done.unfinished} of {done.answered + done.unfinished} tasks unfinished{begun}: "
            "marked in the file; the same command goes on with them"
        )
    say_written(console, [args.out])
