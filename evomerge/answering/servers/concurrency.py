"""Threads that send requests one by one and yield each result as it arrives."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue

from evomerge.answering.engine import Answer
from evomerge.errors import EvomergeError, PromptRefused


class ConcurrentRequests:
    """Calls `ask(index)` for every index below `count`, `concurrency` at a time.

    After an EvomergeError no further call begins, unless it concerns one prompt only. The threads
    are daemons: neither Ctrl-C nor a deadline waits for a server.
    """

    def __init__(self, ask: Callable[[int], Answer], count: int, concurrency: int) -> None:
        self.ask = ask
        self.waiting = deque(range(count))
        self.found = SimpleQueue[tuple[int, Answer | EvomergeError] | None]()
        self.running = min(concurrency, count)  # threads that have not reported their end
        for _ in range(self.running):
            threading.Thread(target=self._work, daemon=True).start()

    def results(
        self, deadline: float | None = None
    ) -> Iterator[tuple[int, Answer | EvomergeError]]:
        """(index, result) as they arrive; none after `deadline`, a time.monotonic()."""
        while self.running:
            left = None
            if deadline is not None:
                left = max(0.0, deadline - time.monotonic())
            if left == 0.0:
                self.waiting.clear()
            try:
                found = self.found.get(timeout=left)
            except Empty:
                return
            if found is None:
                self.running -= 1
            else:
                yield found

    def leave(self) -> bool:
        """Begin no further call; returns whether some are still running."""
        self.waiting.clear()
        return self.running > 0

    def _work(self) -> None:
        try:
            while (index := self._next()) is not None:
                try:
                    self.found.put((index, self.ask(index)))
                except EvomergeError as error:
                    if not isinstance(error, PromptRefused):
                        self.waiting.clear()
                    self.found.put((index, error))
        finally:
            self.found.put(None)

    def _next(self) -> int | None:
        """The next index, unless another thread has taken the last one."""
        try:
            return self.waiting.popleft()
        except IndexError:
            return None
