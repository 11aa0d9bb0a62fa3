"""When the next request may be sent: the rate, the server's Retry-After, and the budget."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from evomerge.errors import JudgePaused
from evomerge.judging.llm.grades_cache import Usage

GOES_ON = "All grades are kept: run the same command again to resume."
MILLION = 1_000_000


@dataclass
class Budget:
    """Limits of requests, tokens and money.

    A request may be sent while what was spent, plus running requests at the mean usage so far, is
    below every limit. So a limit of tokens or money is exceeded by at most the first requests.
    """

    max_requests: int | None = None
    max_tokens: int | None = None
    max_cost: float | None = None
    input_price: float = 0.0  # per million tokens
    output_price: float = 0.0
    spent: Usage = field(default_factory=Usage)
    running: int = 0
    replies: int = 0  # with known usage, in this run
    replied: Usage = field(default_factory=Usage)  # the usage of those
    lock: threading.Lock = field(default_factory=threading.Lock)

    def cost(self, usage: Usage) -> float:
        """The cost, in the currency of the prices."""
        prompts = usage.prompt_tokens * self.input_price
        replies = usage.reply_tokens * self.output_price
        return (prompts + replies) / MILLION

    def take(self) -> None:
        """Count a request before it is sent. Raises JudgePaused: a limit is reached."""
        with self.lock:
            share = 0.0
            if self.replies:
                share = self.running / self.replies
            requests = self.spent.requests + self.running
            tokens = _tokens(self.spent) + share * _tokens(self.replied)
            money = self.cost(self.spent) + share * self.cost(self.replied)
            self._check("max_requests", requests, self.max_requests, "requests")
            self._check("max_tokens", tokens, self.max_tokens, "tokens")
            self._check("max_cost", money, self.max_cost, "of cost")
            self.running += 1

    def give(self, usage: Usage) -> None:
        """Note that a request has ended; `usage` is what it used."""
        with self.lock:
            self.running -= 1
            self.spent += usage
            if _tokens(usage):
                self.replies += 1
                self.replied += usage

    def _check(self, key: str, expected: float, limit: float | None, unit: str) -> None:
        if limit is not None and expected >= limit:
            raise JudgePaused(
                f"paused: the judge's budget of {limit:g} {unit} is spent",
                remedy=f"Raise judge.{key} and run the same command: all grades are kept.",
            )


class RateLimit:
    """At most `per_minute` requests, and none while the server asks us to wait."""

    def __init__(self, per_minute: float | None) -> None:
        self.gap = 0.0
        if per_minute:
            self.gap = 60.0 / per_minute
        self.next = 0.0
        self.lock = threading.Lock()

    def wait(self, stop: threading.Event) -> bool:
        """Wait for our turn; False if `stop` was set before it came."""
        while True:
            with self.lock:
                now = time.monotonic()
                left = self.next - now
                if left <= 0:
                    self.next = now + self.gap
                    return not stop.is_set()
            if stop.wait(left):
                return False

    def hold(self, seconds: float) -> None:
        """Let no request through for this many seconds."""
        with self.lock:
            self.next = max(self.next, time.monotonic() + seconds)


def _tokens(usage: Usage) -> int:
    return usage.prompt_tokens + usage.reply_tokens
