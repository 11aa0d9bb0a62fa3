"""search, check, show, export, report, cache: what works on a study."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.cli.options import (
    Commands,
    add_command,
    build,
    load,
    results_folder,
    results_option,
    say_written,
    set_option,
    shard_option,
    storage_option,
    storage_url,
    study_option,
)
from evomerge.console import Console, plus_minus, size
from evomerge.errors import InputError

if TYPE_CHECKING:
    from evomerge.searching.finished import Finished


def study_commands(commands: Commands) -> None:
    """search, check, show, export, report, cache."""
    p = add_command(
        commands,
        "search",
        search,
        "run a study, or go on with it",
        "evomerge search search_spaces/demo.yaml --set search.trials=24",
    )
    p.add_argument("study_file", metavar="STUDY_FILE", help="a YAML file; see search_spaces/")
    p.add_argument(
        "--study",
        metavar="NAME",
        help="the study's name (default: `study:` in the file, or the file's stem)",
    )
    storage_option(p)
    results_option(p)
    p.add_argument("--trials", type=int, metavar="N", help="the same as --set search.trials=N")
    p.add_argument("--seed", type=int, metavar="N", help="the same as --set search.seed=N")
    set_option(p)

    p = add_command(
        commands,
        "check",
        check,
        "say what a study needs, before any work",
        "evomerge check search_spaces/llm-jp-3-13b.yaml --base-config config.json",
    )
    p.add_argument("study_file", metavar="STUDY_FILE")
    p.add_argument(
        "--base-config",
        type=Path,
        metavar="FILE",
        help="a config.json to compute with when the base cannot be reached",
    )
    set_option(p)

    p = add_command(
        commands,
        "show",
        show,
        "print a study's trials, best so far and verdict",
        "evomerge show demo\n  evomerge show demo --json",
    )
    study_option(p)
    p.add_argument("--json", action="store_true", help="one JSON object")

    p = add_command(
        commands,
        "export",
        export,
        "write the winner as mergekit YAML, as a model folder, or as a runner to take along",
        "evomerge export demo -o best.yaml\n  evomerge export demo --model merged/\n"
        "  evomerge export demo --runner runner/ --knowledge base.xlsx",
    )
    study_option(p)
    p.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="where the YAML goes (default: stdout)"
    )
    p.add_argument("--model", type=Path, metavar="DIR", help="build the merged model in DIR")
    p.add_argument(
        "--runner",
        type=Path,
        metavar="DIR",
        help="a folder that answers tasks where evomerge is not installed",
    )
    p.add_argument(
        "--knowledge",
        type=Path,
        metavar="FILE",
        help="with --runner: the base (default: the study's, if it has one)",
    )
    shard_option(p)

    p = add_command(
        commands,
        "report",
        report,
        "write a study's results again: YAML, model card, verdict, page, table",
        "evomerge report demo",
    )
    study_option(p)
    results_option(p)

    p = add_command(
        commands,
        "cache",
        cache,
        "show or clear the answers that a study keeps",
        "evomerge cache demo\n  evomerge cache demo --clear",
    )
    study_option(p)
    p.add_argument(
        "--clear", action="store_true", help="delete them; trials, grades and verdict stay"
    )


def search(args: argparse.Namespace) -> None:
    """Run or go on, then write the results."""
    from evomerge.study import read_study

    overrides = list(args.set)
    overrides += [f"study={args.study}"] if args.study is not None else []
    overrides += [
        f"search.{key}={value}"
        for key in ("trials", "seed")
        if (value := getattr(args, key)) is not None
    ]
    study = read_study(args.study_file, overrides)
    # seconds of imports, which a typing error need not wait for
    from evomerge.reporting.export import write_results
    from evomerge.searching.finished import load_finished
    from evomerge.searching.open_search import open_search

    url, console = storage_url(args.storage, study.study), Console()
    with open_search(study, url, console) as running:
        running.run()
    finished = load_finished(url, study.study)
    _print_verdict(finished)
    say_written(console, write_results(finished, results_folder(args.results, study.study)))


def check(args: argparse.Namespace) -> int:
    """A line per finding; 2 when one is wrong."""
    from evomerge.searching.preflight import check_study
    from evomerge.study import read_study

    study = read_study(args.study_file, args.set)
    lines = check_study(study, args.base_config)
    for line in lines:
        print(f"{line.level:8}{line.subject}: {line.text}")
    return 2 if any(line.level == "wrong" for line in lines) else 0


def show(args: argparse.Namespace) -> None:
    """Trials and verdict as a table, or as one JSON object."""
    from evomerge.reporting.export import as_json
    from evomerge.searching.ledger import cache_path

    finished = load(args)
    if args.json:
        print(json.dumps(as_json(finished), ensure_ascii=False))
        return
    print("trial  gen  idx  role       state     score            n   cut")
    for r in finished.records:
        score = (r.reason or "")[:15]
        if r.score is not None:
            score = plus_minus(r.score, r.stderr)
        place = "  ".join(f"{'' if v is None else v:>3}" for v in (r.generation, r.index))
        mark = " <- winner" if r.number == finished.winner.number else ""
        print(
            f"{r.number:>5}  {place}  {r.role:9}  {r.state:8}  {score:15}  {r.n:>3}  {r.truncated:>4.0%}{mark}"
        )
    print()
    _print_verdict(finished)
    print(_cache_line(cache_path(storage_url(args.storage, args.study), args.study)))


def export(args: argparse.Namespace) -> None:
    """The winner's YAML, its model folder, or a runner."""
    from evomerge.files import replace_file
    from evomerge.reporting.export import card, recipe_text, use_threads

    if args.knowledge is not None and args.runner is None:
        raise InputError(
            "goes into a runner", where="--knowledge", remedy="Add --runner DIR, or leave it out."
        )
    finished = load(args)
    text = recipe_text(finished)
    if args.runner is not None:
        _export_runner(args, finished)
    if args.model is not None:
        use_threads(finished.study)
        build(finished.recipe, args.model, args.out_shard_size, text, finished.study.search.seed)
        replace_file(
            args.model / "README.md", lambda p: p.write_text(card(finished), encoding="utf-8")
        )
    if args.output is not None:
        say_written(
            Console(), [replace_file(args.output, lambda p: p.write_text(text, encoding="utf-8"))]
        )
    elif args.model is None and args.runner is None:
        sys.stdout.write(text)


def _export_runner(args: argparse.Namespace, finished: Finished) -> None:
    """A folder with all that answering needs, but for the models."""
    from evomerge.knowledge.read_base import read_knowledge
    from evomerge.reporting.runner import write_runner

    base = args.knowledge or finished.study.prompt.knowledge
    if args.knowledge is None and base is not None:
        from evomerge.inference.opening import check_unchanged_base

        check_unchanged_base(base, finished.ledger.facts.knowledge, args.study)
    write_runner(finished, args.runner, None if base is None else read_knowledge(base))
    say_written(Console(), [args.runner])


def report(args: argparse.Namespace) -> None:
    from evomerge.reporting.export import write_results

    finished = load(args)
    say_written(Console(), write_results(finished, results_folder(args.results, args.study)))


def cache(args: argparse.Namespace) -> None:
    """The size of the study's answer cache; --clear deletes it, unless the study is being searched."""
    from evomerge.answering.cache import clear
    from evomerge.searching.ledger import cache_path, only_worker, open_ledger

    url = storage_url(args.storage, args.study)
    open_ledger(url, args.study)  # a name that is not there is told as such
    path = cache_path(url, args.study)
    if args.clear:
        with only_worker(url, args.study):
            freed = clear(path)
        Console().say(f"cleared {path}: {size(freed)}")
    else:
        print(_cache_line(path))


def _cache_line(path: Path) -> str:
    from evomerge.answering.cache import cache_size

    found = cache_size(path)
    if found is None:
        return "answer cache: none"
    return (
        f"answer cache: {size(found[0])}, "
        + (f"{found[1]} batches" if found[1] is not None else "damaged")
        + f", in {path}"
    )


def _print_verdict(finished: Finished) -> None:
    from evomerge.reporting.report import notes

    verdict, winner = finished.verdict, finished.winner
    if verdict is None:
        print(
            f"best so far: trial {winner.number} ({winner.role}), "
            f"{plus_minus(winner.score or 0.0, winner.stderr)} on its tasks; no verdict yet"
        )
        return
    print(
        f"verdict on {verdict.n} held-out tasks, metric {verdict.metric}; winner: trial {winner.number} ({winner.role})"
    )
    for name, c in verdict.candidates.items():
        paired = verdict.paired.get(f"winner-{name}")
        beside = (
            f"  winner ahead by {paired.diff:+.3f} [{paired.low:+.3f}, {paired.high:+.3f}]"
            if paired
            else ""
        )
        print(f"  {name:12} {plus_minus(c.mean, c.stderr)}  cut {c.truncated:>4.0%}{beside}")
    for sentence in notes(finished.ledger.facts):
        print(textwrap.fill(sentence, 100))
