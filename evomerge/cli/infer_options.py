"""The options of infer, which of them go together, and what of a study file they set."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.cli.options import seed, storage_option
from evomerge.console import seconds
from evomerge.errors import InputError

if TYPE_CHECKING:
    from evomerge.study import PromptSection

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


def add_options(p: argparse.ArgumentParser) -> None:
    """All options of infer."""
    who = p.add_argument_group("who answers")
    who.add_argument(
        "--model",
        metavar="DIR",
        help="a model folder or hub name; with --server, the server's name for it",
    )
    who.add_argument(
        "--recipe", type=Path, metavar="YAML", help="a mergekit configuration, merged in place"
    )
    who.add_argument(
        "--study",
        metavar="NAME",
        help="a study: its winner is merged in place, and asked as in the search",
    )
    who.add_argument(
        "--server",
        metavar="URL",
        help="an OpenAI-compatible server; a key is taken from OPENAI_API_KEY",
    )
    storage_option(who)
    files = p.add_argument_group("files")
    files.add_argument(
        "--tasks", type=Path, required=True, metavar="FILE", help="JSON lines: task_id, input"
    )
    files.add_argument(
        "--out", type=Path, metavar="FILE", help="JSON lines: task_id, input, output"
    )
    _knowledge_options(p)
    how = p.add_argument_group("how (default: as the study says)")
    how.add_argument(
        "--format", choices=["chat", "competition"], help="the prompt's format (default: chat)"
    )
    how.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="the longest answer of all, whatever a class says (default: 256)",
    )
    how.add_argument(
        "--engine",
        choices=["transformers", "vllm"],
        help="what runs the model (default: transformers)",
    )
    how.add_argument(
        "--quantization", choices=["4bit", "4bit-double"], help="the model in 4 bits (bitsandbytes)"
    )
    how.add_argument("--device-map", metavar="MAP", help="auto: one model over several GPUs")
    how.add_argument(
        "--batch-size", type=int, metavar="N", help="prompts answered at once (default: 64)"
    )
    how.add_argument(
        "--concurrency",
        type=int,
        metavar="N",
        help="with --server: requests under way at once (default: 8)",
    )
    how.add_argument(
        "--self-check",
        nargs="?",
        const="all",
        metavar="FAULTS",
        help="answer again what is faulty: all, or some of empty,repetitive,language,cut",
    )
    how.add_argument("--best-of", type=int, metavar="N", help="answer N times and keep the best")
    how.add_argument(
        "--judge",
        metavar="JUDGE",
        help="with --best-of: agreement (default), rules, learned:FILE, llm, or local:DIR",
    )
    how.add_argument("--seed", type=seed, metavar="N", help="of draws, where answers are sampled")
    how.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any key of prompt, generation or engine, as in a study file",
    )
    how.add_argument(
        "--time-limit",
        metavar="TIME",
        help="90s, 55m, 2h: then the file is written, what is unfinished is marked; cheap tasks go first",
    )


def _knowledge_options(p: argparse.ArgumentParser) -> None:
    base = p.add_argument_group("knowledge base")
    base.add_argument(
        "--knowledge",
        metavar="FILE",
        help="classes and examples: .xlsx, .yaml, .csv or a folder of CSVs",
    )
    base.add_argument(
        "--retriever",
        metavar="NAME",
        help="tfidf (default), bm25, embeddings:MODEL, or several joined by +",
    )
    base.add_argument(
        "--default-class", metavar="NAME", help="of tasks whose class is less sure than --threshold"
    )
    base.add_argument(
        "--threshold", type=float, metavar="SHARE", help="confidence from 0 to 1 (default: 0.35)"
    )
    base.add_argument(
        "--classify",
        choices=["neighbours", "model", "both"],
        default="neighbours",
        help="by nearest examples (default), the model, or both",
    )
    base.add_argument(
        "--explain",
        action="store_true",
        help="show each task's class and examples, and answer nothing",
    )
    base.add_argument("--json", action="store_true", help="with --explain: a JSON object a line")


def overrides_of(args: argparse.Namespace) -> list[str]:
    """The options as keys of a study file; they stand above the study's, and --set above both."""
    overrides = [
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for option, key in KEYS.items()
        if (value := getattr(args, option)) is not None
    ]
    overrides += ["prompt.template=null"] if args.format is not None else []
    if args.knowledge is not None and args.default_class is None:
        overrides.append("prompt.default_class=null")  # a study's is a class of its own base
    return [*overrides, *args.set]


def check_who(args: argparse.Namespace) -> None:
    """Raise InputError unless one thing answers."""
    given = [
        option
        for option in ("model", "recipe", "study", "server")
        if getattr(args, option) is not None
    ]
    if len(given) != 1 and sorted(given) != ["model", "server"]:
        raise InputError(
            "who answers is not clear",
            where="evomerge infer",
            remedy="Give one of --model, --recipe, --study and --server.",
        )
    if args.classify != "neighbours" and (args.server is not None or args.engine == "vllm"):
        raise InputError(
            "asks a transformers model",
            where="--classify",
            found=args.classify,
            remedy="Use --classify neighbours.",
        )


def check(args: argparse.Namespace) -> float | None:
    """The time limit in seconds. Raises InputError for options that do not go together."""
    if args.json:
        raise InputError(
            "is for --explain", where="--json", remedy="Add --explain, or leave it out."
        )
    if args.out is None:
        raise InputError(
            "where do the answers go?", where="evomerge infer", remedy="Name a file with --out."
        )
    check_who(args)
    _check_out(args)
    if args.time_limit is not None and args.classify != "neighbours":
        raise InputError(
            "does not look at the time limit",
            where="--classify",
            found=args.classify,
            remedy="Use one of the two.",
        )
    if args.server is None and args.concurrency is not None:
        raise InputError("is for a server", where="--concurrency", remedy="Use --batch-size.")
    for option in (
        ("batch_size", "engine", "quantization", "device_map", "seed")
        if args.server is not None
        else ()
    ):
        if getattr(args, option) is not None:
            raise InputError(
                "is the server's own business",
                where=f"--{option.replace('_', '-')}",
                remedy="Leave it out.",
            )
    for option, least in (
        ("concurrency", 1),
        ("max_new_tokens", 1),
        ("batch_size", 1),
        ("best_of", 2),
    ):
        value = getattr(args, option)
        if value is not None and value < least:
            raise InputError(
                f"must be {least} or more", where=f"--{option.replace('_', '-')}", found=value
            )
    limit = None if args.time_limit is None else seconds(args.time_limit)
    if args.time_limit is not None and limit is None:
        raise InputError(
            "is no duration",
            where="--time-limit",
            found=args.time_limit,
            remedy="Write 90s, 55m or 2h.",
        )
    return limit


def _check_out(args: argparse.Namespace) -> None:
    """Raise InputError where the answers would take the place of what they are made from."""
    out = Path(args.out)
    if not out.name or out.is_dir():
        raise InputError("is a folder", where="--out", found=args.out, remedy="Name a file.")
    written = {
        path.resolve()
        for path in (out, out.with_suffix(".classes.jsonl"), out.with_name(out.name + ".part"))
    }
    for option in ("tasks", "knowledge", "recipe"):
        if (given := getattr(args, option)) is not None and Path(given).resolve() in written:
            raise InputError(
                f"would be written over by the answers to --out {out}",
                where=f"--{option}",
                found=given,
                remedy="Name another --out.",
            )


def check_base(args: argparse.Namespace, prompt: PromptSection) -> None:
    """Raise InputError for options of a base that is not there."""
    if prompt.knowledge is not None:
        return
    for option in ("retriever", "default_class", "threshold"):
        if getattr(args, option) is not None:
            raise InputError(
                "there is no knowledge base",
                where=f"--{option.replace('_', '-')}",
                remedy="Name one with --knowledge.",
            )
    if args.classify != "neighbours":
        raise InputError(
            "there is no knowledge base", where="--classify", remedy="Name one with --knowledge."
        )
