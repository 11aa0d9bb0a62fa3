"""Threads that ask for answers one by one, and give each when it comes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue

from evomerge.answering.engine import Answer
from evomerge.errors import EvomergeError


class Asking:
    """Calls `ask(index)` for so many indices, `concurrency` at once; an error of ours ends the
    asking.
    """

    def __init__(self, ask: Callable[[int], Answer], count: int, concurrency: int) -> None:
        self.ask, self.waiting = ask, deque(range(count))
        self.found = SimpleQueue[tuple[int, Answer | EvomergeError] | None]()
        self.running = min(concurrency, count)  # threads whose end is not yet known here
        for _ in range(self.running):  # daemons: neither Ctrl-C nor a deadline waits for a server
            threading.Thread(target=self._work, daemon=True).start()

    def results(
        self, deadline: float | None = None
    ) -> Iterator[tuple[int, Answer | EvomergeError]]:
        """(index, what came of it) as it comes; at the deadline, a time.monotonic(), what has come
        by then, and no more.
        """
        while self.running:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
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
        """Ask nothing more; whether something is still under way."""
        self.waiting.clear()
        return self.running > 0

    def _work(self) -> None:
        try:
            while (index := self._next()) is not None:
                try:
                    self.found.put((index, self.ask(index)))
                except EvomergeError as error:
                    self.waiting.clear()
                    self.found.put((index, error))
        finally:
            self.found.put(None)

    def _next(self) -> int | None:
        """The next place, unless another thread has taken the last one."""
        try:
            return self.waiting.popleft()
        except IndexError:
            return None
