"""infer: answers to a task file."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from evomerge.cli.infer_options import EXAMPLES, add_options, check_options, option, request_of
from evomerge.cli.options import Commands, add_command, say_written
from evomerge.console import Console
from evomerge.errors import InputError

if TYPE_CHECKING:
    from evomerge.inference.request import InferenceRequest
    from evomerge.inference.result import InferenceResult


def infer_command(commands: Commands) -> None:
    """infer."""
    does = "answer tasks with a model, a recipe, a study's winner, or through a server"
    add_options(add_command(commands, "infer", infer, does, EXAMPLES))


def infer(args: argparse.Namespace) -> int:
    """Answer a task file; exit 1 if no task has an answer."""
    request = request_of(args)
    # other options may be given: --explain added to a command shows what it would do
    if args.explain:
        _explain(args, request)
        return 0
    check_options(args, request)
    from evomerge.api.infer_steps import run_request
    from evomerge.tasks import load_tasks

    console = Console()
    result = run_request(request, load_tasks(args.tasks), args.out, console, args.tasks)
    _report(console, args, result)
    return 0 if result.answered else 1


def _explain(args: argparse.Namespace, request: InferenceRequest) -> None:
    """Show what each task gets from the knowledge base; a model is loaded only to classify."""
    from evomerge.cli.explaining import explain
    from evomerge.inference.opening import open_chooser, open_prompt
    from evomerge.inference.request import check_answerer, open_request
    from evomerge.knowledge.chooser import open_knowledge

    console = Console()
    if request.classify == "neighbours":
        prompt = open_prompt(request.settings, request.storage, request.study)
        chooser = open_knowledge(prompt, console.say)
    else:
        check_answerer(request, option)
        opened = open_request(request, console.say)
        chooser = open_chooser(opened, request.classify, console.say)
    if chooser is None:
        raise InputError(
            "there is nothing to explain without a knowledge base",
            where="--explain",
            remedy="Name one with --knowledge.",
        )
    explain(args, chooser, console)


def _report(console: Console, args: argparse.Namespace, result: InferenceResult) -> None:
    """Report what was done, and what was not."""
    for line in result.notes:
        console.say(line)
    if result.unfinished:
        begun = ""
        if result.partial:
            begun = f", {result.partial} of them with partial answers"
        console.say(
            f"the time limit of {args.time_limit} left {result.unfinished} of {len(result)} tasks "
            f"unfinished{begun}: they are marked in the file; "
            "run the same command again to resume"
        )
    if result.made:
        say_written(console, [args.out])
