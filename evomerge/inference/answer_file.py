"""Tasks in, a file of answers out; every answer is stored immediately, and a killed run resumes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.answering.engine import Answer, Engine, PromptSettings
from evomerge.answering.prompts import Prompt, Prompter
from evomerge.errors import EngineError, TaskError
from evomerge.inference.part import CLASSES, Part, replace
from evomerge.inference.run import Progress, Refining, Run, digest, make_batches
from evomerge.tasks import Task

UNFINISHED = "time limit"  # the mark of an unfinished task
LATE = (
    "the time limit was reached before every retry was done: run the same command again to resume"
)


@dataclass(frozen=True)
class Done:
    """How a run ended, in numbers of tasks; `partial` unfinished ones have part of an answer."""

    answered: int
    unfinished: int = 0
    partial: int = 0
    told: tuple[str, ...] = ()  # lines about what was done besides answering


def run_inference(
    engine: Engine,
    prompter: Prompter,
    tasks: Sequence[Task],
    out: str | Path,
    progress: Progress | None = None,
    *,
    model: str = "",
    deadline: float | None = None,
    refine: Sequence[Refining] = (),
) -> Done:
    """Answer every task and write `out`: JSON lines of `task_id`, `input`, `output`, in order.

    With a knowledge base, `out` with the suffix .classes.jsonl holds `task_id`, `class`,
    `similarity`, `examples` (rows of the sheet). `model` identifies all that the answers depend on
    besides the prompts: a run is resumed only under the same one. `progress` gets (answered,
    total). At `deadline`, a time.monotonic(), `out` is written with what exists: a task without an
    answer has an empty or cut `output` and a fourth key `unfinished`; running again finishes it.
    The steps of `refine` may answer tasks again and choose, one after the other.

    Raises TaskError: a text that UTF-8 cannot hold. InputError: OUT.part is from other tasks,
    prompts or models. OutputError: no space, no permission; what was answered is kept. EngineError.
    """
    out = Path(out)
    _check_texts(tasks)
    prompts = prompter.prepare([task.input for task in tasks])
    with Part(out, _header(engine, prompter, tasks, prompts, model), len(tasks)) as part:
        engine.limits.update(part.limits)
        run = Run(engine, prompter, tasks, prompts, part, deadline, progress)
        if progress is not None:
            progress(len(part.answers), len(tasks))
        try:
            chosen = run.ask(dict(enumerate(prompts)))
        except EngineError:
            if deadline is not None:  # a run with a limit always ends with a file
                _finish(out, run, dict(part.answers), whole=False, why="error")
            raise
        whole = len(chosen) == len(tasks)
        told = []
        if whole and refine:
            told = [step(run, chosen) for step in refine]
            if run.over:
                whole = False
                told.append(LATE)
        _finish(out, run, chosen, whole)
    partial = sum(bool(answer.text) for answer in run.cut.values())
    return Done(len(chosen), len(tasks) - len(chosen), partial, tuple(told))


def _header(
    engine: Engine,
    prompter: Prompter,
    tasks: Sequence[Task],
    prompts: Sequence[Prompt],
    model: str,
) -> dict[str, str]:
    """Hashes of everything that the answers are made from."""
    texts, settings = [prompt.text for prompt in prompts], prompter.settings(prompts)
    made_from: list[Any] = texts
    if settings is not None:
        made_from = [texts, [own.model_dump() for own in settings]]
    return {
        "tasks": digest([[task.task_id, task.input] for task in tasks]),
        "prompts": digest(made_from),
        "model": digest([model]),
        "batches": digest(_checked_batches(engine, tasks, texts, settings)),
    }


def _checked_batches(
    engine: Engine, tasks: Sequence[Task], texts: Sequence[str], settings: PromptSettings
) -> list[list[int]]:
    """Call `make_batches`, so that an error about a prompt that is too long names its task."""
    try:
        return make_batches(engine, texts, settings)
    except EngineError as error:
        if error.found not in texts:
            raise
        task = tasks[texts.index(str(error.found))]
        raise EngineError(
            error.what,
            where=f"task {task.task_id}",
            found=task.input,
            remedy=f"{error.remedy} A class of the knowledge base may set it too; "
            "--max-new-tokens overrides both.",
        ) from error


def _finish(
    out: Path, run: Run, chosen: Mapping[int, Answer], whole: bool, why: str = UNFINISHED
) -> None:
    """Put the files in their places.

    OUT.part is removed last, so that a kill in between costs no answer, and stays where something
    is unfinished.
    """
    try:
        if any(prompt.choice is not None for prompt in run.prompts):
            replace(out.with_suffix(CLASSES), _class_rows(run))
        replace(out, _rows(run, chosen, why))
        if whole:
            run.part.path.unlink()
    except OSError as error:
        raise run.part.error(error) from error


def _rows(run: Run, chosen: Mapping[int, Answer], why: str) -> Iterator[dict[str, Any]]:
    for i, task in enumerate(run.tasks):
        row: dict[str, Any] = {"task_id": task.task_id, "input": task.input, "output": ""}
        if i in chosen:
            row["output"] = chosen[i].text
        else:
            if i in run.cut:
                row["output"] = run.cut[i].text
            row["unfinished"] = why
        yield row


def _class_rows(run: Run) -> Iterator[dict[str, Any]]:
    for task, prompt in zip(run.tasks, run.prompts, strict=True):
        choice = prompt.choice
        assert choice is not None, "a knowledge base gives every task a class"
        yield {
            "task_id": task.task_id,
            "class": choice.class_name,
            "confidence": round(choice.confidence, 4),
            "similarity": round(choice.similarity, 4),
            "examples": [example.row for example in prompt.examples],
        }


def _check_texts(tasks: Sequence[Task]) -> None:
    for task in tasks:
        try:
            f"{task.task_id}{task.input}".encode()
        except UnicodeEncodeError as error:
            raise TaskError(
                "the text contains half of a surrogate pair",
                where=f"task {task.task_id!r}",
                found=error.object[error.start : error.end],
                remedy="Write the whole character.",
            ) from error
