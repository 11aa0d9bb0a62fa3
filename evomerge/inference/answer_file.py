"""Tasks in, a file of answers out; every answer is stored immediately, and a killed run resumes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.answering.engine import Answer, Engine, PromptSettings
from evomerge.answering.prompts import Prompt, Prompter
from evomerge.answering.thoughts import bare_thoughts
from evomerge.errors import EngineError, TaskError
from evomerge.finished import record_made
from evomerge.inference.part import CLASSES, Part, replace
from evomerge.inference.run import Progress, Refining, Run, digest, make_batches
from evomerge.tasks import Task

UNFINISHED = "time limit"  # the mark of an unfinished task
REFUSED = "refused"  # what the mark of a task begins with that a server has refused
LATE = (
    "the time limit was reached before every retry was done: run the same command again to resume"
)


@dataclass(frozen=True)
class Done:
    """How a run ended, in numbers of tasks.

    `partial` of the `unfinished` ones have part of an answer; a server has `refused` others.
    """

    answered: int
    unfinished: int = 0
    partial: int = 0
    told: tuple[str, ...] = ()  # lines about what was done besides answering
    refused: int = 0
    made: bool = True  # False: the answers were there already


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
    facts: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Done:
    """Answer every task and write `out`: JSON lines of `task_id`, `input`, `output`, in order.

    An answer that was cut off has `truncated` as well; one of a model that thinks has `thoughts`,
    `answer_tokens` and `thought_tokens`.

    With a knowledge base, `out` with the suffix .classes.jsonl holds `task_id`, `class`,
    `similarity`, `examples` (rows of the sheet). `model` identifies all that the answers depend on
    besides the prompts: a run is resumed only under the same one. `progress` gets (answered,
    total). At `deadline`, a time.monotonic(), `out` is written with what exists: a task without an
    answer has an empty or cut `output` and a key `unfinished`; running again finishes it. So does a
    task that a server refuses.
    The steps of `refine` may answer tasks again and choose, one after the other. `facts` are kept
    with the answers, see finished.py; `overwrite` gives up the unfinished answers of another run.

    Raises TaskError: a text that UTF-8 cannot hold. InputError: OUT.part is from other tasks,
    prompts or models. OutputError: no space, no permission; what was answered is kept. EngineError.
    """
    out = Path(out)
    _check_texts(tasks)
    prompts = prompter.prepare([task.input for task in tasks])
    header = _header(engine, prompter, tasks, prompts, model)
    with Part(out, header, len(tasks), overwrite) as part:
        engine.limits.update(part.limits)
        run = Run(engine, prompter, tasks, prompts, part, deadline, progress)
        if progress is not None:
            progress(len(part.answers), len(tasks))
        try:
            chosen = run.ask(dict(enumerate(prompts)))
        except EngineError:
            if deadline is not None:  # a run with a limit always ends with a file
                _finish(out, run, dict(part.answers), False, facts, why="error")
            raise
        unfinished = len(tasks) - len(chosen) - len(run.refused)
        whole = not unfinished and not run.refused
        told = _refusals(run)
        if not unfinished and refine:
            told += [step(run, chosen) for step in refine]
            if run.over:
                whole = False
                told.append(LATE)
        _finish(out, run, chosen, whole, facts)
    partial = sum(bool(answer.whole) for answer in run.cut.values())
    return Done(len(chosen), unfinished, partial, tuple(told), len(run.refused))


def _refusals(run: Run) -> list[str]:
    """A line about the prompts that the server has refused, if there are any."""
    if not run.refused:
        return []
    first = min(run.refused)
    return [
        f"the server refused {len(run.refused)} of {len(run.tasks)} tasks, which are marked in the "
        f"file (task {run.tasks[first].task_id}: {run.refused[first]}); "
        "run the same command again to ask them again"
    ]


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
        made_from = [texts, [own.made_from() for own in settings]]
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
    out: Path,
    run: Run,
    chosen: Mapping[int, Answer],
    whole: bool,
    facts: Mapping[str, str] | None,
    why: str = UNFINISHED,
) -> None:
    """Put the files in their places.

    OUT.part is removed last, so that a kill in between costs no answer, and stays where something
    is unfinished.
    """
    try:
        if any(prompt.choice is not None for prompt in run.prompts):
            replace(out.with_suffix(CLASSES), _class_rows(run))
        replace(out, _rows(run, chosen, why))
        if facts is not None:
            record_made(out, facts, whole)
        if whole:
            run.part.path.unlink()
    except OSError as error:
        raise run.part.error(error) from error


def _rows(run: Run, chosen: Mapping[int, Answer], why: str) -> Iterator[dict[str, Any]]:
    for i, task in enumerate(run.tasks):
        row: dict[str, Any] = {"task_id": task.task_id, "input": task.input, "output": ""}
        if i in chosen:
            row |= _said(chosen[i], run)
            if chosen[i].truncated:
                row["truncated"] = True
        elif i in run.refused:
            row["unfinished"] = f"{REFUSED}: {run.refused[i]}"
        else:
            if i in run.cut:
                row |= _said(run.cut[i], run)
            row["unfinished"] = why
        yield row


def _said(answer: Answer, run: Run) -> dict[str, Any]:
    """The answer, and beside it what the model thought, without its marks, and their tokens."""
    said: dict[str, Any] = {"output": answer.text}
    if answer.thoughts:
        thoughts = bare_thoughts(answer.thoughts, run.engine.marks)
        if thoughts:
            said["thoughts"] = thoughts
    if answer.thought_tokens is not None:
        said["answer_tokens"] = answer.answer_tokens
        said["thought_tokens"] = answer.thought_tokens
    return said


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
