"""Sends one request to the judge's server, within its budget and rate, until a reply arrives."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.answering.servers.client import (
    LONGEST_WAIT,
    OpenAIClient,
    RetryPolicy,
    ServerFailure,
    names,
    only_model,
    waiting,
)
from evomerge.answering.servers.openai_protocol import (
    KEY,
    is_filtered,
    is_too_long,
    message_of,
    read_reply,
    server_url,
)
from evomerge.errors import EvomergeError, InputError, JudgeError, JudgePaused, ModelError
from evomerge.judging.llm.budget import GOES_ON, Budget, RateLimit
from evomerge.judging.llm.grades_cache import Usage
from evomerge.judging.llm.judge_prompt import RESPONSE_FORMAT
from evomerge.study import JUDGE_MODEL, JudgeSection

OPENAI = "https://api.openai.com/v1"
URL = "OPENAI_BASE_URL"
WHERE = "judge.base_url"
MOST_TOKENS = 10**9  # of one request; more is no count
LONGEST_PAUSE = 60.0  # seconds between two attempts, where the server names no time


class Stopped(Exception):
    """The run has ended, and this request was not finished."""


class TooLong(Exception):
    """This request and its reply do not fit the model's context; others may."""


class Refused(Exception):
    """The server refuses what this request contains, and takes others."""


@dataclass(frozen=True)
class Reply:
    """What the judge said, and what that request used."""

    text: str
    usage: Usage


class JudgeClient:
    """The client of a judge on any OpenAI-compatible server. Safe among threads."""

    def __init__(
        self, section: JudgeSection, budget: Budget, keep: Callable[[Usage], None]
    ) -> None:
        """`keep` is given what a request used that brought no reply. Lists the models once.

        Raises InputError (openai is not installed, no key, a wrong address, no server there) and
        ModelError.
        """
        self.section, self.budget, self.keep = section, budget, keep
        self.url = server_url(section.base_url or os.environ.get(URL) or OPENAI, where=WHERE)
        self.client = self._connect()
        if self.url == OPENAI and not self.client.key:
            raise InputError(
                "the judge has no key",
                where="judge",
                remedy=f"Set {KEY}, or judge.base_url for a server of your own.",
            )
        self.rate = RateLimit(section.requests_per_minute)
        self.retries = RetryPolicy(section.retries, section.back_off, LONGEST_PAUSE)
        self.unsupported: set[str] = set()  # optional fields that the server does not accept
        self.grades = False  # whether it has replied to a request with this rubric
        self._trying = threading.Lock()
        self.model = ""
        listed = self._list()
        named = section.model or os.environ.get(JUDGE_MODEL)
        self.model = named or only_model(listed, self.url, f"Set judge.model, or {JUDGE_MODEL}.")
        if listed and self.model not in listed:  # some servers have more models than they list
            self._probe(listed)

    def ask(
        self,
        messages: list[dict[str, str]],
        seed: int | None,
        stop: threading.Event,
        shortest: list[dict[str, str]] | None = None,
    ) -> Reply:
        """Return the reply; the budget counts its usage, and the caller stores it.

        Raises JudgePaused: the budget or the retries are used up; InputError: the server refuses
        access; TooLong; Stopped; Refused: it refuses this request, although it takes one with the
        messages `shortest`, which are sent where it has not replied to any yet.
        """

        def pause(asked: float | None, delay: float) -> bool:
            if asked is not None:
                self.rate.hold(asked)  # for every request, not for this one only
            else:
                stop.wait(delay)
            return True

        def send(sdk: Any) -> Reply:
            while True:
                reply = self._send(sdk, messages, seed, stop)
                if reply is not None:
                    return reply

        try:
            return self.client.request(send, self.retries, pause)
        except ServerFailure as failure:
            if failure.too_long:
                raise TooLong(failure.said) from failure
            if failure.of_a_prompt and shortest is not None and self._takes(shortest, seed, stop):
                raise Refused(failure.in_words) from failure
            raise self._error(failure) from failure

    def _takes(
        self, shortest: list[dict[str, str]], seed: int | None, stop: threading.Event
    ) -> bool:
        """Whether the server replies to requests with this rubric. Raises as `ask`."""
        with self._trying:
            if not self.grades:
                self.unsupported.discard("response_format")  # it may not have been the reason
                try:
                    self.keep(self.ask(shortest, seed, stop).usage)
                except (TooLong, JudgeError, InputError):
                    return False
        return True

    def _send(
        self, sdk: Any, messages: list[dict[str, str]], seed: int | None, stop: threading.Event
    ) -> Reply | None:
        """One request; None if the server refused an optional field, which is then left out."""
        if stop.is_set() or not self.rate.wait(stop):
            raise Stopped
        self.budget.take()
        usage, sent = Usage(requests=1), self._settings(seed)
        try:
            reply = sdk.chat.completions.create(messages=messages, **sent)
            text = read_reply(reply).text
            usage = _usage(reply, messages, text)
            self.grades = True
            return Reply(text, usage)
        except self.client.request_errors as error:
            self.keep(usage)
            if not self._drop_field(error, sent):
                raise
            return None
        finally:
            self.budget.give(usage)

    def _settings(self, seed: int | None) -> dict[str, Any]:
        """The fields of a request besides its messages."""
        length = "max_tokens"
        if "max_tokens" in self.unsupported:
            length = "max_completion_tokens"
        settings: dict[str, Any] = {
            "model": self.model,
            "temperature": self.section.temperature,
            length: self.section.reply_tokens,
            "response_format": RESPONSE_FORMAT,
        }
        if seed is not None:
            settings["seed"] = seed
        return {name: value for name, value in settings.items() if name not in self.unsupported}

    def _drop_field(self, error: Any, sent: Mapping[str, Any]) -> bool:
        """Whether the server refuses an optional field; from then on it is left out."""
        if getattr(error, "status_code", None) not in (400, 422):
            return False
        if is_too_long(error) or is_filtered(error):
            return False
        said = message_of(error)
        for name in ("max_tokens", "seed", "temperature"):  # reasoning models refuse these
            if name in sent and name in said:
                self.unsupported.add(name)
                return True
        # often refused without an error that names it, but not by a server that has taken it
        if "response_format" in sent and ("response_format" in said or not self.grades):
            self.unsupported.add("response_format")
            return True
        return False

    def _connect(self) -> OpenAIClient:
        try:
            return OpenAIClient(self.url, self.section.timeout)
        except ImportError as error:
            raise InputError(
                "the llm judge needs the package openai",
                where="judge",
                remedy="Run pip install 'evomerge[server]'.",
            ) from error

    def _list(self) -> list[str]:
        """The models that the server lists; none where it lists none.

        Raises InputError: there is no server, or it requires a key.
        """
        try:
            return self.client.models()
        except ServerFailure as failure:
            if failure.kind == "unreachable":
                raise InputError(
                    f"the judge's server cannot be reached: {failure.said}",
                    where=self.url,
                    remedy=f"Start it, or check {WHERE}.",
                ) from failure
            if failure.refused:
                raise self._error(failure) from failure
        return []

    def _probe(self, listed: Sequence[str]) -> None:
        """Raise ModelError if the server does not know a model that it does not list."""
        turns = [{"role": "user", "content": "1"}]

        def send(sdk: Any) -> Any:
            return sdk.chat.completions.create(model=self.model, messages=turns, max_tokens=1)

        try:
            self.client.request(send, RetryPolicy(0), waiting)
        except ServerFailure as failure:  # other failures show at the first real request
            if failure.status in (400, 404, 422) and "max_tokens" not in failure.said:
                raise self._unknown(failure.said, listed) from failure

    def _error(self, failure: ServerFailure) -> EvomergeError:
        """A failed request as an error for the user; its retries are over."""
        status = failure.status
        said = failure.said
        if status is not None:
            said = f"status {status}: {failure.said}"
        if failure.kind == "unreadable":
            said = f"a reply that cannot be read: {failure.said}"
        if failure.retry_after is not None and failure.retry_after > LONGEST_WAIT:
            what = f"paused: the server asks us to wait {failure.retry_after:.0f} s: {said}"
            return JudgePaused(what, where=self.url, remedy=GOES_ON)
        if failure.passes:
            times = f"{failure.attempts} times in a row"
            if failure.attempts == 1:
                times = "once"
            what = f"paused: the judge failed {times}: {said}"
            return JudgePaused(what, where=self.url, remedy=GOES_ON)
        if failure.refused:
            remedy = f"Set {KEY}."
            if self.client.key:
                remedy = f"Check the key in {KEY}."
            what = f"the judge's server refused access with {said}"
            return InputError(what, where=self.url, remedy=remedy)
        about_model = "model" in said.lower() or self.model in said
        if self.model and status in (400, 404, 422) and about_model:
            return self._unknown(failure.said, ())
        what = f"the judge's server answered with {said}"
        if status == 404:
            return InputError(what, where=self.url, remedy=f"Check {WHERE} and judge.model.")
        return JudgeError(what, where=self.url, remedy=GOES_ON)

    def _unknown(self, said: str, listed: Sequence[str]) -> ModelError:
        remedy = "Check judge.model."
        if listed:
            remedy = f"It lists: {names(listed)}."
        what = f"the judge's server refuses this model: {said}"
        return ModelError(what, where=self.url, found=self.model, remedy=remedy)


def _usage(reply: Any, messages: Sequence[dict[str, str]], text: str) -> Usage:
    """The usage by the server's count; else one token per character, an overestimate."""
    usage = getattr(reply, "usage", None)
    prompt = _count(usage, "prompt_tokens")
    replied = _count(usage, "completion_tokens")
    if prompt is None:
        prompt = sum(len(message["content"]) for message in messages)
    if replied is None:
        replied = len(text)
    return Usage(1, prompt, replied)


def _count(usage: Any, name: str) -> int | None:
    """A number of tokens that a server reports, if it is one that a reply can have."""
    value = getattr(usage, name, None)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_TOKENS:
        return None
    return value
