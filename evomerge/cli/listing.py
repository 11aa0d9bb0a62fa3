"""list, delete: the studies of a storage."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from evomerge.cli.explaining import fit
from evomerge.cli.options import (
    Commands,
    add_command,
    results_option,
    storage_option,
    study_option,
)
from evomerge.console import Console, put, put_json, shown, size
from evomerge.errors import InputError

if TYPE_CHECKING:
    from evomerge.searching.catalogue import Belongings, StudyEntry

# columns of the table, which has 80
NAME, TRIALS, STATE, BEST = 32, 11, 10, 7  # and 16 for the time


def listing_commands(commands: Commands) -> None:
    """list, delete."""
    p = add_command(
        commands,
        "list",
        list_studies,
        "list the studies of a storage: trials, state, best score, last activity",
        "evomerge list\nevomerge list --storage sqlite:///studies.db --json",
    )
    storage_option(p, "any Optuna storage (default: $EVOMERGE_STORAGE, or every storage/*.db)")
    p.add_argument("--json", action="store_true", help="print one JSON array")
    p = add_command(
        commands,
        "delete",
        delete,
        "delete a study: trials, stored answers and grades, results",
        "evomerge delete demo\nevomerge delete demo --yes",
    )
    study_option(p)
    results_option(p)
    p.add_argument("--yes", action="store_true", help="do not ask")


def list_studies(args: argparse.Namespace) -> None:
    """Print a line per study, or one JSON array."""
    import evomerge

    console = Console()
    found = evomerge.list_studies(args.storage, console.say)
    if args.json:
        put_json([entry.to_json() for entry in found])
        return
    if not found:
        console.say("there are no studies; name another --storage, or run `evomerge search`")
        return
    put(_line("study", "candidates", "state", "best", "last activity"))
    for entry in found:
        put(_entry_line(entry))


def _entry_line(entry: StudyEntry) -> str:
    planned: int | str = "?"
    if entry.planned is not None:
        planned = entry.planned
    best, last = "-", "-"
    if entry.best is not None:
        best = f"{entry.best:.3f}"
    if entry.last_activity is not None:
        last = f"{entry.last_activity:%Y-%m-%d %H:%M}"
    return _line(entry.name, f"{entry.trials}/{planned}", entry.state, best, last)


def _line(name: str, trials: str, state: str, best: str, last: str) -> str:
    return f"{fit(name, NAME)} {trials:>{TRIALS}} {state:{STATE}} {best:>{BEST}} {last}"


def delete(args: argparse.Namespace) -> None:
    """Say what goes, ask, and delete it."""
    import evomerge
    from evomerge.api.stored_studies import study_belongings

    console, where = Console(), {"storage": args.storage, "results": args.results}
    if not args.yes:
        for line in _what_goes(args.study, study_belongings(args.study, **where)):
            console.say(line)
        if not _confirmed(args.study):
            raise InputError(
                "nothing was deleted", where=args.study, remedy="Answer y, or add --yes."
            )
    evomerge.delete_study(args.study, **where)
    console.say(f"deleted the study {args.study}")


def _what_goes(name: str, found: Belongings) -> list[str]:
    lines = [f"deleting the study {name} deletes:", f"  its {found.trials} trials"]
    lines += [f"  {path} ({size(n_bytes)})" for path, n_bytes in found.answers.items()]
    lines += [f"  {path}" for path in found.results]
    if found.kept is not None:
        lines.append(f"other files in {found.kept} stay")
    return lines


def _confirmed(name: str) -> bool:
    """Whether the user says yes; without a terminal nobody does."""
    if not sys.stdin.isatty():
        return False
    print(f"delete {shown(name)}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().casefold() in ("y", "yes")
