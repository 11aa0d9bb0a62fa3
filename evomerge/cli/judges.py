"""judge grade, judge validate, judge fit."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from evomerge.cli.options import Commands, add_command, add_group, say_written
from evomerge.console import Console, plus_minus, put, put_json
from evomerge.finished import hash_of, hash_of_file, is_finished, record_made
from evomerge.outputs import check_outputs

GRADE = "evomerge judge grade --tasks t.jsonl --answers a.jsonl --judge rules --out g.jsonl"
VALIDATE = (
    "evomerge judge validate --tasks t.jsonl --answers a.jsonl --grades g.jsonl "
    "--reference gpt-4-turbo --judge rules"
)
FIT = (
    "evomerge judge fit --tasks t.jsonl --answers a.jsonl --grades g.jsonl "
    "--reference athene-v2,tulu-405b --out judge.npz"
)


def judge_commands(commands: Commands) -> None:
    """judge grade, judge validate, judge fit."""
    does = "grade answers, measure a judge, fit a judge"
    group = add_group(commands, "judge", does, "\n".join([GRADE, VALIDATE, FIT]))
    _grade_command(group)
    _validate_command(group)
    _fit_command(group)


def _grade_command(commands: Commands) -> None:
    p = add_command(commands, "grade", judge_grade, "grade a file of answers", GRADE)
    _tasks_option(p)
    p.add_argument(
        "--answers",
        type=Path,
        required=True,
        metavar="A",
        help="JSON lines: task_id, output, and model if there are several",
    )
    _judge_options(p)
    p.add_argument(
        "--out",
        type=Path,
        metavar="G",
        help="JSON lines: task_id, grade, reason, judge, model (default: stdout)",
    )
    _overwrite_option(p)


def _validate_command(commands: Commands) -> None:
    does = "measure how far a judge agrees with reference grades"
    p = add_command(commands, "validate", judge_validate, does, VALIDATE)
    _graded_files(p)
    p.add_argument(
        "--reference",
        required=True,
        metavar="JUDGE_NAME",
        help="the judge in the grades file to compare with",
    )
    _judge_options(p)
    p.add_argument(
        "--again",
        type=int,
        default=200,
        metavar="N",
        help="how many answers are graded a second time, without a cache (default: 200)",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object")


def _fit_command(commands: Commands) -> None:
    p = add_command(commands, "fit", judge_fit, "fit a learned judge on graded answers", FIT)
    _graded_files(p)
    p.add_argument(
        "--reference",
        "--judge",
        required=True,
        nargs="+",
        metavar="JUDGE_NAME",
        help="the judge whose grades are learned; for several judges, their mean",
    )
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="the judge, for --judge learned:FILE",
    )
    _overwrite_option(p)


def _overwrite_option(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--overwrite", action="store_true", help="replace what --out holds of another run"
    )


def _tasks_option(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--tasks",
        type=Path,
        required=True,
        metavar="T",
        help="the tasks, with references: JSON lines, .csv, .xlsx or .parquet",
    )


def _graded_files(p: argparse.ArgumentParser) -> None:
    """Add the options of tasks, answers and grades, and of which models."""
    _tasks_option(p)
    p.add_argument(
        "--answers",
        type=Path,
        required=True,
        metavar="A",
        help="JSON lines: model, task_id, output",
    )
    p.add_argument(
        "--grades",
        type=Path,
        required=True,
        metavar="G",
        help="JSON lines: model, task_id, judge, grade (1 to 5), and take for a judge's second run",
    )
    p.add_argument(
        "--models",
        choices=["all", "tuning", "test"],
        default="all",
        help="which families of models; see docs/JUDGES.md",
    )


def _judge_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--judge",
        default="rules",
        metavar="JUDGE",
        help="rules (default), learned:FILE, llm or local:MODEL",
    )
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of the study file's judge section: model=…",
    )


def judge_grade(args: argparse.Namespace) -> None:
    """Grade the answers, and report their mean."""
    from evomerge.judging.answer_files import grade_file
    from evomerge.judging.factory import CACHE, judge_from_options

    if args.out is not None:  # before a judge is opened
        read = [args.tasks, args.answers, args.judge.partition(":")[2], CACHE]
        check_outputs(files=[args.out], inputs=read)
    judge = judge_from_options(args.judge, args.set)
    facts = _facts(args, ("tasks", "answers")) | {"judge": hash_of((judge.name, judge.version))}
    if args.out is not None and _is_made(args, facts, "grades"):
        return
    summary = grade_file(args.tasks, args.answers, judge, args.out)
    if args.out is not None:
        record_made(args.out, facts)
    line = f"{summary.n} answers, mean grade {plus_minus(summary.mean, summary.stderr)}"
    if summary.tokens is not None:
        thoughts, answer = summary.tokens
        line += f"; tokens per answer: {thoughts:,.0f} of thoughts, {answer:,.0f} of the answer"
    refused = getattr(judge, "refused", 0)
    if refused:
        line += f"; the judge's server refused {refused}, which count as the lowest grade"
    Console().say(line)


def judge_validate(args: argparse.Namespace) -> None:
    """Print the agreement as a table, or as one JSON object."""
    from evomerge.judging.validation.validate import validate_files

    found = validate_files(
        args.tasks,
        args.answers,
        args.grades,
        args.reference,
        args.judge,
        args.set,
        args.again,
        args.models,
    )
    if not args.json:
        for line in found.as_text().splitlines():
            put(line)
        return
    if found.unmatched:
        Console().say(found.unmatched)
    put_json(found.as_json())


def judge_fit(args: argparse.Namespace) -> None:
    """Fit a judge, and report how well it grades models that it was not fitted on."""
    from evomerge.judging.learned.features import VERSION
    from evomerge.judging.learned.fit import fit_file
    from evomerge.judging.learned.judge import FORMAT_VERSION
    from evomerge.judging.validation.families import wanted_models

    check_outputs(files=[args.out], inputs=[args.tasks, args.answers, args.grades])
    judges = []
    for names in args.reference:
        for name in names.split(","):
            if name:
                judges.append(name)
    models = wanted_models(args.models)
    facts = _facts(args, ("tasks", "answers", "grades"))
    facts["judges or models"] = hash_of((judges, args.models))
    facts["version of evomerge"] = hash_of((FORMAT_VERSION, VERSION))
    if _is_made(args, facts, "a judge"):
        return
    fitted = fit_file(args.tasks, args.answers, args.grades, judges, args.out, models)
    console = Console()
    for line in fitted.lines():
        console.say(line)
    record_made(args.out, facts)
    say_written(console, [args.out])


def _facts(args: argparse.Namespace, names: Sequence[str]) -> dict[str, str]:
    """Hashes of the files that are named; one that is missing gets its error from its reader."""
    files = {name: Path(getattr(args, name)) for name in names}
    hashes = {}
    for name, path in files.items():
        if path.is_file():
            hashes[name] = hash_of_file(path)
    return hashes


def _is_made(args: argparse.Namespace, facts: Mapping[str, str], what: str) -> bool:
    """Whether --out holds just this already. Raises InputError: it holds something else."""
    if args.overwrite or not is_finished(args.out, facts, what):
        return False
    Console().say(f"{args.out} holds this already: nothing to do (--overwrite makes it again)")
    return True
