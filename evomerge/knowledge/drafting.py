"""Drafts a knowledge base from tasks that have references."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from evomerge.errors import KnowledgeError
from evomerge.knowledge.formats.csv_format import TEMPLATE
from evomerge.knowledge.records import Example, Knowledge, KnowledgeClass
from evomerge.knowledge.retrieval.interface import comparison_key
from evomerge.tasks import Task

ONLY_CLASS = "一般"  # of tasks that have no kind

DRAFTED = (
    ("evomerge", "Knowledge base drafted from tasks with references / 課題から作った下書き"),
    (
        "What is left to do",
        "Describe each class, write its system text and its template, remove poor examples, and "
        "run evomerge knowledge check FILE.\n"
        "種類ごとの説明、システム文、テンプレートを書き、よくない手本を消してください。",
    ),
)


@dataclass(frozen=True)
class Draft:
    """`skipped` tasks have no reference; `kept_out` ones are not in the study's search split."""

    knowledge: Knowledge
    skipped: int
    kept_out: int


def draft(
    tasks: Sequence[Task],
    where: str,
    study: tuple[Sequence[Task], Collection[int | str]] | None = None,
) -> Draft:
    """A class for each `kind`, in the order of the file; an example for each task with a reference.

    `study` holds all tasks of a study and the ids of its search split: a task becomes an example
    only if its input occurs in the split and in no other task of the study (compared in Unicode
    NFKC without spaces). Raises KnowledgeError where no example is left.
    """
    left = list(tasks)
    if study is not None:
        own, search = study
        seen, unseen = set(), set()
        for task in own:
            if task.stored_id in search:
                seen.add(comparison_key(task.input))
            else:
                unseen.add(comparison_key(task.input))
        only_seen = seen - unseen
        left = []
        for task in tasks:
            if comparison_key(task.input) in only_seen:
                left.append(task)
    useful = [task for task in left if task.output.strip()]
    if not useful:
        raise KnowledgeError(
            "no task has a reference to draft an example from",
            where=where,
            remedy="Give the tasks a field `output` with a good answer.",
        )
    names = [task.kind.strip() or ONLY_CLASS for task in useful]
    classes = tuple(KnowledgeClass(name, "", TEMPLATE) for name in dict.fromkeys(names))
    examples = []
    for row, (name, task) in enumerate(zip(names, useful, strict=True), start=2):
        examples.append(Example(row, name, task.input, task.output))
    knowledge = Knowledge(classes, tuple(examples))
    return Draft(knowledge, len(left) - len(useful), len(tasks) - len(left))
