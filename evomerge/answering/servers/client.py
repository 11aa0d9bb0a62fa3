"""One client of OpenAI-compatible servers, for answers and for grades.

It holds the connection and the key, lists models, sends a request again after a passing failure,
and says in words why a request failed. What a failure means to the user is up to the caller.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypeVar

from evomerge.answering.servers.bounded import OversizedReply, bounded_http
from evomerge.answering.servers.openai_protocol import (
    FilteredReply,
    api_key,
    is_filtered,
    is_too_long,
    message_of,
)
from evomerge.errors import EngineError, ModelError

T = TypeVar("T")
# Waits before the next attempt, given the server's Retry-After and our own delay, both in
# seconds; False: do not try again.
Pause = Callable[[float | None, float], bool]
Kind = Literal["timeout", "unreachable", "broken", "status", "unreadable", "filtered"]

CONNECT = 10.0  # seconds
LONGEST_WAIT = 600.0  # seconds of a Retry-After that we wait at most
PASSING = (408, 409, 425, 429)  # statuses that may pass, and all from 500 on
OF_A_PROMPT = (400, 413, 422, 451)  # statuses of a request that is refused for what it contains
LISTED = 20  # models that a message names
LINE = 300  # characters of a server's message that ours shows
REFUSED = (401, 403)


@dataclass(frozen=True)
class RetryPolicy:
    """How often a failed request is repeated; the delay starts at `back_off` s and doubles."""

    retries: int
    back_off: float = 0.5
    longest_pause: float = 8.0

    def delay(self, attempt: int) -> float:
        """Seconds before the next attempt, with jitter so that requests do not fail in step."""
        seconds = min(self.longest_pause, self.back_off * 2.0**attempt)
        return seconds * random.uniform(0.75, 1.25)


@dataclass
class ServerFailure(Exception):
    """Why a request failed.

    `said` is one line, without the key. `unreachable` means that no connection was made, `broken`
    that one was lost, `unreadable` that the reply has not the protocol's shape, `filtered` that a
    content filter took the place of the reply.
    """

    kind: Kind
    said: str
    status: int | None = None
    retry_after: float | None = None
    too_long: bool = False
    filtered: bool = False
    attempts: int = 1

    @property
    def in_words(self) -> str:
        """The status, if there is one, and what the server said."""
        if self.status is None:
            return self.said
        return f"status {self.status}: {self.said}"

    @property
    def refused(self) -> bool:
        """Whether the key is missing or wrong."""
        return self.status in REFUSED and not self.filtered

    @property
    def of_a_prompt(self) -> bool:
        """Whether this prompt may be what the server refuses, rather than every request."""
        return self.too_long or self.filtered or self.status in OF_A_PROMPT

    @property
    def passes(self) -> bool:
        """Whether another attempt may succeed."""
        if self.too_long or self.filtered:
            return False
        return self.status is None or self.status in PASSING or self.status >= 500


class OpenAIClient:
    """The `openai` package's client with our retries; safe among threads."""

    def __init__(self, url: str, timeout: float) -> None:
        """`timeout` is in seconds, for the whole of a reply, which has a largest size too.

        The key comes from the environment.

        Raises ImportError without the package openai, InputError for a key that no header can
        carry.
        """
        import openai

        self.url, self.timeout = url, timeout
        self.key = api_key()
        self.errors: Any = openai
        limits = openai.Timeout(timeout, connect=min(CONNECT, timeout))
        # A server without keys accepts any key, and without one the client would not start.
        self.sdk: Any = openai.OpenAI(
            base_url=url,
            api_key=self.key or "none",
            max_retries=0,
            timeout=limits,
            http_client=bounded_http(openai.DefaultHttpxClient),
        )

    def request(self, send: Callable[[Any], T], policy: RetryPolicy, pause: Pause) -> T:
        """The result of `send(sdk)`, which is repeated after failures that may pass.

        Raises ServerFailure; any other exception of `send` passes through.
        """
        attempt = 0
        while True:
            try:
                return send(self.sdk)
            except self.request_errors as error:
                failure = self.failure(error)
                failure.attempts = attempt + 1
                asked = failure.retry_after
                given_up = attempt >= policy.retries or (asked or 0.0) > LONGEST_WAIT
                if given_up or not failure.passes or not pause(asked, policy.delay(attempt)):
                    raise failure from error
            attempt += 1

    @property
    def request_errors(self) -> tuple[type[Exception], ...]:
        """What a request raises: the package's errors, and those of replies of another shape."""
        # RecursionError: JSON that is nested too deeply
        shapes = (ValueError, TypeError, AttributeError, RecursionError)
        bounds = (TimeoutError, OversizedReply)
        return (self.errors.OpenAIError, FilteredReply, *bounds, *shapes)

    def models(self) -> list[str]:
        """The models that the server lists; none where its list cannot be read.

        Raises ServerFailure.
        """
        quick = self.sdk.with_options(timeout=min(self.timeout, 2 * CONNECT))

        def send(_: Any) -> list[str]:
            # as plain JSON: an object for each of many models would take seconds
            reply = quick.models.with_raw_response.list().http_response.json()
            found = reply.get("data") if isinstance(reply, dict) else None
            rows = [row for row in found or [] if isinstance(row, dict)]
            return [row["id"] for row in rows if isinstance(row.get("id"), str)]

        try:
            return self.request(send, RetryPolicy(1), waiting)
        except ServerFailure as failure:
            if failure.kind == "unreadable":
                return []
            raise

    def failure(self, error: Exception) -> ServerFailure:
        """An exception of a request in words."""
        e = self.errors
        if isinstance(error, e.APIStatusError):
            return ServerFailure(
                "status",
                self.hidden(message_of(error)),
                status=error.status_code,
                retry_after=retry_after(error.response.headers),
                too_long=is_too_long(error),
                filtered=is_filtered(error),
            )
        if isinstance(error, FilteredReply):
            return ServerFailure("filtered", self.hidden(str(error)), filtered=True)
        causes = (error, error.__cause__)  # some versions of the package wrap every error
        if any(isinstance(cause, TimeoutError | e.APITimeoutError) for cause in causes):
            return ServerFailure("timeout", f"no whole reply within {self.timeout:g} s")
        for cause in causes:
            if isinstance(cause, OversizedReply):
                return ServerFailure("unreadable", str(cause))
        if isinstance(error, e.APIConnectionError):
            said = self.hidden(str(error.__cause__ or error))
            return ServerFailure("unreachable" if _never_connected(error) else "broken", said)
        return ServerFailure("unreadable", self.hidden(str(error)))

    def hidden(self, text: str) -> str:
        """The text as one line of at most 300 characters, without the key."""
        if self.key:
            text = text.replace(self.key, "***")
        text = " ".join(text.split())
        return text if len(text) <= LINE else text[: LINE - 1] + "…"

    def close(self) -> None:
        """End running requests, whose threads fail immediately."""
        self.sdk.close()


def waiting(asked: float | None, delay: float) -> bool:
    """Sleep as long as the server asks, or for our own delay."""
    time.sleep(delay if asked is None else asked)
    return True


def names(listed: Sequence[str]) -> str:
    """Models for a message: twenty at most, and how many more there are."""
    shown = ", ".join(name[:LINE] for name in listed[:LISTED])
    more = len(listed) - LISTED
    return f"{shown} and {more} more" if more > 0 else shown


def only_model(listed: Sequence[str], url: str, remedy: str) -> str:
    """The only model of a list. Raises ModelError for none or several; `remedy` says what to do."""
    if len(listed) == 1:
        return listed[0]
    if not listed:
        raise ModelError("the server lists no models", where=url, remedy=remedy)
    what = f"the server lists {len(listed)} models"
    raise ModelError(what, where=url, remedy=f"{remedy} It lists: {names(listed)}.")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks us to wait, or None if it does not say.

    Reads retry-after-ms, then Retry-After as a number or as a date (RFC 9110, section 10.2.3).
    """
    text = headers.get("retry-after-ms")
    if text is not None:
        with suppress(ValueError):  # Retry-After may say it as well
            return max(0.0, float(text) / 1000)
    text = headers.get("retry-after")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            date = parsedate_to_datetime(text)  # in GMT, even if the zone is missing
        except ValueError:
            return None
        aware = date if date.tzinfo else date.replace(tzinfo=UTC)
        seconds = aware.timestamp() - time.time()
    return max(0.0, seconds) if seconds == seconds else None


def _never_connected(error: Any) -> bool:
    """Whether no server listens there, rather than a connection that broke."""
    cause = type(error.__cause__).__name__
    return cause in ("ConnectError", "UnsupportedProtocol", "ConnectTimeout")


def connect(url: str, timeout: float) -> OpenAIClient:
    """A client for answers. Raises EngineError without the package openai, InputError."""
    try:
        return OpenAIClient(url, timeout)
    except ImportError as error:
        raise EngineError(
            "using a server requires the package openai",
            where="--server",
            remedy="Run pip install 'evomerge[server]'.",
        ) from error
