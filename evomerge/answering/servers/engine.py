"""Any OpenAI-compatible server as an engine, for inference only: its weights cannot be merged.

Every prompt is one request, so no answer depends on concurrent ones. With
`format: chat` a prompt is the turns as JSON, which the server's own template renders. Otherwise it
is the whole text, for the completions endpoint, where most servers prepend a begin token if the
model's tokenizer does (the other engines do not).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from evomerge.answering.engine import Answer, OnAnswer, PromptSettings, Watch, settings_of_each
from evomerge.answering.reasoning import THINK, find_marks
from evomerge.answering.servers.client import (
    OpenAIClient,
    RetryPolicy,
    ServerFailure,
    connect,
    only_model,
)
from evomerge.answering.servers.concurrency import ConcurrentRequests
from evomerge.answering.servers.failures import GOES_ON, PENALTY, lasting_error, unknown_model
from evomerge.answering.servers.openai_protocol import (
    TurnsAsJson,
    read_reply,
    request_settings,
    server_url,
    whole,
    with_thoughts,
)
from evomerge.errors import EngineError, EvomergeError, ModelError, PromptRefused
from evomerge.recipe import Recipe
from evomerge.study import GenerationSection

# a prompt's index -> the same prompt with less in it, None where nothing can be dropped
Shorter = Callable[[int], str | None]
OnRefusal = Callable[[int, PromptRefused], None]

CONCURRENCY = 8  # requests at the same time
RETRIES = 5  # retries of a request, after 0.5 to 8 s or as long as Retry-After says
READ = 600.0  # seconds for a whole reply
# by whether it is a chat: a prompt that a server takes if it takes any
SHORTEST = {True: '[{"role": "user", "content": "1"}]', False: "1"}


class ServerEngine:
    """Sends prompts to a server, `concurrency` at a time.

    Inference uses `answer_each`, which yields every answer as it arrives, so that none is requested
    twice.
    """

    batched_candidates = None
    gradient = None
    likelihood = None

    def __init__(
        self,
        url: str,
        model: str | None,
        generation: GenerationSection,
        chat: bool,
        concurrency: int = CONCURRENCY,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        """With `model` None the only model that the server lists is used.

        `variables` are the chat template's, which vLLM, SGLang and llama.cpp take.

        Raises InputError, ModelError; EngineError: the server is down, or openai is not installed.
        """
        self.url = server_url(url)
        self.generation, self.chat, self.concurrency = generation, chat, concurrency
        self.variables = dict(variables or {})
        self.marks = find_marks(generation.reasoning, None, unknown=THINK)
        self.tokenizer: Any = TurnsAsJson()
        self.limits: dict[str, int] = {}  # the server's memory is not ours to manage
        self.context: int | None = None  # unknown: the server refuses a prompt that is too long
        self.watch: Watch | None = None  # a server reports no progress within an answer
        self.takes_prompts = False  # known once it has answered one
        self._trying = threading.Lock()
        self.model: str | None = None
        self.client = connect(self.url, READ)
        listed = self._list(needed=model is None)
        self.model = model
        if model is None:
            self.model = only_model(listed, self.url, "Name one with --model.")

    @property
    def identity(self) -> str:
        """What the answers depend on besides the prompts; the key is not part of it."""
        known: tuple[object, ...] = (self.url, self.model, self.generation, self.chat)
        if self.variables or self.generation.reasoning != "auto":
            known = (*known, self.variables, self.marks)
        return repr(known)

    def apply(self, recipe: Recipe) -> None:
        """Raises EngineError: nothing can be merged on a server."""
        raise EngineError(
            "a server's weights cannot be replaced, so it cannot be used in a search",
            where=self.url,
            remedy="Use another engine.",
        )

    def batches(self, prompts: Sequence[str], settings: PromptSettings = None) -> list[list[int]]:
        """`concurrency` prompts each, in their order."""
        indices = list(range(len(prompts)))
        starts = range(0, len(indices), self.concurrency)
        return [indices[start : start + self.concurrency] for start in starts]

    def answer(
        self,
        prompts: Sequence[str],
        settings: PromptSettings = None,
        on_answer: OnAnswer | None = None,
        deadline: float | None = None,
    ) -> list[Answer]:
        """Answer all prompts, in their order; see `Engine.answer`.

        A request that the deadline cuts off leaves an empty answer. Raises EngineError; ModelError:
        the server does not know the model.
        """
        answers = [Answer("", True, 0)] * len(prompts)
        for index, answer in self.answer_each(prompts, settings, deadline):
            answers[index] = answer
            if on_answer is not None:
                on_answer(index, answer)
        return answers

    def answer_each(
        self,
        prompts: Sequence[str],
        settings: PromptSettings = None,
        deadline: float | None = None,
        shorter: Shorter | None = None,
        on_refusal: OnRefusal | None = None,
    ) -> Iterator[tuple[int, Answer]]:
        """(index of the prompt, answer) as they arrive.

        After a failure no further prompt is sent, running requests are still yielded, and the first
        failure is raised at the end. A prompt that the server refuses while it takes others goes to
        `on_refusal`, and the others are asked. At `deadline`, a time.monotonic(), running requests
        are abandoned. `shorter`, never called twice at the same time, gives another prompt where
        the server says that one is too long, as often as it says so.
        """
        own = settings_of_each(prompts, settings, self.generation)
        client, stop, one = self.client, threading.Event(), threading.Lock()

        def less(index: int) -> str | None:
            if shorter is None:
                return None
            with one:
                return shorter(index)

        def ask(index: int) -> Answer:
            prompt = whole(prompts[index])
            return self._ask(client, prompt, own[index], lambda: less(index), stop)

        requests = ConcurrentRequests(ask, len(prompts), self.concurrency)
        failures: list[EvomergeError] = []
        try:
            for index, found in requests.results(deadline):
                if isinstance(found, Answer):
                    yield index, found
                elif isinstance(found, PromptRefused) and on_refusal is not None:
                    on_refusal(index, found)
                else:
                    requests.waiting.clear()
                    failures.append(found)
        finally:
            stop.set()
            if requests.leave():  # its threads end when their connections do
                client.close()
                self.client = connect(self.url, READ)
        if failures:
            raise failures[0]

    def _ask(
        self,
        client: OpenAIClient,
        prompt: str,
        g: GenerationSection,
        shorter: Callable[[], str | None],
        stop: threading.Event,
    ) -> Answer:
        """One answer. Raises PromptRefused, EngineError, ModelError.

        vLLM and llama.cpp accept a prompt that leaves little room, and cut the answer short. An
        answer with fewer tokens than we allow is requested again with a shorter prompt, as long as
        that makes it longer; where it does not, the server has a limit of its own.
        """
        cut = Answer("", True, 0)  # the best of the attempts
        while True:
            try:
                answer = self._reply(client, prompt, g, stop)
            except ServerFailure as failure:
                less = None
                if failure.too_long:
                    less = shorter()
                if less is None:
                    shortest = partial(self._reply, client, SHORTEST[self.chat], g, stop)
                    raise self._lasting(failure, shortest) from failure
            else:
                self.takes_prompts = True
                if not answer.truncated or not 0 < answer.tokens < g.max_new_tokens:
                    return answer
                if answer.tokens <= cut.tokens:
                    return cut
                less = shorter()
                if less is None:
                    return answer
                cut = answer
            prompt = whole(less)

    def _lasting(self, failure: ServerFailure, shortest: Callable[[], Answer]) -> EvomergeError:
        """The error to raise: PromptRefused where the server takes other prompts.

        Where it has not answered any yet, the shortest one is tried with the same settings.
        """
        error = self._error(failure)
        if not failure.of_a_prompt or isinstance(error, ModelError) or PENALTY in failure.said:
            return error
        with self._trying:
            if not self.takes_prompts:
                try:
                    shortest()
                except (ServerFailure, EngineError):
                    return error
                self.takes_prompts = True
        return PromptRefused(failure.in_words)

    def _reply(
        self, client: OpenAIClient, prompt: str, g: GenerationSection, stop: threading.Event
    ) -> Answer:
        """The server's reply to one prompt. Raises ServerFailure, EngineError."""

        def pause(asked: float | None, delay: float) -> bool:
            if asked is not None:
                delay = asked
            return not stop.wait(delay)

        def send(sdk: Any) -> Answer:
            reply = self._request(sdk, prompt, g)
            return with_thoughts(read_reply(reply), reply, self.marks, prompt)

        try:
            return client.request(send, RetryPolicy(RETRIES), pause)
        except (ServerFailure, EvomergeError):
            raise
        except Exception as error:  # a thread must not end without a message
            said = client.hidden(str(error))
            raise EngineError(
                f"{type(error).__name__}: {said}", where=self.url, remedy=GOES_ON
            ) from error

    def _request(self, sdk: Any, prompt: str, g: GenerationSection) -> Any:
        """One request. Raises openai.OpenAIError, ValueError."""
        settings = request_settings(self.model, g)
        if self.chat:
            if self.variables:
                more = settings.setdefault("extra_body", {})
                more["chat_template_kwargs"] = self.variables
            return sdk.chat.completions.create(messages=json.loads(prompt), **settings)
        return sdk.completions.create(prompt=prompt, **settings)

    def _list(self, needed: bool = False) -> list[str]:
        """The models that the server lists; none where it lists none.

        Raises EngineError: it is down, or the list is `needed` and refused.
        """
        try:
            return self.client.models()
        except ServerFailure as failure:
            if failure.status is None or needed or failure.status == 401:
                raise self._error(failure) from failure
        return []

    def _error(self, failure: ServerFailure) -> EvomergeError:
        """A failed request as an error for the user; its retries are over."""
        if failure.status in (400, 404, 422):
            unknown = unknown_model(failure, self.model, self.url, self._list)
            if unknown is not None:
                return unknown
        return lasting_error(failure, self.client, self.chat)
