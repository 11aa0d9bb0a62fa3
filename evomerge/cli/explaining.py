"""infer --explain: what the knowledge base makes of each task, without a model."""

from __future__ import annotations

import argparse
import json
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from evomerge.console import Console
from evomerge.tasks import Task, load_tasks

if TYPE_CHECKING:
    from evomerge.knowledge.chooser import Chooser, TaskKnowledge

WIDTH = 80  # columns of a terminal
WIDTHS = (10, 14, 5, 14)  # task_id, class, confidence, examples; the input gets the rest


def explain(args: argparse.Namespace, chooser: Chooser, console: Console) -> None:
    """Print class, confidence and examples of each task, and a confusion table where `kind` holds
    true classes.
    """
    tasks = load_tasks(args.tasks)
    choices = chooser.choose_all([task.input for task in tasks])
    for line in json_lines(tasks, choices) if args.json else table(tasks, choices):
        print(line)
    compared = list(confusion_table(tasks, choices, [c.name for c in chooser.knowledge.classes]))
    if args.json and compared:
        console.say("\n".join(compared))  # stdout is lines of JSON
    elif compared:
        print("\n".join(["", *compared]))


def json_lines(tasks: Sequence[Task], choices: Sequence[TaskKnowledge]) -> Iterator[str]:
    """task_id, class, confidence, and the rows of the examples that the prompt would show, nearest
    last.
    """
    for task, choice in zip(tasks, choices, strict=True):
        rows = [example.row for example in choice.examples]
        record = {
            "task_id": task.task_id,
            "class": choice.class_name,
            "confidence": round(choice.confidence, 4),
            "examples": rows,
        }
        yield _printable(json.dumps(record, ensure_ascii=False))


def table(tasks: Sequence[Task], choices: Sequence[TaskKnowledge]) -> Iterator[str]:
    """The same to read, at most WIDTH columns wide."""
    yield _row("task", "class", "conf.", "rows", "input")
    for task, choice in zip(tasks, choices, strict=True):
        rows = " ".join(str(example.row) for example in choice.examples)
        yield _row(
            str(task.task_id),
            choice.class_name,
            f"{choice.confidence:.2f}",
            rows,
            " ".join(task.input.split()),
        )


def confusion_table(
    tasks: Sequence[Task], choices: Sequence[TaskKnowledge], names: Sequence[str]
) -> Iterator[str]:
    """True classes down, found ones across, by the numbers of the rows; nothing where no `kind` is
    a class.
    """
    from evomerge.knowledge.classification.by_neighbours import confusion

    known = [
        (task.kind.strip(), choice.class_name)
        for task, choice in zip(tasks, choices, strict=True)
        if task.kind.strip()
    ]
    if not any(true in names for true, _ in known):
        return
    counts = confusion([true for true, _ in known], [found for _, found in known], names)
    rows = [*names, *sorted({true for true, _ in known} - set(names))]
    right = sum(true == found for true, found in known)
    yield f"right: {right} of {len(known)} ({right / len(known):.3f}); true class down, found across"
    cell = max(3, len(str(counts.max())) + 1)
    # a base of many classes shows what fits; the counts of all are in the first line
    shown = (WIDTH - 18) // cell
    yield " " * 18 + "".join(f"{i:>{cell}}" for i in range(1, len(names) + 1)[:shown])
    for i, name in enumerate(rows):
        number = f"{i + 1:>2} " if i < len(names) else " - "
        yield number + _fit(name, 15) + "".join(f"{n:>{cell}}" for n in counts[i][:shown])


def _row(*cells: str) -> str:
    fixed = " ".join(_fit(cell, width) for cell, width in zip(cells, WIDTHS, strict=False))
    return f"{fixed} {_fit(cells[-1], WIDTH - sum(WIDTHS) - len(WIDTHS))}".rstrip()


def _fit(text: str, width: int) -> str:
    """Padded or cut to `width` columns; East Asian wide characters take two, combining ones none."""
    text = _printable("".join(c if c.isprintable() else "?" for c in text))
    columns = [
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WFA" else 1
        for c in text
    ]
    if sum(columns) <= width:
        return text + " " * (width - sum(columns))
    kept = ""
    for character, columns_of in zip(text, columns, strict=True):
        if columns_of > width - 1:
            break
        kept, width = kept + character, width - columns_of
    return kept + "." + " " * (width - 1)


def _printable(text: str) -> str:
    """Half of a surrogate pair is shown as a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")
