"""search, check, show, export, report, cache: the commands on a study."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from evomerge.cli.options import (
    Commands,
    add_command,
    results_option,
    say_written,
    set_option,
    shard_option,
    storage_option,
    study_option,
)
from evomerge.console import Console, put, put_json, size
from evomerge.errors import InputError


def study_commands(commands: Commands) -> None:
    """search, check, show, export, report, cache."""
    _search_command(commands)
    _check_command(commands)
    p = add_command(
        commands,
        "show",
        show,
        "print a study's trials, the best so far and the verdict",
        "evomerge show demo\nevomerge show demo --json\nevomerge show demo --pareto",
    )
    study_option(p)
    p.add_argument(
        "--pareto",
        action="store_true",
        help="the front: the merges that no other beats in every objective; of a study with one, "
        "in score and tokens of an answer",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object")
    _export_command(commands)
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
        "show or clear the stored answers of a study",
        "evomerge cache demo\nevomerge cache demo --clear",
    )
    study_option(p)
    p.add_argument(
        "--clear", action="store_true", help="delete them; trials, grades and the verdict are kept"
    )


def _search_command(commands: Commands) -> None:
    p = add_command(
        commands,
        "search",
        search,
        "run a study, or resume it",
        "evomerge search search_spaces/demo.yaml\n"
        "evomerge search search_spaces/demo.yaml --set search.trials=24",
    )
    _searched_options(p)


def _check_command(commands: Commands) -> None:
    p = add_command(
        commands,
        "check",
        check,
        "report what a study needs, and what `search` would refuse, before it runs",
        "evomerge check search_spaces/demo.yaml\n"
        "evomerge check search_spaces/llm-jp-3-13b.yaml --base-config config.json --gpu 24GB",
    )
    _searched_options(p)
    p.add_argument(
        "--base-config",
        type=Path,
        metavar="FILE",
        help="a config.json to use if the base model cannot be reached",
    )
    p.add_argument(
        "--gpu",
        action="append",
        default=[],
        metavar="SIZE",
        help="plan for a GPU of so much memory, such as 24GB, 48GB, 80GB or 141GB, and say what "
        "would make the study fit; repeat it to compare",
    )


def _searched_options(p: argparse.ArgumentParser) -> None:
    """The study that `search` runs and `check` looks at."""
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


def _export_command(commands: Commands) -> None:
    p = add_command(
        commands,
        "export",
        export,
        "write the winner, or another trial, as mergekit YAML, as a model folder, or as a "
        "portable runner",
        "evomerge export demo -o best.yaml\n"
        "evomerge export demo --model merged/\n"
        "evomerge export demo --point 'answer_tokens<=300'\n"
        "evomerge export demo --runner runner/ --knowledge base.xlsx",
    )
    study_option(p)
    p.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="where the YAML goes (default: stdout)"
    )
    p.add_argument("--model", type=Path, metavar="DIR", help="build the merged model in DIR")
    p.add_argument(
        "--trial",
        type=int,
        metavar="N",
        help="not the winner but trial N as `evomerge show` numbers them, from 0: parents and "
        "uniform weights first, then candidates, the mean last; failed trials have numbers too",
    )
    p.add_argument(
        "--point",
        metavar="POINT",
        help="not the winner but a point of the front that `evomerge show --pareto` lists: its "
        "number, knee (the compromise), or a constraint such as 'answer_tokens<=300', of whose "
        "points the best in the other objective",
    )
    p.add_argument(
        "--runner",
        type=Path,
        metavar="DIR",
        help="write a folder that answers tasks where evomerge is not installed",
    )
    p.add_argument(
        "--knowledge",
        type=Path,
        metavar="FILE",
        help="with --runner: the knowledge base (default: the study's, if it has one)",
    )
    shard_option(p)


def search(args: argparse.Namespace) -> None:
    """Run or resume a study, and write the results."""
    import evomerge
    from evomerge.cli.showing import print_verdict

    found = evomerge.search(
        args.study_file,
        storage=args.storage,
        results=args.results,
        study=args.study,
        trials=args.trials,
        seed=args.seed,
        overrides=args.set,
    )
    print_verdict(found)
    say_written(Console(), found.written)


def check(args: argparse.Namespace) -> int:
    """Print one line per finding; exit 2 if one is wrong."""
    import evomerge

    findings = evomerge.check(
        args.study_file,
        base_config=args.base_config,
        storage=args.storage,
        results=args.results,
        study=args.study,
        trials=args.trials,
        seed=args.seed,
        overrides=args.set,
        gpus=args.gpu,
    )
    for finding in findings:
        put(f"{finding.level:8}{finding.subject}: {finding.text}")
    return 2 if any(finding.level == "wrong" for finding in findings) else 0


def show(args: argparse.Namespace) -> None:
    """Print trials and verdict as a table, or as one JSON object."""
    import evomerge
    from evomerge.cli.showing import cache_line, print_front, print_trials, print_verdict

    found = evomerge.load_study(args.study, storage=args.storage)
    if args.json:
        put_json(found.to_json(args.pareto))
        return
    if args.pareto:
        print_front(found.front)
        return
    print_trials(found)
    put()
    print_verdict(found)
    put(cache_line(found.answer_cache))


def export(args: argparse.Namespace) -> None:
    """Write the winner's YAML, its model folder, or a runner."""
    import evomerge
    from evomerge.reporting.export import picked_sentence
    from evomerge.reporting.sentences import unbeaten_sentence

    if args.knowledge is not None and args.runner is None:
        raise InputError(
            "goes into a runner", where="--knowledge", remedy="Add --runner DIR, or leave it out."
        )
    if args.point is not None and args.trial is not None:
        raise InputError(
            "names a trial, and so does --trial", where="--point", remedy="Leave one of them out."
        )
    found, console = evomerge.load_study(args.study, storage=args.storage), Console()
    if args.point is not None:
        found = found.with_point(args.point)
    elif args.trial is not None:
        found = found.with_trial(args.trial)
    if found.snapshot.picked is not None:
        console.say(picked_sentence(found.snapshot))
    elif found.unbeaten is not None:
        console.say(f"note: {unbeaten_sentence(found.unbeaten)}")
    if args.runner is not None:
        found.write_runner(args.runner, args.knowledge)
        say_written(console, [args.runner])
    if args.model is not None:
        found.build_model(args.model, shard_size=args.out_shard_size, console=console)
        say_written(console, [args.model])
    if args.output is not None:
        say_written(console, [found.write_recipe(args.output)])
    elif args.model is None and args.runner is None:
        sys.stdout.write(found.recipe_yaml)


def report(args: argparse.Namespace) -> None:
    """Write the results again."""
    import evomerge

    found = evomerge.load_study(args.study, storage=args.storage)
    say_written(Console(), found.write_results(args.results))


def cache(args: argparse.Namespace) -> None:
    """Print the size of a study's answer cache; --clear deletes it, unless a search is running."""
    from evomerge.answering.cache import clear
    from evomerge.api.inputs import storage_url
    from evomerge.cli.showing import cache_line
    from evomerge.searching.ledger import cache_path, only_worker, open_ledger

    url = storage_url(args.storage, args.study)
    open_ledger(url, args.study)  # an unknown name raises an error
    path = cache_path(url, args.study)
    if args.clear:
        with only_worker(url, args.study):
            freed = clear(path)
        Console().say(f"cleared {path}: {size(freed)}")
    else:
        put(cache_line(path))
