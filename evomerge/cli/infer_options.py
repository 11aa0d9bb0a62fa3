"""The options of infer: which of them go together, and what they set of a study file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.cli.options import seed, storage_option
from evomerge.console import seconds
from evomerge.errors import InputError

if TYPE_CHECKING:
    from evomerge.inference.request import InferenceRequest

EXAMPLES = """evomerge infer --study demo --tasks t.jsonl --out a.jsonl --knowledge base.xlsx
evomerge infer --model merged/ --tasks t.jsonl --out a.jsonl --time-limit 55m
evomerge infer --recipe best.yaml --tasks t.jsonl --out a.jsonl --quantization 4bit
evomerge infer --server http://localhost:8000/v1 --model NAME --tasks t.jsonl --out a.jsonl
evomerge infer --explain --tasks t.jsonl --knowledge base.xlsx"""
# option -> the key of a study file that it sets
KEYS = {
    "format": "prompt.format",
    "retriever": "prompt.retriever",
    "default_class": "prompt.default_class",
    "threshold": "prompt.threshold",
    "batch_size": "engine.batch_size",
    "engine": "engine.kind",
    "quantization": "engine.quantization",
    "device_map": "engine.device_map",
    "seed": "search.seed",
}
SERVER_DECIDES = ("batch_size", "engine", "quantization", "device_map", "seed")
NEED_KNOWLEDGE = ("retriever", "default_class", "threshold")


def add_options(p: argparse.ArgumentParser) -> None:
    """All options of infer."""
    _model_options(p)
    files = p.add_argument_group("files")
    files.add_argument(
        "--tasks",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON lines, .csv, .xlsx or .parquet: input, and task_id",
    )
    files.add_argument(
        "--out", type=Path, metavar="FILE", help="JSON lines: task_id, input, output"
    )
    files.add_argument(
        "--overwrite",
        action="store_true",
        help="replace answers that --out holds of another model, task file or settings",
    )
    _knowledge_options(p)
    _generation_options(p)
    _refining_options(p)


def _model_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("which model answers")
    group.add_argument(
        "--model",
        metavar="DIR",
        help="a model folder or hub name; with --server, the server's name for it",
    )
    group.add_argument(
        "--recipe", type=Path, metavar="YAML", help="a mergekit configuration, merged in memory"
    )
    group.add_argument(
        "--study",
        metavar="NAME",
        help="a study: its winner is merged in memory, and prompted as in the search",
    )
    group.add_argument(
        "--server",
        metavar="URL",
        help="an OpenAI-compatible server; a key is taken from OPENAI_API_KEY",
    )
    storage_option(group)


def _knowledge_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("knowledge base")
    group.add_argument(
        "--knowledge",
        metavar="FILE",
        help="classes and examples: .xlsx, .yaml, .csv or a folder of CSVs",
    )
    group.add_argument(
        "--retriever",
        metavar="NAME",
        help="tfidf (default), bm25, embeddings:MODEL, or several joined by +",
    )
    group.add_argument(
        "--default-class",
        metavar="NAME",
        help="the class of tasks that are classified with less confidence than --threshold",
    )
    group.add_argument(
        "--threshold", type=float, metavar="SHARE", help="confidence from 0 to 1 (default: 0.35)"
    )
    group.add_argument(
        "--classify",
        choices=["neighbours", "model", "both"],
        default="neighbours",
        help="by the nearest examples (default), by the model, or by both",
    )
    group.add_argument(
        "--explain",
        action="store_true",
        help="show each task's class and examples, without answering it",
    )
    group.add_argument(
        "--json", action="store_true", help="with --explain: one JSON object per line"
    )


def _generation_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("generation (default: as in the study)")
    group.add_argument(
        "--format", choices=["chat", "competition"], help="the prompt's format (default: chat)"
    )
    group.add_argument(
        "--chat-template-kwargs",
        metavar="YAML",
        help="variables of the chat template, such as '{enable_thinking: true}'",
    )
    group.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="the longest answer in tokens, a limit for every class (default: 256)",
    )
    group.add_argument(
        "--engine",
        choices=["transformers", "vllm"],
        help="the engine that runs the model (default: transformers)",
    )
    group.add_argument(
        "--quantization", choices=["4bit", "4bit-double"], help="load in 4 bits (bitsandbytes)"
    )
    group.add_argument("--device-map", metavar="MAP", help="auto: one model over several GPUs")
    group.add_argument(
        "--batch-size", type=int, metavar="N", help="prompts per batch (default: 64)"
    )
    group.add_argument(
        "--concurrency",
        type=int,
        metavar="N",
        help="with --server: concurrent requests (default: 8)",
    )
    group.add_argument("--seed", type=seed, metavar="N", help="seed for sampled answers")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any key of prompt, generation or engine, as in a study file",
    )
    group.add_argument(
        "--time-limit",
        metavar="TIME",
        help="90s, 55m or 1h30m: after it the file is written, with unfinished tasks marked; "
        "short tasks come first",
    )


def _refining_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("answering again")
    group.add_argument(
        "--self-check",
        nargs="?",
        const="all",
        metavar="FAULTS",
        help="retry a task whose answer is faulty: all, or some of empty,repetitive,language,cut",
    )
    group.add_argument(
        "--best-of", type=int, metavar="N", help="answer N times and keep the best answer"
    )
    group.add_argument(
        "--judge",
        metavar="JUDGE",
        help="with --best-of: agreement (default), rules, learned:FILE, llm, or local:MODEL",
    )


def option(name: str) -> str:
    """What a message calls an option."""
    return f"--{name.replace('_', '-')}"


def overrides_of(args: argparse.Namespace) -> list[str]:
    """The options as keys of a study file; they override the study's, and --set overrides both."""
    overrides = []
    for name, key in KEYS.items():
        value = getattr(args, name)
        if value is not None:
            overrides.append(f"{key}={json.dumps(value, ensure_ascii=False)}")
    if args.format is not None:
        overrides.append("prompt.template=null")
    if args.chat_template_kwargs is not None:
        overrides.append(f"prompt.chat_template_kwargs={args.chat_template_kwargs}")
    return [*overrides, *args.set]


def request_of(args: argparse.Namespace) -> InferenceRequest:
    """The request that the options make. Raises InputError for a duration that cannot be read."""
    from evomerge.api.infer_steps import make_request

    limit = None
    if args.time_limit is not None:
        limit = seconds(args.time_limit)
        if limit is None:
            raise InputError(
                "is not a duration",
                where="--time-limit",
                found=args.time_limit,
                remedy="Write 90s, 55m, 1h30m or 2d.",
            )
    return make_request(
        model=args.model,
        recipe=args.recipe,
        study=args.study,
        storage=args.storage,
        server=args.server,
        concurrency=args.concurrency,
        knowledge=args.knowledge,
        classify=args.classify,
        overrides=overrides_of(args),
        max_new_tokens=args.max_new_tokens,
        best_of=args.best_of,
        judge=args.judge,
        self_check=args.self_check or (),
        time_limit=limit,
        overwrite=args.overwrite,
    )


def check_options(args: argparse.Namespace, request: InferenceRequest) -> None:
    """Raise InputError for options that do not go together."""
    from evomerge.inference.request import check_request

    if args.json:
        raise InputError(
            "goes with --explain", where="--json", remedy="Add --explain, or leave it out."
        )
    if args.out is None:
        raise InputError(
            "there is no file for the answers",
            where="evomerge infer",
            remedy="Name a file with --out.",
        )
    check_request(request, option)
    if not args.out.name or args.out.is_dir():
        raise InputError("is a folder", where="--out", found=args.out, remedy="Name a file.")
    if args.batch_size is not None and args.batch_size < 1:
        raise InputError("must be 1 or more", where="--batch-size", found=args.batch_size)
    if args.server is not None:
        for name in SERVER_DECIDES:
            if getattr(args, name) is not None:
                raise InputError(
                    "is decided by the server", where=option(name), remedy="Leave it out."
                )
    check_knowledge(args, request)


def check_knowledge(args: argparse.Namespace, request: InferenceRequest) -> None:
    """Raise InputError for options of a knowledge base where there is none."""
    given = [name for name in NEED_KNOWLEDGE if getattr(args, name) is not None]
    if args.classify != "neighbours":
        given.append("classify")
    if not given or args.knowledge is not None:
        return
    from evomerge.inference.opening import open_prompt

    if open_prompt(request.settings, request.storage, request.study).knowledge is None:
        raise InputError(
            "there is no knowledge base",
            where=option(given[0]),
            remedy="Name one with --knowledge.",
        )
