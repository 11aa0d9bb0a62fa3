"""infer: answers to a task file."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.cli.infer_options import (
    EXAMPLES,
    add_options,
    check,
    check_base,
    check_who,
    overrides_of,
)
from evomerge.cli.options import Commands, add_command, say_written, storage_url
from evomerge.console import Console, duration
from evomerge.errors import InputError

if TYPE_CHECKING:
    from evomerge.inference.opening import Opened
    from evomerge.inference.run import Done, Refining
    from evomerge.judging.grade import Judge
    from evomerge.tasks import Task


def infer_command(commands: Commands) -> None:
    """infer."""
    does = "answer tasks with a model, a recipe, a study's winner, or through a server"
    add_options(add_command(commands, "infer", infer, does, EXAMPLES))


def infer(args: argparse.Namespace) -> None:
    """Answer a task file."""
    # other options may stand: one adds --explain to a command to see what it would do
    if args.explain:
        _explain(args)
        return
    limit = check(args)
    began = time.monotonic()
    steps = _refine(args)
    from evomerge.answering.prompts import make_prompter
    from evomerge.inference import run_inference
    from evomerge.inference.best_of import BestOf
    from evomerge.inference.opening import open_chooser
    from evomerge.judging.factory import check_tasks

    console = Console()
    tasks = _tasks(args.tasks)
    opened = _open(args, console)
    check_base(args, opened.prompt)
    chooser = open_chooser(opened, args.classify, console.say)
    prompter = make_prompter(
        opened.engine.tokenizer,
        opened.prompt,
        opened.study.generation,
        chooser,
        opened.engine.context,
        args.max_new_tokens,
    )
    for step in steps:
        if isinstance(step, BestOf) and step.judge is not None:
            check_tasks(step.judge, tasks)
            if step.judge.name == "rules" and any(task.output for task in tasks):
                console.say(
                    "note: the rules choose by the tasks' own references: do not grade these answers by them"
                )
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


def _explain(args: argparse.Namespace) -> None:
    """What the base makes of each task; a model is loaded only where it classifies."""
    from evomerge.cli.explaining import explain
    from evomerge.inference.opening import open_chooser, open_prompt
    from evomerge.knowledge.chooser import open_knowledge

    console = Console()
    if args.classify == "neighbours":
        where = (
            (None, None)
            if args.study is None
            else (storage_url(args.storage, args.study), args.study)
        )
        chooser = open_knowledge(open_prompt(overrides_of(args), *where), console.say)
    else:
        check_who(args)
        chooser = open_chooser(_open(args, console), args.classify, console.say)
    if chooser is None:
        raise InputError(
            "there is nothing to explain without a base",
            where="--explain",
            remedy="Name one with --knowledge.",
        )
    explain(args, chooser, console)


def _tasks(path: Path) -> tuple[Task, ...]:
    from evomerge.tasks import load_tasks

    if not path.is_file():
        raise InputError(
            "no such task file", where=path, remedy="Name a file of JSON lines: task_id, input."
        )
    return load_tasks(path)


def _open(args: argparse.Namespace, console: Console) -> Opened:
    """The engine, by the options given."""
    from evomerge.inference import opening

    overrides = overrides_of(args)
    if args.server is not None:
        return opening.open_server_at(args.server, args.model, overrides, args.concurrency)
    if args.study is not None:
        return opening.open_study(
            storage_url(args.storage, args.study), args.study, overrides, console.say
        )
    return (
        opening.open_folder(args.model, overrides)
        if args.recipe is None
        else opening.open_yaml(args.recipe, overrides)
    )


def _refine(args: argparse.Namespace) -> list[Refining]:
    """What answers tasks again: best of n first, so that the self-check looks at what was chosen."""
    from evomerge.inference.best_of import BestOf
    from evomerge.inference.selfcheck import SERIOUS, SelfCheck

    steps: list[Refining] = []
    if args.best_of is not None:
        steps.append(BestOf(args.best_of, _judge(args.judge)))
    elif args.judge is not None:
        raise InputError(
            "chooses among several answers", where="--judge", remedy="Add --best-of N."
        )
    if args.self_check is not None:
        kinds = list(SERIOUS) if args.self_check == "all" else args.self_check.split(",")
        wrong = [kind for kind in kinds if kind not in SERIOUS]
        if wrong:
            raise InputError(
                "no fault of an answer",
                where="--self-check",
                found=wrong[0],
                remedy=f"Use {', '.join(SERIOUS)}, or all.",
            )
        steps.append(SelfCheck(frozenset(kinds)))
    return steps


def _judge(text: str | None) -> Judge | None:
    """The judge of --judge; None: agreement of the answers. Raises InputError, JudgeError,
    ModelError.
    """
    from evomerge.judging.factory import judge_from_options

    if text in (None, "agreement"):
        return None
    kind, _, place = text.partition(":")
    return (
        judge_from_options(kind, [f"model={json.dumps(place, ensure_ascii=False)}"])
        if kind == "local"
        else judge_from_options(text)
    )


def _answered(console: Console) -> Callable[[int, int], None]:
    began = time.monotonic()
    first: list[int] = []

    def progress(done: int, total: int) -> None:
        if not first:
            first.append(done)  # what an earlier run had answered says nothing about the pace
        fresh = done - first[0]
        eta = (
            f"  ETA {duration((time.monotonic() - began) / fresh * (total - done))}"
            if fresh and done < total
            else ""
        )
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
