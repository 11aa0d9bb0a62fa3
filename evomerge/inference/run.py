"""Tasks in, answers out: every answer is kept when it is there, and a run that was killed goes on
where it stopped.

Which prompts share a batch is a function of the tasks and the settings. What is left of a batch
that a kill has cut is answered together, so no task is answered twice; in bfloat16 that may choose
other words than the whole batch would have.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from evomerge.answering.engine import Answer, Engine, Settings
from evomerge.answering.prompts import Prompt, Prompter
from evomerge.errors import EngineError, TaskError
from evomerge.inference.part import FIRST, Part, replace
from evomerge.tasks import Task

Progress = Callable[[int, int], None]
UNFINISHED = "time limit"  # what the mark of an unfinished task says


@runtime_checkable
class AnswersEach(Protocol):
    """An engine whose answers depend on no other prompt, given as they come; see
    answering/server.py.
    """

    def answer_each(
        self,
        prompts: Sequence[str],
        settings: Settings = None,
        deadline: float | None = None,
        shorter: Callable[[int], str | None] | None = None,
    ) -> Iterator[tuple[int, Answer]]: ...


@dataclass(frozen=True)
class Done:
    """What a run has come to: numbers of tasks; `partial` of the unfinished ones have the beginning
    of an answer.
    """

    answered: int
    unfinished: int = 0
    partial: int = 0
    told: tuple[str, ...] = ()  # lines on what was done beside answering


class Refining(Protocol):
    """What may answer some tasks again and choose; see selfcheck.py and best_of.py."""

    def __call__(self, run: Run, chosen: dict[int, Answer]) -> str:
        """Change `chosen`, the answers by the tasks' places, and return a line on it. `run.ask`
        answers again.
        """


@dataclass
class Run:
    """One run under way."""

    engine: Engine
    prompter: Prompter
    tasks: Sequence[Task]
    prompts: Sequence[Prompt]
    part: Part
    deadline: float | None = None  # a time.monotonic()
    progress: Progress | None = None
    # first answers that the deadline has ended
    cut: dict[int, Answer] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def ask(self, asked: Mapping[int, Prompt], name: str = FIRST) -> dict[int, Answer]:
        """The answers of a round to prompts by the tasks' places, those that are kept and, until
        the time is up, the others.
        """
        places, prompts = list(asked), list(asked.values())
        # answers of a round to other prompts, or with other settings, are of another round
        if name != FIRST:
            name = f"{name} {_hash([[p.text, p.settings.model_dump()] for p in prompts])[:12]}"
        kept = self.part.of(name)
        texts, settings = [prompt.text for prompt in prompts], self.prompter.settings(prompts)
        batches = make_batches(self.engine, texts, settings)
        # the cheapest first: the most answers are there when it comes
        if self.deadline is not None:
            batches.sort(key=lambda batch: sum(cost(prompts[i]) for i in batch) / len(batch))
        missing = [[i for i in batch if places[i] not in kept] for batch in batches]
        if isinstance(self.engine, AnswersEach):
            self._ask_each([i for batch in missing for i in batch], places, prompts, name)
        else:
            for batch in filter(None, missing):
                if self.over:
                    break
                self._ask_batch(batch, places, texts, settings, name)
        return {place: kept[place] for place in places if place in kept}

    def _ask_batch(
        self,
        batch: Sequence[int],
        places: Sequence[int],
        texts: Sequence[str],
        settings: Settings,
        name: str,
    ) -> None:
        """Answer what is missing of a batch; each answer is kept when it has ended."""
        told: set[int] = set()

        def got(at: int, answer: Answer) -> None:
            told.add(at)
            self._keep({places[batch[at]]: answer}, name)

        own = None if settings is None else [settings[i] for i in batch]
        answers = self.engine.answer([texts[i] for i in batch], own, got, self.deadline)
        self.part.limit(self.engine.limits)
        rest = {
            places[i]: answer
            for at, (i, answer) in enumerate(zip(batch, answers, strict=True))
            if at not in told
        }
        if not self.over:
            self._keep(rest, name)
        elif name == FIRST:
            self.cut |= rest

    def _ask_each(
        self, order: Sequence[int], places: Sequence[int], prompts: Sequence[Prompt], name: str
    ) -> None:
        """All that is missing, as it comes."""
        assert isinstance(self.engine, AnswersEach)
        now = {at: prompts[i] for at, i in enumerate(order)}

        def shorter(at: int) -> str | None:
            found = self.prompter.shorter(now[at])
            now[at] = found or now[at]
            return None if found is None else found.text

        asked = [now[at] for at in range(len(order))]
        texts = [prompt.text for prompt in asked]
        if texts and not self.over:
            for at, answer in self.engine.answer_each(
                texts, self.prompter.settings(asked), self.deadline, shorter
            ):
                self._keep({places[order[at]]: answer}, name)

    def _keep(self, answers: Mapping[int, Answer], name: str) -> None:
        self.part.add(answers, name)
        if self.progress is not None and answers and name == FIRST:
            self.progress(len(self.part.answers), len(self.tasks))


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
    """Answer every task and write `out`: JSON lines of `task_id`, `input`, `output`, in the order
    of the tasks.

    With a knowledge base, `out` with the suffix .classes.jsonl holds `task_id`, `class`,
    `similarity`, `examples` (rows of the sheet). `model` names all that the answers depend on
    beside the prompts: weights and generation settings; a run is continued only under the same one.
    `progress` gets (answered, total). At `deadline`, a time.monotonic(), `out` is
    written with what there is: a task without an answer has `output` empty or cut and a fourth key
    `unfinished`, and the same command goes on with those. `refine` may answer tasks again and
    choose, one after the other.
    Raises TaskError: a text that UTF-8 cannot hold. InputError: OUT.part is from other tasks,
    prompts or models.
    OutputError: no space, no permission; what was answered is kept. EngineError: as the engine
    raises it.
    """
    out = Path(out)
    _check_texts(tasks)
    prompts = prompter.prepare([task.input for task in tasks])
    texts, settings = [prompt.text for prompt in prompts], prompter.settings(prompts)
    header = {
        "tasks": _hash([[t.task_id, t.input] for t in tasks]),
        "prompts": _hash(
            texts if settings is None else [texts, [own.model_dump() for own in settings]]
        ),
        "model": _hash([model]),
        "batches": _hash(_checked_batches(engine, tasks, texts, settings)),
    }
    with Part(out, header, len(tasks)) as part:
        engine.limits.update(part.limits)
        run = Run(engine, prompter, tasks, prompts, part, deadline, progress)
        if progress is not None:
            progress(len(part.answers), len(tasks))
        try:
            chosen = run.ask(dict(enumerate(prompts)))
        except EngineError:
            if deadline is not None:  # who has a limit has a file in the end
                _finish(out, run, dict(part.answers), False, "error")
            raise
        told = [step(run, chosen) for step in refine] if len(chosen) == len(tasks) else []
        whole = len(chosen) == len(tasks) and not (refine and run.over)
        if told and not whole:
            told.append(
                "the time limit came before everything was asked again: the same command goes on with it"
            )
        _finish(out, run, chosen, whole)
    partial = sum(bool(answer.text) for answer in run.cut.values())
    return Done(len(chosen), len(tasks) - len(chosen), partial, tuple(told))


def make_batches(engine: Engine, texts: Sequence[str], settings: Settings) -> list[list[int]]:
    """Which prompts share a batch; one each, where the engine's answers depend on no other prompt."""
    return (
        [[i] for i in range(len(texts))]
        if isinstance(engine, AnswersEach)
        else engine.batches(texts, settings)
    )


def _checked_batches(
    engine: Engine, tasks: Sequence[Task], texts: Sequence[str], settings: Settings
) -> list[list[int]]:
    """As `make_batches`; a prompt that is too long is named by its task."""
    try:
        return make_batches(engine, texts, settings)
    except EngineError as error:
        if error.found not in texts:
            raise
        task = tasks[texts.index(str(error.found))]
        remedy = f"{error.remedy} A class of the base may set it, too; --max-new-tokens goes before both."
        raise EngineError(
            error.what, where=f"task {task.task_id}", found=task.input, remedy=remedy
        ) from error


def cost(prompt: Prompt) -> int:
    """What an answer may take, for putting tasks in order: a new token is worth many that are read
    at once.
    """
    return len(prompt.text) + 16 * prompt.settings.max_new_tokens


def _finish(
    out: Path, run: Run, chosen: Mapping[int, Answer], whole: bool, why: str = UNFINISHED
) -> None:
    """Put the files in their places; OUT.part goes last, so that a kill in between costs no answer,
    and stays for what is unfinished.
    """
    try:
        if any(prompt.choice is not None for prompt in run.prompts):
            replace(
                out.with_suffix(".classes.jsonl"),
                (_class_row(t, p) for t, p in zip(run.tasks, run.prompts, strict=True)),
            )
        replace(
            out,
            (_row(task, chosen.get(i), run.cut.get(i), why) for i, task in enumerate(run.tasks)),
        )
        if whole:
            run.part.path.unlink()
    except OSError as error:
        raise run.part.error(error) from error


def _row(task: Task, answer: Answer | None, cut: Answer | None, why: str) -> dict[str, Any]:
    if answer is not None:
        return {"task_id": task.task_id, "input": task.input, "output": answer.text}
    return {
        "task_id": task.task_id,
        "input": task.input,
        "output": "" if cut is None else cut.text,
        "unfinished": why,
    }


def _class_row(task: Task, prompt: Prompt) -> dict[str, Any]:
    choice = prompt.choice
    assert choice is not None, "a base gives every task a class"
    return {
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
                "the text holds half of a surrogate pair",
                where=f"task {task.task_id!r}",
                found=error.object[error.start : error.end],
                remedy="Write the character whole.",
            ) from error


def _hash(value: object) -> str:
    return sha256(json.dumps(value).encode()).hexdigest()
