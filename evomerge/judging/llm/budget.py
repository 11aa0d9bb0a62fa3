"""When the next request may go: the rate, the server's own Retry-After, and what may be spent."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime

from evomerge.errors import JudgePaused
from evomerge.judging.llm.grades_cache import Spent

GOES_ON = "All grades are kept, and the same command goes on."
MILLION = 1_000_000


@dataclass
class Budget:
    """Limits of what is spent. A request is let through while what was spent, and what is under way
    at the mean cost so far, lies below every limit; so a limit of tokens or money is overrun by
    less than what the first requests cost.
    """

    max_requests: int | None = None
    max_tokens: int | None = None
    max_cost: float | None = None
    input_price: float = 0.0  # for a million tokens
    output_price: float = 0.0
    spent: Spent = field(default_factory=Spent)
    under_way: int = 0
    replies: int = 0  # with a known cost, in this run
    replied: Spent = field(default_factory=Spent)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def cost(self, spent: Spent) -> float:
        """In the currency of the prices."""
        return (
            spent.prompt_tokens * self.input_price + spent.reply_tokens * self.output_price
        ) / MILLION

    def take(self) -> None:
        """Count a request in before it is sent. Raises JudgePaused: a limit is reached."""
        with self.lock:
            mean = 1 / self.replies if self.replies else 0.0
            tokens, money = _tokens(self.spent), self.cost(self.spent)
            tokens_ahead, money_ahead = (
                self.under_way * mean * each
                for each in (_tokens(self.replied), self.cost(self.replied))
            )
            for key, limit, now, ahead, unit in (
                (
                    "max_requests",
                    self.max_requests,
                    self.spent.requests + self.under_way,
                    0,
                    "requests",
                ),
                ("max_tokens", self.max_tokens, tokens, tokens_ahead, "tokens"),
                ("max_cost", self.max_cost, money, money_ahead, "of cost"),
            ):
                if limit is not None and now + ahead >= limit:
                    raise JudgePaused(
                        f"paused: the judge's budget of {limit:g} {unit} is spent",
                        remedy=f"Raise judge.{key} and go on: all is kept.",
                    )
            self.under_way += 1

    def give(self, cost: Spent) -> None:
        """A request is over; what it has cost."""
        with self.lock:
            self.under_way -= 1
            self.spent += cost
            if _tokens(cost):
                self.replies += 1
                self.replied += cost


class Gate:
    """Lets requests through one after another, `per_minute` at most, and none while the server asks
    us to wait.
    """

    def __init__(self, per_minute: float | None) -> None:
        self.gap = 60.0 / per_minute if per_minute else 0.0
        self.next = 0.0
        self.lock = threading.Lock()

    def wait(self, stop: threading.Event) -> bool:
        """Until it is our turn; False when `stop` was set before that."""
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
        """Nothing goes for so long."""
        with self.lock:
            self.next = max(self.next, time.monotonic() + seconds)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks us to wait: of retry-after-ms, or Retry-After as a number or a
    date; None if it says nothing.
    """
    text = headers.get("retry-after-ms")
    try:
        if text is not None:
            return max(0.0, float(text) / 1000)
    except ValueError:
        pass
    text = headers.get("retry-after")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            date = parsedate_to_datetime(text)  # in GMT by RFC 9110, whether or not it says so
            seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if seconds == seconds else None


def _tokens(spent: Spent) -> int:
    return spent.prompt_tokens + spent.reply_tokens
