"""How fast answers come: tokens per second, and how long the rest may take."""

from __future__ import annotations

import time
from collections.abc import Callable

from evomerge.console import duration

EVERY = 0.2  # seconds between two reports


class Pace:
    """Counts the answers to `total` prompts; `report` gets a line now and then, and one at the end.

    Answers that were paid for before count as answered and not as speed.
    """

    def __init__(
        self,
        total: int,
        report: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.total, self.report, self.clock = total, report, clock
        self.answered = 0  # all whose batch is done, found ones too
        # answers made here, their new tokens, and the time that took
        self.fresh, self.tokens, self.seconds = 0, 0, 0.0
        self._under_way, self._began, self._shown = (0, 0), clock(), -EVERY

    def begin(self) -> None:
        """A batch begins."""
        self._began, self._under_way = self.clock(), (0, 0)

    def watch(self, ended: int, tokens: int) -> None:
        """See `Engine.watch`."""
        self._under_way = ended, tokens
        if self.report and self.clock() - self._shown >= EVERY:
            self._shown = self.clock()
            self.report(self.line())

    def end(self, answers: int, tokens: int) -> None:
        """A batch is answered."""
        self.seconds += self.clock() - self._began
        self.fresh, self.tokens, self._under_way = (
            self.fresh + answers,
            self.tokens + tokens,
            (0, 0),
        )
        self._began = self.clock()
        self.found(answers)

    def found(self, answers: int) -> None:
        """So many more answers are there."""
        self.answered += answers
        if self.report:
            self.report(self.line())

    @property
    def rate(self) -> float | None:
        """New tokens per second of the batches answered here; None when there were none."""
        return self.tokens / self.seconds if self.seconds else None

    def line(self) -> str:
        """answered 12/50  310 tokens/s  ETA 3 min."""
        ended, tokens = self._under_way
        text = f"answered {self.answered + ended}/{self.total}"
        seconds = self.seconds + (self.clock() - self._began if tokens else 0.0)
        ended, tokens = self.fresh + ended, self.tokens + tokens
        if not tokens or not seconds:
            return text
        text += f"  {tokens / seconds:.0f} tokens/s"
        left = self.total - self.answered - self._under_way[0]
        return f"{text}  ETA {duration(seconds / ended * left)}" if ended and left else text
