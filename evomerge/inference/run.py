"""Tasks in, answers out: in batches, in input order, going on where a killed run stopped.

While a run is under way its answers stand in OUT.part: a header that says what they were made from, then a line per
finished batch. Batches are kept whole, because the answers of a padded batch may depend on what shares it; an engine
that answers every prompt by itself has batches of one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from evomerge.answering.engine import Answer, Engine
from evomerge.errors import TaskError
from evomerge.inference.part import Part, replace
from evomerge.knowledge.base import Knowledge, render
from evomerge.knowledge.retrieve import Choice, Chooser
from evomerge.tasks import Task

Progress = Callable[[int, int], None]


class Renders(Protocol):
    """What makes the whole prompt of a task's text; see answering/prompts.py."""

    def render(self, text: str, system: str | None = None) -> str: ...


@runtime_checkable
class AnswersEach(Protocol):
    """An engine whose answers depend on no other prompt, given as they come; see answering/server.py."""

    def answer_each(self, prompts: Sequence[str]) -> Iterator[tuple[int, Answer]]: ...


def run_inference(
    engine: Engine,
    prompter: Renders,
    tasks: Sequence[Task],
    out: str | Path,
    knowledge: Knowledge | None = None,
    progress: Progress | None = None,
    *,
    model: str = "",
) -> None:
    """Answer every task and write `out`: JSON lines of `task_id`, `input`, `output`, in the order of the tasks.

    With a knowledge base, `out` with the suffix .classes.jsonl holds `task_id`, `class`, `similarity`, `examples`
    (rows of the sheet). `model` names all that the answers depend on beside the prompts: weights and generation
    settings; a run is continued only under the same one. `progress` gets (answered, total).
    Raises TaskError: a text that UTF-8 cannot hold. InputError: OUT.part is from other tasks, prompts or models.
    OutputError: no space, no permission; what was answered is kept. EngineError: as the engine raises it.
    """
    out = Path(out)
    _check_texts(tasks)
    choices = None if knowledge is None else Chooser(knowledge).choose_all([task.input for task in tasks])
    if choices is None:
        prompts = [prompter.render(task.input) for task in tasks]
    else:
        filled = [render(c.kind.template, t.input, c.examples, c.documents) for t, c in zip(tasks, choices, strict=True)]
        prompts = [prompter.render(text, c.kind.system.strip() or None) for text, c in zip(filled, choices, strict=True)]
    batches = [[i] for i in range(len(prompts))] if isinstance(engine, AnswersEach) else engine.batches(prompts)
    header = {
        "tasks": _hash([[t.task_id, t.input] for t in tasks]),
        "prompts": _hash(prompts),
        "model": _hash([model]),
        "batches": _hash(batches),
    }
    with Part(out, header, len(tasks)) as part:
        if progress is not None:
            progress(len(part.outputs), len(tasks))
        missing = [batch for batch in batches if batch[0] not in part.outputs]
        for batch, answers in _answers(engine, prompts, missing):
            part.add({i: answer.text for i, answer in zip(batch, answers, strict=True)})
            if progress is not None:
                progress(len(part.outputs), len(tasks))
        _finish(out, part, tasks, choices)


def _answers(engine: Engine, prompts: Sequence[str], batches: Sequence[list[int]]) -> Iterator[tuple[list[int], list[Answer]]]:
    """The batches with their answers, in the order in which they come."""
    if isinstance(engine, AnswersEach):
        for at, answer in engine.answer_each([prompts[i] for batch in batches for i in batch]):
            yield batches[at], [answer]
    else:
        for batch in batches:
            yield batch, engine.answer([prompts[i] for i in batch])


def _finish(out: Path, part: Part, tasks: Sequence[Task], choices: Sequence[Choice] | None) -> None:
    """Put the files in their places; OUT.part goes last, so that a kill in between costs no answer."""
    try:
        if choices is not None:
            replace(out.with_suffix(".classes.jsonl"), (_class_row(t, c) for t, c in zip(tasks, choices, strict=True)))
        replace(out, ({"task_id": t.task_id, "input": t.input, "output": part.outputs[i]} for i, t in enumerate(tasks)))
        part.path.unlink()
    except OSError as error:
        raise part.error(error) from error


def _class_row(task: Task, choice: Choice) -> dict[str, Any]:
    return {
        "task_id": task.task_id,
        "class": choice.class_name,
        "similarity": round(choice.similarity, 4),
        "examples": [example.row for example in choice.examples],
    }


def _check_texts(tasks: Sequence[Task]) -> None:
    for task in tasks:
        try:
            f"{task.task_id}{task.input}".encode()
        except UnicodeEncodeError as error:
            raise TaskError(
                "the text holds half of a surrogate pair",
                where=f"task {task.task_id!r}",
                found=error.object[error.start : error.end],
                remedy="Write the character whole.",
            ) from error


def _hash(value: object) -> str:
    return sha256(json.dumps(value).encode()).hexdigest()
