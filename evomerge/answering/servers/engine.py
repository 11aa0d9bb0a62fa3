"""Any OpenAI-compatible server as an engine, for inference alone: its weights are its own, so
nothing is merged.

Every prompt is a request of its own, so no answer depends on what is asked beside it. With `format:
chat` a prompt is the turns as JSON, which the server's own template renders; otherwise it is the
whole text, for the completions endpoint, where most servers put a begin token in front if the
model's tokenizer does (the other engines do not).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from evomerge.answering.engine import Answer, Got, Settings, Watch
from evomerge.answering.servers.concurrency import Asking
from evomerge.answering.servers.openai_protocol import (
    KEY,
    TurnsAsJson,
    api_key,
    is_too_long,
    message_of,
    read_reply,
    server_url,
    whole,
)
from evomerge.errors import EngineError, EvomergeError, ModelError
from evomerge.recipe import Recipe
from evomerge.study import GenerationSection

# a prompt's index -> the same with less in it, None where nothing can go
Shorter = Callable[[int], str | None]

CONCURRENCY = 8  # requests under way at once
# of a request, after 0.5 to 8 s or what Retry-After says: no connection, 408, 409, 429, 5xx
RETRIES = 5
# of a reply with status 200 that holds no answer, which the client does not repeat
UNREADABLE_RETRIES = 2
FIRST_RETRIES = 1  # of the very first request: a server that is down shall not keep a user waiting
CONNECT, READ = 10.0, 600.0  # seconds
LISTED = 20  # models that an error names
SHORTEN = "Shorten the task, or lower generation.max_new_tokens. What was answered is kept."
GOES_ON = "What was answered is kept: the same command goes on."


class ServerEngine:
    """Asks a server, `concurrency` prompts at once.

    `answer_each` is what inference uses: it gives every answer when it comes, so that none is asked
    for twice.
    """

    population = None
    gradient = None
    likelihood = None

    def __init__(
        self,
        url: str,
        model: str | None,
        generation: GenerationSection,
        chat: bool,
        concurrency: int = CONCURRENCY,
    ) -> None:
        """`model` None takes the only one that the server lists. Raises InputError, ModelError;
        EngineError: the server is down.
        """
        self.url, self.generation, self.chat, self.concurrency = (
            server_url(url),
            generation,
            chat,
            concurrency,
        )
        self.tokenizer: Any = TurnsAsJson()
        self.limits: dict[str, int] = {}  # no memory of ours is short
        self.context: int | None = None  # not known: a prompt that is too long is refused
        self.watch: Watch | None = None  # a server tells nothing before its answers
        self.key = api_key()
        self.client, self.errors = _connect(self.url, self.key)
        listed = self._list(needed=model is None)
        self.model = _only(listed, self.url) if model is None else model

    @property
    def identity(self) -> str:
        """What the answers depend on beside the prompts; the key is no part of it."""
        return repr((self.url, self.model, self.generation, self.chat))

    def apply(self, recipe: Recipe) -> None:
        raise EngineError(
            "a server's weights are its own: it cannot search",
            where=self.url,
            remedy="Use another engine.",
        )

    def batches(self, prompts: Sequence[str], settings: Settings = None) -> list[list[int]]:
        """`concurrency` prompts each, in their order."""
        indices = list(range(len(prompts)))
        return [
            indices[at : at + self.concurrency] for at in range(0, len(indices), self.concurrency)
        ]

    def answer(
        self,
        prompts: Sequence[str],
        settings: Settings = None,
        got: Got | None = None,
        deadline: float | None = None,
    ) -> list[Answer]:
        """Answer all prompts, in their order; see `Engine.answer`. Of what the deadline ends there
        is nothing.

        Raises EngineError; ModelError: the server does not know the model.
        """
        answers = [Answer("", True, 0)] * len(prompts)
        for index, answer in self.answer_each(prompts, settings, deadline):
            answers[index] = answer
            if got is not None:
                got(index, answer)
        return answers

    def answer_each(
        self,
        prompts: Sequence[str],
        settings: Settings = None,
        deadline: float | None = None,
        shorter: Shorter | None = None,
    ) -> Iterator[tuple[int, Answer]]:
        """(index of the prompt, answer) as they come. After a failure nothing new is asked, what is
        under way is still given, and the first failure is raised at the end.

        At `deadline`, a time.monotonic(), what is under way is left. `shorter`, never called twice
        at once, is asked for another prompt where the server says that one is too long, as often as
        it does.
        """
        own, client, one = (
            [self.generation] * len(prompts) if settings is None else settings,
            self.client,
            threading.Lock(),
        )

        def less(index: int) -> str | None:
            with one:
                return None if shorter is None else shorter(index)

        def ask(index: int) -> Answer:
            return self._ask(client, whole(prompts[index]), own[index], lambda: less(index))

        asking, failure = Asking(ask, len(prompts), self.concurrency), None
        try:
            for index, found in asking.results(deadline):
                if isinstance(found, Answer):
                    yield index, found
                else:
                    failure = failure or found
        finally:
            if asking.leave():  # its threads end when their connections do
                client.close()
                self.client, self.errors = _connect(self.url, self.key)
        if failure is not None:
            raise failure

    def _ask(
        self, client: Any, prompt: str, g: GenerationSection, shorter: Callable[[], str | None]
    ) -> Answer:
        """One answer. Raises EngineError, ModelError.

        vLLM and llama.cpp refuse no prompt that leaves little room: they cut the answer short. One
        that has fewer tokens than we allow is asked again with a shorter prompt, as long as that
        makes it longer; where it does not, the server has a limit of its own.
        """
        cut = Answer("", True, 0)  # the best of those
        while True:
            try:
                answer = self._reply(client, prompt, g)
            except self.errors.OpenAIError as error:
                less = shorter() if is_too_long(error) else None
                if less is None:
                    raise self._failure(error) from error
            else:
                if not answer.truncated or not 0 < answer.tokens < g.max_new_tokens:
                    return answer
                if answer.tokens <= cut.tokens or (less := shorter()) is None:
                    return cut if answer.tokens <= cut.tokens else answer
                cut = answer
            prompt = whole(less)

    def _reply(self, client: Any, prompt: str, g: GenerationSection) -> Answer:
        """What the server says to one prompt. Raises openai.OpenAIError, EngineError."""
        for left in reversed(range(UNREADABLE_RETRIES + 1)):
            try:
                return read_reply(self._request(client, prompt, g))
            except self.errors.OpenAIError:
                raise
            except ValueError as error:  # no JSON, or JSON of another shape
                if not left:
                    what = f"the server's reply holds no answer: {self._hidden(str(error))}"
                    raise EngineError(what, where=self.url, remedy=GOES_ON) from error
            except Exception as error:  # a worker must not end without a word
                raise EngineError(
                    f"{type(error).__name__}: {self._hidden(str(error))}",
                    where=self.url,
                    remedy=GOES_ON,
                ) from error
        raise AssertionError("the loop returns or raises")

    def _request(self, client: Any, prompt: str, g: GenerationSection) -> Any:
        """One request. Raises openai.OpenAIError, ValueError."""
        temperature = g.temperature if g.do_sample else 0.0
        settings: dict[str, Any] = {
            "model": self.model,
            "max_tokens": g.max_new_tokens,
            "temperature": temperature,
        }
        if g.stop:
            settings["stop"] = list(g.stop)
        if g.do_sample:
            settings |= {"top_p": g.top_p, "seed": g.seed or 0}
        if g.repetition_penalty != 1.0:  # no field of OpenAI's; vLLM, SGLang and others know it
            settings["extra_body"] = {"repetition_penalty": g.repetition_penalty}
        if self.chat:
            return client.chat.completions.create(messages=json.loads(prompt), **settings)
        return client.completions.create(prompt=prompt, **settings)

    def _list(self, needed: bool = False) -> list[str]:
        """The models that the server lists; none where it lists none. Raises EngineError: it is
        down, or `needed` and refused.
        """
        try:
            page = self.client.with_options(
                max_retries=FIRST_RETRIES, timeout=2 * CONNECT
            ).models.list()
            return [
                m.id
                for m in getattr(page, "data", None) or []
                if isinstance(getattr(m, "id", None), str)
            ]
        except self.errors.APIStatusError as error:
            if needed or error.status_code == 401:
                raise self._failure(error) from error
        except self.errors.OpenAIError as error:
            raise self._failure(error) from error
        except (ValueError, TypeError, AttributeError):  # not JSON, or of another shape
            pass
        return []

    def _failure(self, error: Exception) -> EvomergeError:
        """The client's error as one of ours; its retries are over."""
        e = self.errors
        if isinstance(error, e.APITimeoutError):
            return EngineError(
                f"the server gave no answer within {READ:.0f} s", where=self.url, remedy=GOES_ON
            )
        if isinstance(error, e.APIConnectionError):
            cause = self._hidden(str(error.__cause__ or error))
            return EngineError(
                f"the server cannot be reached: {cause}",
                where=self.url,
                remedy=f"Start it, or check --server. {GOES_ON}",
            )
        if not isinstance(error, e.APIStatusError):
            return EngineError(
                f"{type(error).__name__}: {self._hidden(str(error))}",
                where=self.url,
                remedy=GOES_ON,
            )
        said, status = self._hidden(message_of(error)), error.status_code
        if status in (401, 403):
            remedy = f"Check the key in {KEY}." if self.key else f"Set {KEY}."
            return EngineError(
                f"the server refused us with status {status}: {said}", where=self.url, remedy=remedy
            )
        if status in (400, 404, 422) and (unknown := self._unknown_model(status, said)) is not None:
            return unknown
        if status == 404:
            remedy = "Check --server" + (
                "."
                if self.chat
                else ", or use --format chat: not every server has the completions endpoint."
            )
            return EngineError(
                f"the server answered with status 404: {said}",
                where=error.request.url,
                remedy=remedy,
            )
        remedy = (
            f"Lower --concurrency. {GOES_ON}"
            if status == 429
            else SHORTEN
            if is_too_long(error)
            else GOES_ON
        )
        if "repetition_penalty" in said:  # OpenAI's own, transformers'
            remedy = "Set repetition_penalty to 1: this server does not take it."
        return EngineError(
            f"the server answered with status {status}: {said}", where=self.url, remedy=remedy
        )

    def _unknown_model(self, status: int, said: str) -> ModelError | None:
        """An error that names the server's models, where the status or the words are about a model
        that it does not list.
        """
        model = getattr(self, "model", None)  # not there yet while the list itself is asked for
        if model is None or (status != 404 and model not in said):
            return None
        try:
            listed = self._list()
        except EvomergeError:
            return None
        if not listed or model in listed:
            return None
        return ModelError(
            f"the server knows no such model: {said}",
            where=self.url,
            found=model,
            remedy=f"It lists: {_names(listed)}.",
        )

    def _hidden(self, text: str) -> str:
        """The text without the key, and not longer than a line may be."""
        text = " ".join((text.replace(self.key, "***") if self.key else text).split())
        return text if len(text) <= 300 else text[:299] + "…"


def _connect(url: str, key: str) -> tuple[Any, Any]:
    """(client, the package with its errors). Raises EngineError without the package."""
    try:
        import openai
    except ImportError as error:
        raise EngineError(
            "asking a server needs the package openai",
            where="--server",
            remedy="Run pip install 'evomerge[server]'.",
        ) from error
    timeout = openai.Timeout(READ, connect=CONNECT)
    # a server without keys takes any; without one the client would not start
    return openai.OpenAI(
        base_url=url, api_key=key or "none", max_retries=RETRIES, timeout=timeout
    ), openai


def _only(listed: Sequence[str], url: str) -> str:
    if len(listed) == 1:
        return listed[0]
    found = f"the server lists {len(listed)} models" if listed else "the server lists no model"
    remedy = f"Name one with --model: {_names(listed)}." if listed else "Name one with --model."
    raise ModelError(found, where=url, remedy=remedy)


def _names(listed: Sequence[str]) -> str:
    return ", ".join(listed[:LISTED]) + (
        f" and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
    )
