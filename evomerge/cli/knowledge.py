"""knowledge new, knowledge check, knowledge from-tasks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.cli.options import Commands, add_command, add_group, say_written, storage_option
from evomerge.console import Console
from evomerge.errors import InputError, KnowledgeError, StudyError
from evomerge.outputs import check_outputs

if TYPE_CHECKING:
    from evomerge.knowledge.records import Knowledge
    from evomerge.tasks import Task


def knowledge_commands(commands: Commands) -> None:
    """knowledge new, knowledge check, knowledge from-tasks."""
    group = add_group(
        commands,
        "knowledge",
        "make and check knowledge bases",
        "evomerge knowledge new base.xlsx\n"
        "evomerge knowledge check base.xlsx\n"
        "evomerge knowledge from-tasks tasks.jsonl --out base.xlsx",
    )
    p = add_command(
        group,
        "new",
        new,
        "write a starter knowledge base, with instructions",
        "evomerge knowledge new base.xlsx\nevomerge knowledge new base.yaml",
    )
    p.add_argument("file", type=Path, metavar="FILE", help="a new .xlsx or .yaml file")

    p = add_command(
        group,
        "check",
        check,
        "find every mistake in a knowledge base, with sheet, row and column",
        "evomerge knowledge check base.xlsx",
    )
    p.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help=".xlsx, .yaml, .csv (examples), or a folder of CSV exports, named after their sheets",
    )

    p = add_command(
        group,
        "from-tasks",
        from_tasks,
        "draft a knowledge base from tasks with references",
        "evomerge knowledge from-tasks tasks.jsonl --out base.xlsx\n"
        "evomerge knowledge from-tasks tasks.jsonl --out base.xlsx --study demo",
    )
    p.add_argument(
        "tasks",
        type=Path,
        metavar="TASKS",
        help="JSON lines, .csv, .xlsx or .parquet: input, output, and kind for the class",
    )
    p.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="a new .xlsx or .yaml file"
    )
    p.add_argument(
        "--study", metavar="NAME", help="take examples from this study's search tasks only"
    )
    storage_option(p)


def new(args: argparse.Namespace) -> None:
    """Write the starter knowledge base."""
    from evomerge.knowledge.starter import README, starter
    from evomerge.knowledge.write_base import write_knowledge

    _check_new(args.file)
    say_written(Console(), [write_knowledge(starter(), args.file, README)])


def check(args: argparse.Namespace) -> int:
    """Print one line per mistake; exit 2 if there are any."""
    from evomerge.knowledge.read_base import check_knowledge

    console = Console()
    checked = check_knowledge(args.file)
    for note in checked.notes:
        console.say(f"note: {note}")
    for mistake in checked.mistakes:
        console.say(f"evomerge: {mistake}")
    if checked.knowledge is None:
        console.say(f"{args.file}: {_count(len(checked.mistakes), 'mistake')}")
        return KnowledgeError.exit_code
    found = checked.knowledge
    console.say(f"{args.file}: ok, {_counts(found)}")
    return 0


def from_tasks(args: argparse.Namespace) -> None:
    """Draft a knowledge base from tasks, and report what was left out of it."""
    from evomerge.knowledge.drafting import DRAFTED, draft
    from evomerge.knowledge.write_base import write_knowledge
    from evomerge.tasks import load_tasks

    check_outputs(files=[args.out], inputs=[args.tasks])
    _check_new(args.out)
    tasks = load_tasks(args.tasks)
    searched = None if args.study is None else _study_tasks(args, tasks)
    made = draft(tasks, str(args.tasks), searched)
    console = Console()
    if made.kept_out:
        left_out = _count(made.kept_out, "task")
        console.say(f"left out, not among the search tasks of study {args.study}: {left_out}")
    if made.skipped:
        console.say(f"left out, without a reference: {_count(made.skipped, 'task')}")
    console.say(_counts(made.knowledge))
    say_written(console, [write_knowledge(made.knowledge, args.out, DRAFTED)])


def _study_tasks(
    args: argparse.Namespace, tasks: Sequence[Task]
) -> tuple[Sequence[Task], set[int | str]]:
    """All tasks of the study and the ids of its search tasks; it may have other sources too.

    Raises StudyError where they are not known for certain.
    """
    from evomerge.api.inputs import storage_url
    from evomerge.searching.ledger import open_ledger
    from evomerge.searching.prepare import study_tasks
    from evomerge.tasks import tasks_hash

    facts = open_ledger(storage_url(args.storage, args.study), args.study).facts
    if facts.split is None:
        raise StudyError(
            "the study has no split yet", where=args.study, remedy="Run `evomerge search` first."
        )
    own = tasks
    if tasks_hash(own) != facts.tasks:
        own = study_tasks(facts.study)
    if tasks_hash(own) != facts.tasks:
        raise StudyError(
            "the study's task files have changed, so its held-out tasks are no longer known",
            where=args.study,
            remedy="Restore the files, or leave --study out.",
        )
    return own, set(facts.split.search)


def _counts(found: Knowledge) -> str:
    numbers = {
        "class": len(found.classes),
        "example": len(found.examples),
        "document": len(found.documents),
    }
    counts = []
    for name, number in numbers.items():
        if number:
            counts.append(_count(number, name))
    return ", ".join(counts)


def _count(number: int, name: str) -> str:
    if number == 1:
        return f"1 {name}"
    return f"{number} {name}{'es' if name == 'class' else 's'}"


def _check_new(path: Path) -> None:
    if path.suffix.casefold() not in (".xlsx", ".yaml", ".yml"):
        raise KnowledgeError(
            "unknown type of knowledge base",
            where=path,
            found=path.suffix,
            remedy="Name it .xlsx or .yaml.",
        )
    if path.exists():
        raise InputError(
            "already exists", where=path, remedy="Name a new file; nothing is overwritten."
        )
