"""judge grade, judge validate, judge fit."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from evomerge.cli.options import (
    Commands,
    add_command,
    say_written,
)
from evomerge.console import Console


def judge_commands(commands: Commands) -> None:
    """judge grade, judge validate, judge fit."""
    judge = commands.add_parser("judge", help="grade answers", description="Grade answers.")
    judging = judge.add_subparsers(title="commands", metavar="COMMAND", required=True)
    p = add_command(
        judging,
        "grade",
        judge_grade,
        "grade a file of answers",
        "evomerge judge grade --tasks t.jsonl --answers a.jsonl --judge rules --out g.jsonl",
    )
    p.add_argument(
        "--tasks", type=Path, required=True, metavar="T", help="the tasks, with references"
    )
    p.add_argument(
        "--answers",
        type=Path,
        required=True,
        metavar="A",
        help="JSON lines: task_id, output, and model if there are several",
    )
    _judge(p)
    p.add_argument(
        "--out",
        type=Path,
        metavar="G",
        help="JSON lines: task_id, grade, reason, judge, model (default: stdout)",
    )
    p = add_command(
        judging,
        "validate",
        judge_validate,
        "tell how far a judge agrees with reference grades",
        "evomerge judge validate --tasks t.jsonl --answers a.jsonl --grades g.jsonl --reference gpt-4-turbo --judge rules",
    )
    _graded_files(p)
    p.add_argument(
        "--reference",
        required=True,
        metavar="JUDGE_NAME",
        help="whose grades in the grades file to compare with",
    )
    _judge(p)
    p.add_argument(
        "--again",
        type=int,
        default=200,
        metavar="N",
        help="answers graded a second time, without a cache (default: 200)",
    )
    p.add_argument("--json", action="store_true", help="one JSON object on stdout")

    p = add_command(
        judging,
        "fit",
        judge_fit,
        "fit a learned judge on graded answers",
        "evomerge judge fit --tasks t.jsonl --answers a.jsonl --grades g.jsonl --reference athene-v2,tulu-405b --out judge.npz",
    )
    _graded_files(p)
    p.add_argument(
        "--reference",
        "--judge",
        required=True,
        nargs="+",
        metavar="JUDGE_NAME",
        help="whose grades to learn; of several, their mean",
    )
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="the judge, for --judge learned:FILE",
    )


def _graded_files(p: argparse.ArgumentParser) -> None:
    """Tasks, answers and grades, and of which models."""
    p.add_argument(
        "--tasks", type=Path, required=True, metavar="T", help="the tasks, with references"
    )
    p.add_argument(
        "--answers",
        type=Path,
        required=True,
        metavar="A",
        help="JSON lines: model, task_id, output",
    )
    grades = "JSON lines: model, task_id, judge, grade (1 to 5), and take for a judge's second run"
    p.add_argument("--grades", type=Path, required=True, metavar="G", help=grades)
    p.add_argument(
        "--models",
        choices=["all", "tuning", "test"],
        default="all",
        help="of which families; see docs/JUDGES.md",
    )


def judge_grade(args: argparse.Namespace) -> None:
    from evomerge.judging.answer_files import grade_file
    from evomerge.judging.factory import judge_from_options

    summary = grade_file(
        args.tasks, args.answers, judge_from_options(args.judge, args.set), args.out
    )
    Console().say(f"{summary.n} answers, mean grade {summary.mean:.3f} ± {summary.stderr:.3f}")


def judge_validate(args: argparse.Namespace) -> None:
    """Agreement as a table, or as one JSON object."""
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
        print(found.as_text())
        return
    if found.unmatched:
        Console().say(found.unmatched)
    print(json.dumps(found.as_json(), ensure_ascii=False))


def judge_fit(args: argparse.Namespace) -> None:
    """Fit, and say what the judge is worth on models that it did not see."""
    from evomerge.judging.learned.fit import fit_file
    from evomerge.judging.validation.families import wanted_models

    judges = [name for names in args.reference for name in names.split(",") if name]
    fitted = fit_file(
        args.tasks, args.answers, args.grades, judges, args.out, wanted_models(args.models)
    )
    console = Console()
    for line in fitted.lines():
        console.say(line)
    say_written(console, [args.out])


def _judge(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--judge",
        default="rules",
        metavar="JUDGE",
        help="rules (default), learned:FILE, llm or local",
    )
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of the study file's judge section: model=…",
    )
