"""The result of an inference run: the answers, and how many tasks have one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from evomerge.inference.answer_file import Done


@dataclass(frozen=True)
class AnswerRecord:
    """The answer to one task.

    `unfinished` says why there is no whole answer (None: there is one); `class_name` is the task's
    class where a knowledge base gave it one; `truncated`: the longest length has ended the answer;
    `thoughts`: what the model thought before it, without the marks. The numbers of tokens are None
    of a model that has no thoughts.
    """

    task_id: int | str
    input: str
    output: str
    unfinished: str | None = None
    class_name: str | None = None
    truncated: bool = False
    thoughts: str = ""
    answer_tokens: int | None = None
    thought_tokens: int | None = None


@dataclass(frozen=True)
class InferenceResult(Sequence[AnswerRecord]):
    """The answers in the order of the tasks; `notes` tell what was done besides answering.

    `partial` of the `unfinished` tasks have the beginning of an answer; a server has `refused`
    others. `out` is the file with the answers, None where none was requested; `made` is False where
    it held them already.
    """

    records: tuple[AnswerRecord, ...]
    answered: int
    unfinished: int
    partial: int
    notes: tuple[str, ...]
    out: Path | None
    refused: int = 0
    made: bool = True

    @overload
    def __getitem__(self, index: int) -> AnswerRecord: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[AnswerRecord, ...]: ...
    def __getitem__(self, index: int | slice) -> AnswerRecord | tuple[AnswerRecord, ...]:
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[AnswerRecord]:
        return iter(self.records)


def read_result(written: Path, done: Done, out: Path | None) -> InferenceResult:
    """The result of a run that wrote its answers to `written`."""
    classes: dict[str, str] = {}
    beside = written.with_suffix(".classes.jsonl")
    if beside.exists():
        classes = {str(row["task_id"]): row["class"] for row in _rows(beside)}
    records = []
    for row in _rows(written):
        class_name = classes.get(str(row["task_id"]))
        records.append(AnswerRecord(**row, class_name=class_name))
    return InferenceResult(
        tuple(records),
        done.answered,
        done.unfinished,
        done.partial,
        done.told,
        out,
        done.refused,
        done.made,
    )


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield json.loads(line)
