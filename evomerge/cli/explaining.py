"""infer --explain: the class and the examples of each task, without answering it."""

from __future__ import annotations

import argparse
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from evomerge.console import Console, put, put_json
from evomerge.tasks import Task, load_tasks

if TYPE_CHECKING:
    from evomerge.knowledge.chooser import Chooser, TaskKnowledge

WIDTH = 80  # columns of a terminal
WIDTHS = (10, 14, 5, 14)  # task_id, class, confidence, examples; the input gets the rest
LABEL = 18  # columns of a class in the confusion table


def explain(args: argparse.Namespace, chooser: Chooser, console: Console) -> None:
    """Print each task's class, confidence and examples.

    A confusion table follows where the tasks' `kind` holds their true classes.
    """
    tasks = load_tasks(args.tasks)
    choices = chooser.choose_all([task.input for task in tasks])
    if args.json:
        for record in json_records(tasks, choices):
            put_json(record)
    else:
        for line in table(tasks, choices):
            put(line)
    names = [found.name for found in chooser.knowledge.classes]
    say = console.say if args.json else put  # stdout is lines of JSON, or a table
    for i, line in enumerate(confusion_table(tasks, choices, names)):
        if not i and not args.json:
            put()
        say(line)


def json_records(
    tasks: Sequence[Task], choices: Sequence[TaskKnowledge]
) -> Iterator[dict[str, object]]:
    """task_id, class, confidence, and the rows of the examples in the prompt, nearest last."""
    for task, choice in zip(tasks, choices, strict=True):
        rows = [example.row for example in choice.examples]
        yield {
            "task_id": task.task_id,
            "class": choice.class_name,
            "confidence": round(choice.confidence, 4),
            "examples": rows,
        }


def table(tasks: Sequence[Task], choices: Sequence[TaskKnowledge]) -> Iterator[str]:
    """The choices as a table, at most WIDTH columns wide."""
    yield _row("task", "class", "conf.", "rows", "input")
    for task, choice in zip(tasks, choices, strict=True):
        rows = " ".join(str(example.row) for example in choice.examples)
        text = " ".join(task.input.split())
        confidence = f"{choice.confidence:.2f}"
        yield _row(str(task.task_id), choice.class_name, confidence, rows, text)


def confusion_table(
    tasks: Sequence[Task], choices: Sequence[TaskKnowledge], names: Sequence[str]
) -> Iterator[str]:
    """True classes as rows, predicted ones as columns, by the numbers of the rows.

    Empty where no task's `kind` is a class.
    """
    from evomerge.knowledge.classification.by_neighbours import confusion

    true, found = [], []
    for task, choice in zip(tasks, choices, strict=True):
        if task.kind.strip():
            true.append(task.kind.strip())
            found.append(choice.class_name)
    if not set(true) & set(names):
        return
    counts = confusion(true, found, names)
    right = sum(a == b for a, b in zip(true, found, strict=True))
    share = right / len(true)
    yield f"right: {right} of {len(true)} ({share:.3f}); rows: true class, columns: predicted class"
    cell = max(3, len(str(counts.max())) + 1)
    # with many classes, as many columns as fit; the first line counts all of them
    shown = min(len(names), (WIDTH - LABEL) // cell)
    yield " " * LABEL + _cells(range(1, shown + 1), cell)
    for i, name in enumerate([*names, *sorted(set(true) - set(names))]):
        number = f"{i + 1:>2} " if i < len(names) else " - "
        yield number + fit(name, LABEL - 3) + _cells(counts[i][:shown], cell)


def _cells(numbers: Iterable[int], width: int) -> str:
    return "".join(f"{number:>{width}}" for number in numbers)


def _row(*cells: str) -> str:
    *first, last = cells
    fixed = [fit(cell, width) for cell, width in zip(first, WIDTHS, strict=True)]
    left = WIDTH - sum(WIDTHS) - len(WIDTHS)
    return " ".join([*fixed, fit(last, left)]).rstrip()


def fit(text: str, width: int) -> str:
    """Padded or cut to `width` columns; a point marks a cut."""
    text = _printable("".join(c if c.isprintable() else "?" for c in text))
    whole = sum(map(_columns, text))
    if whole <= width:
        return text + " " * (width - whole)
    kept, left = "", width - 1
    for character in text:
        if _columns(character) > left:
            break
        kept += character
        left -= _columns(character)
    return kept + "." + " " * left


def _columns(character: str) -> int:
    """Columns of a terminal: East Asian wide characters take two, combining ones none."""
    if unicodedata.combining(character):
        return 0
    if unicodedata.east_asian_width(character) in "WFA":
        return 2
    return 1


def _printable(text: str) -> str:
    """Half of a surrogate pair becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")
