"""The command line: parse, call, print. Data goes to stdout, progress and messages to stderr."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from evomerge import __version__
from evomerge.console import Console, byte_progress, duration, size
from evomerge.errors import EvomergeError, InputError

if TYPE_CHECKING:
    from evomerge.answering.engine import Engine
    from evomerge.inference import Renders
    from evomerge.search.session import Finished
    from evomerge.tasks import Task

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 done, 1 failed, 2 wrong usage or input, 130 interrupted."""
    args = make_parser().parse_args(argv)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at import of kernels that nobody asked for
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # the hub's retries would stand above our one line
    try:
        command: Callable[[argparse.Namespace], int | None] = args.command
        return command(args) or 0
    except EvomergeError as error:
        Console().say(f"evomerge: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        kept = "nothing was written" if args.command in (merge, demo) else "everything finished is kept, and the same command goes on"
        Console().say(f"evomerge: interrupted; {kept}")
        return 130
    except BrokenPipeError:  # `evomerge show demo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="evomerge", description="Find the best merge of a base model and its fine-tuned siblings, and prove it on held-out tasks."
    )
    parser.add_argument("--version", action="version", version=f"evomerge {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    _study_commands(commands)
    _model_commands(commands)
    return parser


def _study_commands(commands: Commands) -> None:
    """search, check, show, export, report, cache."""
    p = _command(
        commands, "search", search, "run a study, or go on with it", "evomerge search search_spaces/demo.yaml --set search.trials=24"
    )
    p.add_argument("study_file", metavar="STUDY_FILE", help="a YAML file; see search_spaces/")
    p.add_argument("--study", metavar="NAME", help="the study's name (default: `study:` in the file, or the file's stem)")
    _storage(p)
    _results(p)
    p.add_argument("--trials", type=int, metavar="N", help="the same as --set search.trials=N")
    p.add_argument("--seed", type=int, metavar="N", help="the same as --set search.seed=N")
    _set(p)

    p = _command(
        commands,
        "check",
        check,
        "say what a study needs, before any work",
        "evomerge check search_spaces/llm-jp-3-13b.yaml --base-config config.json",
    )
    p.add_argument("study_file", metavar="STUDY_FILE")
    p.add_argument("--base-config", type=Path, metavar="FILE", help="a config.json to compute with when the base cannot be reached")
    _set(p)

    p = _command(
        commands, "show", show, "print a study's trials, best so far and verdict", "evomerge show demo\n  evomerge show demo --json"
    )
    _study(p)
    p.add_argument("--json", action="store_true", help="one JSON object")

    p = _command(
        commands,
        "export",
        export,
        "write the winner as mergekit YAML, or as a model folder",
        "evomerge export demo -o best.yaml\n  evomerge export demo --model merged/",
    )
    _study(p)
    p.add_argument("-o", "--output", type=Path, metavar="FILE", help="where the YAML goes (default: stdout)")
    p.add_argument("--model", type=Path, metavar="DIR", help="build the merged model in DIR")
    _shards(p)

    p = _command(
        commands, "report", report, "write a study's results again: YAML, model card, verdict, page, table", "evomerge report demo"
    )
    _study(p)
    _results(p)

    p = _command(
        commands, "cache", cache, "show or clear the answers that a study keeps", "evomerge cache demo\n  evomerge cache demo --clear"
    )
    _study(p)
    p.add_argument("--clear", action="store_true", help="delete them; trials, grades and verdict stay")


def _model_commands(commands: Commands) -> None:
    """merge, infer, judge grade, demo: what needs no study."""
    p = _command(
        commands,
        "merge",
        merge,
        "merge a mergekit YAML to a model folder",
        "evomerge merge best.yaml merged/\n  evomerge merge best.yaml merged/ --out-shard-size 2GB --random-seed 42",
    )
    p.add_argument("config", type=Path, metavar="CONFIG_YAML", help="a mergekit configuration; mergekit merges what evomerge does not know")
    p.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    _shards(p)
    p.add_argument("--random-seed", type=_seed, default=0, metavar="N", help="decides what DARE drops, as in mergekit (default: 0)")

    p = _command(
        commands,
        "infer",
        infer,
        "answer tasks with a model, with a study's winner, or through a server",
        "evomerge infer --model merged/ --tasks tasks.jsonl --out answers.jsonl\n"
        "  evomerge infer --study demo --tasks tasks.jsonl --out answers.jsonl --knowledge base.xlsx\n"
        "  evomerge infer --server http://localhost:8000/v1 --model NAME --tasks tasks.jsonl --out answers.jsonl",
    )
    p.add_argument("--model", metavar="DIR", help="a model folder or hub name; with --server, the server's name for it")
    p.add_argument("--study", metavar="NAME", help="a study: its winner is merged in place")
    p.add_argument(
        "--server",
        metavar="URL",
        help="an OpenAI-compatible server; a key is taken from OPENAI_API_KEY. --model may be left out if it has but one",
    )
    p.add_argument("--tasks", type=Path, required=True, metavar="FILE", help="JSON lines: task_id, input")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines: task_id, input, output")
    p.add_argument("--knowledge", type=Path, metavar="FILE", help="an Excel base: classes and examples")
    p.add_argument("--format", choices=["chat", "competition"], help="the prompt's format (default: the study's, or chat)")
    p.add_argument("--max-new-tokens", type=int, metavar="N", help="the longest answer (default: the study's, or 256)")
    p.add_argument("--batch-size", type=int, metavar="N", help="prompts answered at once (default: the study's, or 32)")
    p.add_argument("--concurrency", type=int, metavar="N", help="with --server: requests under way at once (default: 8)")
    _storage(p)

    judge = commands.add_parser("judge", help="grade answers", description="Grade answers.")
    judging = judge.add_subparsers(title="commands", metavar="COMMAND", required=True)
    p = _command(
        judging,
        "grade",
        judge_grade,
        "grade a file of answers",
        "evomerge judge grade --tasks t.jsonl --answers a.jsonl --judge rules --out g.jsonl",
    )
    p.add_argument("--tasks", type=Path, required=True, metavar="T", help="the tasks, with references")
    p.add_argument("--answers", type=Path, required=True, metavar="A", help="JSON lines: task_id, output, and model if there are several")
    _judge(p)
    p.add_argument("--out", type=Path, metavar="G", help="JSON lines: task_id, grade, reason, judge, model (default: stdout)")
    _judge_commands(judging)

    p = _command(commands, "demo", demo, "build the tiny pair and its tasks", "evomerge demo demo/")
    p.add_argument("out", type=Path, metavar="DIR")


def _judge_commands(judging: Commands) -> None:
    """judge validate, judge fit."""
    files = {
        "--tasks": ("T", "the tasks, with references"),
        "--answers": ("A", "JSON lines: model, task_id, output"),
        "--grades": ("G", "JSON lines: model, task_id, judge, grade (1 to 5), and take for a judge's second run"),
    }
    p = _command(
        judging,
        "validate",
        judge_validate,
        "tell how far a judge agrees with reference grades",
        "evomerge judge validate --tasks t.jsonl --answers a.jsonl --grades g.jsonl --reference gpt-4-turbo --judge rules",
    )
    for option, (metavar, does) in files.items():
        p.add_argument(option, type=Path, required=True, metavar=metavar, help=does)
    p.add_argument("--reference", required=True, metavar="JUDGE_NAME", help="whose grades in the grades file to compare with")
    _judge(p)
    p.add_argument("--again", type=int, default=200, metavar="N", help="answers graded a second time, without a cache (default: 200)")
    p.add_argument("--models", choices=["all", "tuning", "test"], default="all", help="of which families; see docs/JUDGES.md")
    p.add_argument("--json", action="store_true", help="one JSON object on stdout")

    p = _command(
        judging,
        "fit",
        judge_fit,
        "fit a learned judge on graded answers",
        "evomerge judge fit --tasks t.jsonl --answers a.jsonl --grades g.jsonl --reference athene-v2,tulu-405b --out judge.npz",
    )
    for option, (metavar, does) in files.items():
        p.add_argument(option, type=Path, required=True, metavar=metavar, help=does)
    p.add_argument(
        "--reference", "--judge", required=True, nargs="+", metavar="JUDGE_NAME", help="whose grades to learn; of several, their mean"
    )
    p.add_argument("--models", choices=["all", "tuning", "test"], default="all", help="of which families; see docs/JUDGES.md")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="the judge, for --judge learned:FILE")


def search(args: argparse.Namespace) -> None:
    """Run or go on, then write the results."""
    from evomerge.study import read_study

    overrides = list(args.set)
    overrides += [f"study={args.study}"] if args.study is not None else []
    overrides += [f"search.{key}={value}" for key in ("trials", "seed") if (value := getattr(args, key)) is not None]
    study = read_study(args.study_file, overrides)
    from evomerge.export import write_results  # seconds of imports, which a typing error need not wait for
    from evomerge.search.session import load_finished, open_search

    url, console = _url(args.storage, study.study), Console()
    with open_search(study, url, console) as running:
        running.run()
    finished = load_finished(url, study.study)
    _print_verdict(finished)
    _say_written(console, write_results(finished, _folder(args.results, study.study)))


def check(args: argparse.Namespace) -> int:
    """A line per finding; 2 when one is wrong."""
    from evomerge.check import check_study
    from evomerge.study import read_study

    study = read_study(args.study_file, args.set)
    lines = check_study(study, args.base_config)
    for line in lines:
        print(f"{line.level:8}{line.subject}: {line.text}")
    return 2 if any(line.level == "wrong" for line in lines) else 0


def show(args: argparse.Namespace) -> None:
    """Trials and verdict as a table, or as one JSON object."""
    from evomerge.export import as_json
    from evomerge.search.session import cache_path

    finished = _finished(args)
    if args.json:
        print(json.dumps(as_json(finished), ensure_ascii=False))
        return
    print("trial  gen  idx  role       state     score            n   cut")
    for r in finished.records:
        score = f"{r.score:.3f} ± {r.stderr or 0:.3f}" if r.score is not None else (r.reason or "")[:15]
        place = "  ".join(f"{'' if v is None else v:>3}" for v in (r.generation, r.index))
        mark = " <- winner" if r.number == finished.winner.number else ""
        print(f"{r.number:>5}  {place}  {r.role:9}  {r.state:8}  {score:15}  {r.n:>3}  {r.truncated:>4.0%}{mark}")
    print()
    _print_verdict(finished)
    print(_cache_line(cache_path(_url(args.storage, args.study), args.study)))


def export(args: argparse.Namespace) -> None:
    """The winner's YAML, or its model folder."""
    from evomerge.atomic import replace_file
    from evomerge.export import card, recipe_text, use_threads

    finished = _finished(args)
    text = recipe_text(finished)
    if args.model is not None:
        use_threads(finished.study)
        _build(finished.recipe, args.model, args.out_shard_size, text, finished.study.search.seed)
        replace_file(args.model / "README.md", lambda p: p.write_text(card(finished), encoding="utf-8"))
    if args.output is not None:
        _say_written(Console(), [replace_file(args.output, lambda p: p.write_text(text, encoding="utf-8"))])
    elif args.model is None:
        sys.stdout.write(text)


def merge(args: argparse.Namespace) -> None:
    """A YAML file to a model folder: by mergekit, when that is installed, where evomerge does not know the method."""
    from evomerge.errors import UnsupportedRecipe
    from evomerge.merging.elsewhere import is_installed, merge_with_mergekit
    from evomerge.recipe import read_recipe

    try:
        recipe = read_recipe(args.config)
        _build(recipe, args.out, args.out_shard_size, args.config.read_text(encoding="utf-8"), args.random_seed)
    except UnsupportedRecipe as error:  # found before anything is written
        if not is_installed():
            raise
        console = Console()
        found = "" if error.found is None else f" ({error.found})"
        console.say(f"{error.where or args.config}: {error.what}{found} here; mergekit merges it")
        merge_with_mergekit(args.config, args.out, args.out_shard_size, args.random_seed, console.status)
        _say_written(console, [args.out])


def infer(args: argparse.Namespace) -> None:
    """Answer a task file."""
    from evomerge.inference import run_inference
    from evomerge.knowledge.base import read_knowledge

    _check_infer(args)
    tasks = _inference_tasks(args.tasks)
    knowledge = read_knowledge(args.knowledge) if args.knowledge is not None else None
    engine, prompter, identity = _inference_engine(args)
    console = Console()
    run_inference(engine, prompter, tasks, args.out, knowledge, _answered(console), model=identity)
    _say_written(console, [args.out])


def _check_infer(args: argparse.Namespace) -> None:
    """Raise InputError for options that do not go together."""
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
        return study_engine(_url(args.storage, args.study), args.study, overrides)
    return model_engine(args.model, overrides)


def cache(args: argparse.Namespace) -> None:
    """The size of the study's answer cache; --clear deletes it, unless the study is being searched."""
    from evomerge.answering.cache import clear
    from evomerge.search.ledger import only_worker, open_ledger
    from evomerge.search.session import cache_path

    url = _url(args.storage, args.study)
    open_ledger(url, args.study)  # a name that is not there is told as such
    path = cache_path(url, args.study)
    if args.clear:
        with only_worker(url, args.study):
            freed = clear(path)
        Console().say(f"cleared {path}: {size(freed)}")
    else:
        print(_cache_line(path))


def judge_grade(args: argparse.Namespace) -> None:
    from evomerge.judging.choose import judge_from_options
    from evomerge.judging.files import grade_file

    summary = grade_file(args.tasks, args.answers, judge_from_options(args.judge, args.set), args.out)
    Console().say(f"{summary.n} answers, mean grade {summary.mean:.3f} ± {summary.stderr:.3f}")


def judge_validate(args: argparse.Namespace) -> None:
    """Agreement as a table, or as one JSON object."""
    from evomerge.judging.validate import validate_files

    found = validate_files(args.tasks, args.answers, args.grades, args.reference, args.judge, args.set, args.again, args.models)
    if not args.json:
        print(found.as_text())
        return
    if found.unmatched:
        Console().say(found.unmatched)
    print(json.dumps(found.as_json(), ensure_ascii=False))


def judge_fit(args: argparse.Namespace) -> None:
    """Fit, and say what the judge is worth on models that it did not see."""
    from evomerge.judging.families import wanted_models
    from evomerge.judging.fit import fit_file

    judges = [name for names in args.reference for name in names.split(",") if name]
    fitted = fit_file(args.tasks, args.answers, args.grades, judges, args.out, wanted_models(args.models))
    console = Console()
    for line in fitted.lines():
        console.say(line)
    _say_written(console, [args.out])


def report(args: argparse.Namespace) -> None:
    from evomerge.export import write_results

    finished = _finished(args)
    _say_written(Console(), write_results(finished, _folder(args.results, args.study)))


def demo(args: argparse.Namespace) -> None:
    from evomerge.demo import build_demo

    console = Console()
    build_demo(args.out, progress=console.status)
    console.say(f"the demo pair and its tasks are in {args.out}")


def _command(commands: Commands, name: str, run: Callable[..., object], does: str, example: str) -> argparse.ArgumentParser:
    p: argparse.ArgumentParser = commands.add_parser(
        name,
        help=does,
        description=f"{does[0].upper()}{does[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(command=run)
    return p


def _judge(p: argparse.ArgumentParser) -> None:
    p.add_argument("--judge", default="rules", metavar="JUDGE", help="rules (default), learned:FILE, llm or local")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the study file's judge section: model=…")


def _study(p: argparse.ArgumentParser) -> None:
    p.add_argument("study", metavar="STUDY", help="the study's name")
    _storage(p)


def _storage(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--storage",
        metavar="URL",
        default=os.environ.get("EVOMERGE_STORAGE"),
        help="any Optuna storage (default: $EVOMERGE_STORAGE, or sqlite:///storage/NAME.db)",
    )


def _results(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        default=os.environ.get("EVOMERGE_RESULTS"),
        help="default: $EVOMERGE_RESULTS, or results/; NAME is added",
    )


def _set(p: argparse.ArgumentParser) -> None:
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the study file; may be repeated")


def _shards(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--out-shard-size", default="5GB", metavar="SIZE", help="largest weight file: 5GB, 200M, 5B as in mergekit (default: 5GB)"
    )


def _seed(text: str) -> int:
    """What numpy takes as a seed, and so mergekit."""
    number = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"no seed: {text!r}; write a whole number from 0 to {2**32 - 1}")
    return number


def _url(storage: str | None, name: str) -> str:
    return storage or f"sqlite:///storage/{name}.db"


def _folder(results: Path | str | None, name: str) -> Path:
    return Path(results or "results") / name


def _finished(args: argparse.Namespace) -> Finished:
    from evomerge.search.session import load_finished

    return load_finished(_url(args.storage, args.study), args.study)


def _cache_line(path: Path) -> str:
    from evomerge.answering.cache import cache_size

    found = cache_size(path)
    if found is None:
        return "answer cache: none"
    return f"answer cache: {size(found[0])}, " + (f"{found[1]} batches" if found[1] is not None else "damaged") + f", in {path}"


def _build(recipe: object, out: Path, shard_size: str, text: str, random_seed: int) -> None:
    from evomerge.merging.build import build_model
    from evomerge.recipe import Recipe

    assert isinstance(recipe, Recipe)
    console = Console()
    build_model(
        recipe,
        out,
        recipe_text=text,
        shard_size=shard_size,
        random_seed=random_seed,
        progress=byte_progress(console, "merging"),
    )
    _say_written(console, [out])


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


def _inference_tasks(path: Path) -> tuple[Task, ...]:
    from evomerge.tasks import load_tasks

    if not path.is_file():
        raise InputError("no such task file", where=path, remedy="Name a file of JSON lines: task_id, input.")
    return load_tasks(path)


def _print_verdict(finished: Finished) -> None:
    from evomerge.report import notes

    verdict, winner = finished.verdict, finished.winner
    if verdict is None:
        print(f"best so far: trial {winner.number} ({winner.role}), {winner.score:.3f} ± {winner.stderr:.3f} on its tasks; no verdict yet")
        return
    print(f"verdict on {verdict['n']} held-out tasks, metric {verdict['metric']}; winner: trial {winner.number} ({winner.role})")
    for name, c in verdict["candidates"].items():
        paired = verdict["paired"].get(f"winner-{name}")
        beside = f"  winner ahead by {paired['diff']:+.3f} [{paired['low']:+.3f}, {paired['high']:+.3f}]" if paired else ""
        print(f"  {name:12} {c['mean']:.3f} ± {c['stderr']:.3f}  cut {c['truncated']:>4.0%}{beside}")
    for sentence in notes(finished.ledger.facts):
        print(textwrap.fill(sentence, 100))


def _say_written(console: Console, paths: Sequence[Path]) -> None:
    console.say("wrote " + ", ".join(map(str, paths)))


if __name__ == "__main__":
    sys.exit(main())
