"""One question to the judge's server: sent again after what passes, and a plain line after what
does not.
"""

from __future__ import annotations

import os
import random
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.answering.servers.openai_protocol import (
    KEY,
    api_key,
    message_of,
    read_reply,
    server_url,
)
from evomerge.errors import EvomergeError, InputError, JudgeError, JudgePaused, ModelError
from evomerge.judging.llm.budget import GOES_ON, Budget, Gate, retry_after
from evomerge.judging.llm.grades_cache import Spent
from evomerge.judging.llm.rubric import RESPONSE_FORMAT
from evomerge.study import JUDGE_MODEL, JudgeSection

OPENAI = "https://api.openai.com/v1"
URL = "OPENAI_BASE_URL"
WHERE = "judge.base_url"
CONNECT = 10.0  # seconds
LONGEST_PAUSE = 60.0  # seconds between two tries, where the server names none
LONGEST_WAIT = 600.0  # seconds that a server may ask us to wait before the run pauses instead
PASSING = (408, 409, 425, 429)  # and 5xx
LISTED = 20  # models that an error names
# How OpenAI, vLLM, SGLang, llama.cpp and TGI say that prompt and reply do not fit into the model's
# context.
_CONTEXT = re.compile(
    r"context[ _](?:length|size|window)|max_model_len|must be <= ?\d", re.IGNORECASE
)


class Stopped(Exception):
    """The run has ended meanwhile, and this question was not asked to its end."""


class TooLong(Exception):
    """This question and its reply do not fit into the model's context; others may."""


@dataclass(frozen=True)
class Reply:
    """What the judge said, and what that request has cost."""

    text: str
    cost: Spent


class Asker:
    """The `openai` client to any compatible server. Safe among threads."""

    def __init__(
        self, section: JudgeSection, budget: Budget, keep: Callable[[Spent], None]
    ) -> None:
        """`keep` gets the cost of what gave no reply. Asks the server once which models it has.

        Raises InputError (no package, no key, a wrong address or nobody there), ModelError.
        """
        self.section, self.budget, self.keep = section, budget, keep
        self.url = server_url(section.base_url or os.environ.get(URL) or OPENAI, where=WHERE)
        self.key = api_key()
        if self.url == OPENAI and not self.key:
            raise InputError(
                "the judge has no key",
                where="judge",
                remedy=f"Set {KEY}, or judge.base_url for a server of your own.",
            )
        self.client, self.errors = self._connect()
        self.gate = Gate(section.requests_per_minute)
        self.plain: set[str] = set()  # optional parts of a request that the server does not take
        listed = self._list()
        self.model = section.model or os.environ.get(JUDGE_MODEL) or _only(listed, self.url)
        if listed and self.model not in listed:  # some servers know more than they list
            self._probe(listed)

    def ask(self, messages: list[dict[str, str]], seed: int | None, stop: threading.Event) -> Reply:
        """The reply; its cost is counted in the budget, and the caller keeps it. Raises
        JudgePaused: the budget is spent or the retries are; InputError: the server refuses;
        TooLong; Stopped.
        """
        tries = 0
        while True:
            if stop.is_set() or not self.gate.wait(stop):
                raise Stopped
            self.budget.take()
            cost, sent = Spent(requests=1), self._settings(seed)
            try:
                reply = self.client.chat.completions.create(messages=messages, **sent)
                text = read_reply(reply).text
                cost = _cost(reply, messages, text)
                return Reply(text, cost)
            except self.errors.APIStatusError as error:
                self.keep(cost)
                if error.status_code == 413 or (
                    error.status_code in (400, 422) and _CONTEXT.search(message_of(error))
                ):
                    raise TooLong(self._hidden(message_of(error))) from error
                if self._plainer(error, sent):
                    continue
                if error.status_code not in PASSING and error.status_code < 500:
                    raise self._refused(error) from error
                said, asked = self._said(error), retry_after(error.response.headers)
            except (self.errors.OpenAIError, ValueError, TypeError, AttributeError) as error:
                # torn, late, or no JSON of that shape
                self.keep(cost)
                said, asked = self._said(error), None
            finally:
                self.budget.give(cost)
            self._pause(tries, said, asked, stop)
            tries += 1

    def _settings(self, seed: int | None) -> dict[str, Any]:
        """What a request holds beside its messages."""
        length = "max_completion_tokens" if "max_tokens" in self.plain else "max_tokens"
        settings = {
            "model": self.model,
            "temperature": self.section.temperature,
            length: self.section.reply_tokens,
        }
        settings |= {"response_format": RESPONSE_FORMAT} | ({} if seed is None else {"seed": seed})
        return {name: value for name, value in settings.items() if name not in self.plain}

    def _pause(self, tries: int, said: str, asked: float | None, stop: threading.Event) -> None:
        """Wait before the next try. Raises JudgePaused when it was the last one."""
        if asked is not None and asked > LONGEST_WAIT:
            raise JudgePaused(
                f"paused: the server asks us to wait {asked:.0f} s: {said}",
                where=self.url,
                remedy=GOES_ON,
            )
        if tries >= self.section.retries:
            raise JudgePaused(
                f"paused: the judge failed {tries + 1} times in a row: {said}",
                where=self.url,
                remedy=GOES_ON,
            )
        if asked is not None:
            self.gate.hold(asked)  # for all that is asked, not this alone
            return
        seconds = min(LONGEST_PAUSE, self.section.back_off * 2**tries)
        # so that what failed together is not repeated together
        stop.wait(seconds * random.uniform(0.75, 1.25))

    def _plainer(self, error: Any, sent: Mapping[str, Any]) -> bool:
        """Whether the server refuses an optional part of what was sent that can be left out from
        here on.
        """
        if error.status_code not in (400, 422):
            return False
        said = message_of(error)
        # models that think refuse them
        named = [
            name for name in ("max_tokens", "seed", "temperature") if name in sent and name in said
        ]
        refused = named[:1] or [name for name in ("response_format",) if name in sent]
        self.plain.update(refused)
        return bool(refused)

    def _connect(self) -> tuple[Any, Any]:
        try:
            import openai
        except ImportError as error:
            raise InputError(
                "the llm judge needs the package openai",
                where="judge",
                remedy="Run pip install 'evomerge[server]'.",
            ) from error
        timeout = openai.Timeout(self.section.timeout, connect=min(CONNECT, self.section.timeout))
        return openai.OpenAI(
            base_url=self.url, api_key=self.key or "none", max_retries=0, timeout=timeout
        ), openai

    def _list(self) -> list[str]:
        """The models that the server lists; none where it lists none. Raises InputError: nobody is
        there, or it wants a key.
        """
        try:
            page = self.client.with_options(max_retries=1).models.list()
            return [
                m.id
                for m in getattr(page, "data", None) or []
                if isinstance(getattr(m, "id", None), str)
            ]
        except self.errors.APITimeoutError:
            return []
        except self.errors.APIConnectionError as error:
            if not _nobody(error):
                return []
            raise InputError(
                f"the judge's server cannot be reached: {self._hidden(str(error.__cause__ or error))}",
                where=self.url,
                remedy=f"Start it, or check {WHERE}.",
            ) from error
        except self.errors.APIStatusError as error:
            if error.status_code in (401, 403):
                raise self._refused(error) from error
        except (self.errors.OpenAIError, ValueError, TypeError, AttributeError):
            # not JSON, or of another shape
            pass
        return []

    def _probe(self, listed: Sequence[str]) -> None:
        """Raise ModelError when the server does not know a model that it does not list."""
        try:
            self.client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": "1"}], max_tokens=1
            )
        except self.errors.APIStatusError as error:
            if error.status_code in (400, 404, 422) and "max_tokens" not in message_of(error):
                raise self._unknown(message_of(error), listed) from error
        except (self.errors.OpenAIError, ValueError):  # the first question will tell
            pass

    def _refused(self, error: Any) -> EvomergeError:
        said, status = self._hidden(message_of(error)), error.status_code
        if status in (401, 403):
            remedy = f"Check the key in {KEY}." if self.key else f"Set {KEY}."
            return InputError(
                f"the judge's server refused us with status {status}: {said}",
                where=self.url,
                remedy=remedy,
            )
        if (
            status in (400, 404, 422)
            and hasattr(self, "model")
            and ("model" in said.lower() or self.model in said)
        ):
            return self._unknown(said, ())
        what = f"the judge's server answered with status {status}: {said}"
        if status == 404:
            return InputError(what, where=self.url, remedy=f"Check {WHERE} and judge.model.")
        return JudgeError(what, where=self.url, remedy=GOES_ON)

    def _unknown(self, said: str, listed: Sequence[str]) -> ModelError:
        names = ", ".join(listed[:LISTED]) + (
            f" and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
        )
        remedy = f"It lists: {names}." if listed else "Check judge.model."
        return ModelError(
            f"the judge's server refuses this model: {self._hidden(said)}",
            where=self.url,
            found=self.model,
            remedy=remedy,
        )

    def _said(self, error: Exception) -> str:
        e = self.errors
        if isinstance(error, e.APIStatusError):
            return f"status {error.status_code}: {self._hidden(message_of(error))}"
        if isinstance(error, e.APITimeoutError):
            return f"no reply within {self.section.timeout:g} s"
        if isinstance(error, e.APIConnectionError):
            return self._hidden(str(error.__cause__ or error))
        return f"a reply that is none: {self._hidden(str(error))}"

    def _hidden(self, text: str) -> str:
        """The text without the key, and not longer than a line may be."""
        text = " ".join((text.replace(self.key, "***") if self.key else text).split())
        return text if len(text) <= 200 else text[:199] + "…"


def _nobody(error: Any) -> bool:
    """Whether nobody listens there, rather than a connection that broke."""
    return type(error.__cause__).__name__ in (
        "ConnectError",
        "UnsupportedProtocol",
        "ConnectTimeout",
    )


def _only(listed: Sequence[str], url: str) -> str:
    if len(listed) == 1:
        return listed[0]
    names = f" Its models: {', '.join(listed[:LISTED])}." if listed else ""
    raise ModelError(
        "which model judges is not said",
        where=url,
        remedy=f"Set judge.model, or {JUDGE_MODEL}.{names}",
    )


def _cost(reply: Any, messages: Sequence[dict[str, str]], text: str) -> Spent:
    """As the server counts; where it does not, a token for each character, which is more than it
    will be.
    """
    usage = getattr(reply, "usage", None)
    counted = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    guess = [sum(len(m["content"]) for m in messages), len(text)]
    prompt, replied = (
        c if isinstance(c, int) and not isinstance(c, bool) and c >= 0 else g
        for c, g in zip(counted, guess, strict=True)
    )
    return Spent(1, prompt, replied)
