"""Tasks in, answers out: in batches, in input order, going on where a killed run stopped.

While a run is under way its answers stand in OUT.part: a header that says what they were made from, then a line per
finished batch. Batches are kept whole, because the answers of a padded batch may depend on what shares it; an engine
that answers every prompt by itself has batches of one.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from evomerge.answering.engine import Answer, Engine
from evomerge.errors import InputError, OutputError, TaskError
from evomerge.knowledge.base import Knowledge
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
    prompts = [prompter.render(task.input) for task in tasks] if choices is None else [prompter.render(c.text, c.system) for c in choices]
    batches = [[i] for i in range(len(prompts))] if isinstance(engine, AnswersEach) else engine.batches(prompts)
    header = {
        "tasks": _hash([[t.task_id, t.input] for t in tasks]),
        "prompts": _hash(prompts),
        "model": _hash([model]),
        "batches": _hash(batches),
    }
    with _Part(out, header, len(tasks)) as part:
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


def _finish(out: Path, part: _Part, tasks: Sequence[Task], choices: Sequence[Choice] | None) -> None:
    """Put the files in their places; OUT.part goes last, so that a kill in between costs no answer."""
    try:
        if choices is not None:
            _replace(out.with_suffix(".classes.jsonl"), (_class_row(t, c) for t, c in zip(tasks, choices, strict=True)))
        _replace(out, ({"task_id": t.task_id, "input": t.input, "output": part.outputs[i]} for i, t in enumerate(tasks)))
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


class _Part:
    """OUT.part, open for appending; `outputs` holds what it keeps: index of the task -> output."""

    def __init__(self, out: Path, header: Mapping[str, str], total: int) -> None:
        self.path = out.with_name(out.name + ".part")
        self.outputs: dict[int, str] = {}
        self.total = total
        try:
            if out.exists() and not out.is_file():
                raise OutputError("is no ordinary file", where=out, remedy="Name a file for the answers.")
            out.parent.mkdir(parents=True, exist_ok=True)
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise self.error(error) from error
        try:
            self._lock()
            self._resume(header)
        except BaseException:
            os.close(self.fd)
            raise

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def add(self, outputs: Mapping[int, str]) -> None:
        """Append one batch; it is on the disk when this returns."""
        self._append({"batch": list(outputs), "outputs": list(outputs.values())})
        self.outputs.update(outputs)

    def error(self, error: OSError) -> OutputError:
        kept = f"{len(self.outputs)} of {self.total} answers are kept there. " if self.outputs else ""
        return OutputError(
            f"answers cannot be written: {error.strerror or error}",
            where=self.path,
            remedy=f"{kept}Free some space or change the folder's permissions, and run the same command again.",
        )

    def _lock(self) -> None:
        """The system lets go of the lock when the process ends, however it ends."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                "another run is writing these answers", where=self.path, remedy="Wait for it, or name another --out."
            ) from error

    def _resume(self, header: Mapping[str, str]) -> None:
        with os.fdopen(os.dup(self.fd), "rb") as file:
            whole, newline, _torn = file.read().rpartition(b"\n")
        lines = [_parse(line, self.path, n) for n, line in enumerate(whole.split(b"\n"), start=1)] if newline else []
        if not lines:
            self._truncate(0)
            self._append(header)
            return
        changed = [key for key, value in header.items() if lines[0].get(key) != value]
        if changed:
            raise InputError(
                f"the unfinished answers there were made with other {' and '.join(changed)}",
                where=self.path,
                remedy="Repeat the command that began it, delete the file, or name another --out.",
            )
        for line in lines[1:]:
            self.outputs.update(zip(line["batch"], line["outputs"], strict=True))
        self._truncate(len(whole) + 1)

    def _truncate(self, size: int) -> None:
        try:
            os.ftruncate(self.fd, size)
            os.lseek(self.fd, size, os.SEEK_SET)
        except OSError as error:
            raise self.error(error) from error

    def _append(self, record: Mapping[str, Any]) -> None:
        try:
            _write(self.fd, _line(record))
        except OSError as error:
            raise self.error(error) from error


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        value = error
    wanted = {"prompts"} if number == 1 else {"batch", "outputs"}
    if not isinstance(value, dict) or not wanted <= value.keys():
        raise InputError(
            "holds no unfinished answers that can be read", where=f"{path}, line {number}", remedy="Delete the file, or name another --out."
        )
    return value


def _replace(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the rows beside `path` and rename, so that nobody ever sees half a file. Raises OSError."""
    beside = path.with_name(path.name + ".tmp")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        _write(fd, b"".join(map(_line, rows)))
    except OSError:
        beside.unlink()
        raise
    finally:
        os.close(fd)
    os.replace(beside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename is durable before OUT.part goes
    finally:
        os.close(folder)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.fsync(fd)


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


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
