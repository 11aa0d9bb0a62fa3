"""A running inference: which prompts share a batch, and in which order they are answered.

Which prompts share a batch is a function of the tasks and the settings. The rest of an interrupted
batch is answered together, so no task is answered twice; in bfloat16 such a smaller batch may
choose other words than the whole one would have.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Protocol, runtime_checkable

from evomerge.answering.engine import Answer, Engine, PromptSettings
from evomerge.answering.prompts import Prompt, Prompter
from evomerge.errors import PromptRefused
from evomerge.inference.part import FIRST, Part
from evomerge.tasks import Task

Progress = Callable[[int, int], None]
NEW_TOKEN = 16  # what a new token costs, in characters of a prompt


@runtime_checkable
class AnswersEach(Protocol):
    """An engine whose answers do not depend on other prompts and arrive one by one.

    See answering/servers/engine.py.
    """

    def answer_each(
        self,
        prompts: Sequence[str],
        settings: PromptSettings = None,
        deadline: float | None = None,
        shorter: Callable[[int], str | None] | None = None,
        on_refusal: Callable[[int, PromptRefused], None] | None = None,
    ) -> Iterator[tuple[int, Answer]]: ...


class Refining(Protocol):
    """A step that may answer tasks again and choose: selfcheck.py and best_of.py."""

    def __call__(self, run: Run, chosen: dict[int, Answer]) -> str:
        """Change `chosen`, the answers by task index, with `run.ask`; return a line about it."""


@dataclass
class Run:
    """One running inference; tasks and prompts are in the same order."""

    engine: Engine
    prompter: Prompter
    tasks: Sequence[Task]
    prompts: Sequence[Prompt]
    part: Part
    deadline: float | None = None  # a time.monotonic()
    progress: Progress | None = None
    # first answers that the deadline has cut off
    cut: dict[int, Answer] = field(default_factory=dict)
    # first prompts that a server has refused, and why; the others are answered
    refused: dict[int, str] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def ask(self, asked: Mapping[int, Prompt], name: str = FIRST) -> dict[int, Answer]:
        """The answers of one round to prompts by task index.

        Answers that are kept are reused; the others are made until the time is up.
        """
        places, prompts = list(asked), list(asked.values())
        # answers to other prompts, or with other settings, belong to another round
        if name != FIRST:
            made_from = [[prompt.text, prompt.settings.made_from()] for prompt in prompts]
            name = f"{name} {digest(made_from)[:12]}"
        kept = self.part.of(name)
        texts, settings = [prompt.text for prompt in prompts], self.prompter.settings(prompts)
        batches = make_batches(self.engine, texts, settings)
        # the cheapest first, so that most answers exist when the time is up
        if self.deadline is not None:
            batches.sort(key=lambda batch: sum(cost(prompts[i]) for i in batch) / len(batch))
        missing = []
        for batch in batches:
            missing.append([i for i in batch if places[i] not in kept])
        if isinstance(self.engine, AnswersEach):
            order = []
            for batch in missing:
                order.extend(batch)
            self._ask_each(order, places, prompts, name)
        else:
            for batch in filter(None, missing):
                if self.over:
                    break
                self._ask_batch(batch, places, texts, settings, name)
        found = {}
        for place in places:
            if place in kept:
                found[place] = kept[place]
        return found

    def _ask_batch(
        self,
        batch: Sequence[int],
        places: Sequence[int],
        texts: Sequence[str],
        settings: PromptSettings,
        name: str,
    ) -> None:
        """Answer the missing prompts of a batch; each answer is stored as soon as it has ended."""
        rest = [places[i] for i in batch]
        told: set[int] = set()

        def on_answer(at: int, answer: Answer) -> None:
            told.add(at)
            self._keep({rest[at]: answer}, name)

        own = None if settings is None else [settings[i] for i in batch]
        answers = self.engine.answer([texts[i] for i in batch], own, on_answer, self.deadline)
        self.part.limit(self.engine.limits)
        untold: dict[int, Answer] = {}
        for at, answer in enumerate(answers):
            if at not in told:
                untold[rest[at]] = answer
        if not self.over:
            self._keep(untold, name)
        elif name == FIRST:
            self.cut |= untold

    def _ask_each(
        self, order: Sequence[int], places: Sequence[int], prompts: Sequence[Prompt], name: str
    ) -> None:
        """Answer everything that is missing, in the order of arrival."""
        assert isinstance(self.engine, AnswersEach)
        now = [prompts[i] for i in order]
        if not now or self.over:
            return

        def shorter(at: int) -> str | None:
            found = self.prompter.shorter(now[at])
            if found is None:
                return None
            now[at] = found
            return found.text

        def on_refusal(at: int, error: PromptRefused) -> None:
            if name == FIRST:
                self.refused[places[order[at]]] = error.what

        texts, settings = [prompt.text for prompt in now], self.prompter.settings(now)
        answers = self.engine.answer_each(texts, settings, self.deadline, shorter, on_refusal)
        for at, answer in answers:
            self._keep({places[order[at]]: answer}, name)

    def _keep(self, answers: Mapping[int, Answer], name: str) -> None:
        self.part.add(answers, name)
        if self.progress is not None and answers and name == FIRST:
            self.progress(len(self.part.answers), len(self.tasks))


def make_batches(engine: Engine, texts: Sequence[str], settings: PromptSettings) -> list[list[int]]:
    """Which prompts share a batch: one each where answers do not depend on other prompts."""
    if isinstance(engine, AnswersEach):
        return [[i] for i in range(len(texts))]
    return engine.batches(texts, settings)


def cost(prompt: Prompt) -> int:
    """What an answer may take, to order tasks: a new token costs as much as reading many."""
    return len(prompt.text) + NEW_TOKEN * prompt.settings.max_new_tokens


def digest(value: object) -> str:
    """SHA-256 of a value as JSON."""
    return sha256(json.dumps(value).encode()).hexdigest()
