"""knowledge new, knowledge check, knowledge from-tasks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.cli.options import Commands, add_command, say_written, storage_option, storage_url
from evomerge.console import Console
from evomerge.errors import InputError, KnowledgeError, StudyError

if TYPE_CHECKING:
    from evomerge.knowledge.records import Knowledge
    from evomerge.tasks import Task


def knowledge_commands(commands: Commands) -> None:
    """knowledge new, knowledge check, knowledge from-tasks."""
    does = "make and check knowledge bases"
    knowledge = commands.add_parser(
        "knowledge", help=does, description=f"{does[0].upper()}{does[1:]}."
    )
    making = knowledge.add_subparsers(title="commands", metavar="COMMAND", required=True)
    p = add_command(
        making,
        "new",
        new,
        "write a starter base, with its instructions",
        "evomerge knowledge new base.xlsx\n  evomerge knowledge new base.yaml",
    )
    p.add_argument("file", type=Path, metavar="FILE", help="a new .xlsx or .yaml file")

    p = add_command(
        making,
        "check",
        check,
        "find every mistake of a base, with sheet, row and column",
        "evomerge knowledge check base.xlsx",
    )
    p.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help=".xlsx, .yaml, .csv (examples), or a folder of classes.csv and examples.csv",
    )

    p = add_command(
        making,
        "from-tasks",
        from_tasks,
        "draft a base from tasks with references",
        "evomerge knowledge from-tasks tasks.jsonl --out base.xlsx\n"
        "  evomerge knowledge from-tasks tasks.jsonl --out base.xlsx --study demo",
    )
    p.add_argument(
        "tasks",
        type=Path,
        metavar="TASKS",
        help="JSON lines: task_id, input, output, and kind for the class",
    )
    p.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="a new .xlsx or .yaml file"
    )
    p.add_argument(
        "--study", metavar="NAME", help="take examples only from this study's search split"
    )
    storage_option(p)


def new(args: argparse.Namespace) -> None:
    from evomerge.knowledge.starter import README, starter
    from evomerge.knowledge.write_base import write_knowledge

    _check_new(args.file)
    say_written(Console(), [write_knowledge(starter(), args.file, README)])


def check(args: argparse.Namespace) -> int:
    """One line for each mistake; exit 2 where there are any."""
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
    """A base from tasks with references, and what was left out of it."""
    from evomerge.knowledge.drafting import DRAFTED, draft
    from evomerge.knowledge.write_base import write_knowledge
    from evomerge.tasks import load_tasks

    _check_new(args.out)
    tasks = load_tasks(args.tasks)
    made = draft(tasks, str(args.tasks), None if args.study is None else _study_tasks(args, tasks))
    console = Console()
    if made.kept_out:
        console.say(
            f"left out, not of the search split of study {args.study}: {_count(made.kept_out, 'task')}"
        )
    if made.skipped:
        console.say(f"left out, without a reference: {_count(made.skipped, 'task')}")
    console.say(_counts(made.knowledge))
    say_written(console, [write_knowledge(made.knowledge, args.out, DRAFTED)])


def _study_tasks(
    args: argparse.Namespace, tasks: Sequence[Task]
) -> tuple[Sequence[Task], set[int | str]]:
    """All tasks of the study, which may have more sources than this file, and the ids of its search
    split.

    Raises StudyError where they cannot be told for certain.
    """
    from evomerge.searching.ledger import open_ledger
    from evomerge.searching.prepare import study_tasks
    from evomerge.tasks import tasks_hash

    facts = open_ledger(storage_url(args.storage, args.study), args.study).facts
    if facts.split is None:
        raise StudyError(
            "the study has no split yet", where=args.study, remedy="Run `evomerge search` first."
        )
    own = tasks if tasks_hash(tasks) == facts.tasks else study_tasks(facts.study)
    if tasks_hash(own) != facts.tasks:
        raise StudyError(
            "its task files have changed, so that nobody can tell which tasks it holds out",
            where=args.study,
            remedy="Put them back as they were, or leave --study out.",
        )
    return own, set(facts.split.search)


def _counts(found: Knowledge) -> str:
    parts = [("class", found.classes), ("example", found.examples), ("document", found.documents)]
    return ", ".join(_count(len(rows), name) for name, rows in parts if rows)


def _count(number: int, name: str) -> str:
    return (
        f"{number} {name}" if number == 1 else f"{number} {name}{'es' if name == 'class' else 's'}"
    )


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
            "is there already", where=path, remedy="Name a new file; nobody's work is written over."
        )
