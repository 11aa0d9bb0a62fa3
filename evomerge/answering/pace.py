"""The pace of answers: tokens per second, and how long the rest may take."""

from __future__ import annotations

import time
from collections.abc import Callable

from evomerge.console import duration

EVERY = 0.2  # seconds between two reports


class Pace:
    """Counts the answers to `total` prompts; `report` gets a line now and then, and one at the end.

    Answers from the cache count as answered but not as speed.
    """

    def __init__(
        self,
        total: int,
        report: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.total, self.report, self.clock = total, report, clock
        self.answered = 0  # in complete batches, those from the cache included
        # answers made here, their new tokens, and the time that took
        self.fresh, self.tokens, self.seconds = 0, 0, 0.0
        self._current = (0, 0)  # answers ended, and new tokens, of the current batch
        self._began = clock()
        self._shown = -EVERY

    def begin(self) -> None:
        """Note that a batch begins."""
        self._began = self.clock()
        self._current = (0, 0)

    def watch(self, ended: int, tokens: int) -> None:
        """See `Engine.watch`."""
        self._current = (ended, tokens)
        if self.report and self.clock() - self._shown >= EVERY:
            self._shown = self.clock()
            self.report(self.line())

    def end(self, answers: int, tokens: int) -> None:
        """Note that a batch is answered."""
        self.seconds += self.clock() - self._began
        self.fresh += answers
        self.tokens += tokens
        self.begin()
        self.found(answers)

    def found(self, answers: int) -> None:
        """Count this many more answers as available."""
        self.answered += answers
        if self.report:
            self.report(self.line())

    @property
    def rate(self) -> float | None:
        """New tokens per second of the batches answered here; None if there were none."""
        return self.tokens / self.seconds if self.seconds else None

    def line(self) -> str:
        """answered 12/50  310 tokens/s  ETA 3 min."""
        ended, tokens = self._current
        text = f"answered {self.answered + ended}/{self.total}"
        left = self.total - self.answered - ended
        seconds = self.seconds
        if tokens:
            seconds += self.clock() - self._began
        tokens += self.tokens
        if not tokens or not seconds:
            return text
        text += f"  {tokens / seconds:.0f} tokens/s"
        fresh = self.fresh + ended
        if not fresh or not left:
            return text
        return f"{text}  ETA {duration(seconds / fresh * left)}"
