"""Progress and messages on stderr: one line rewritten on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

PLAIN_EVERY = 10.0  # seconds between plain progress lines
DETAIL_EVERY = 60.0  # seconds of silence before a plain line says how far a single candidate is


class Console:
    """`say` leaves a line; `status` is overwritten by what comes next."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.tty = self.stream.isatty()
        self._width = 0
        self._last = time.monotonic()

    def say(self, text: str) -> None:
        self._clear()
        print(text, file=self.stream, flush=True)

    def status(self, text: str, detail: bool = False) -> None:
        """On a terminal at once; elsewhere a line at most every ten seconds, or every minute for a detail."""
        if self.tty:
            self._clear()
            self.stream.write(text)
            self.stream.flush()
            self._width = 2 * len(text)  # East Asian characters are two columns wide
        elif time.monotonic() - self._last >= (DETAIL_EVERY if detail else PLAIN_EVERY):
            self._last = time.monotonic()
            print(text, file=self.stream, flush=True)

    def _clear(self) -> None:
        if self._width:
            self.stream.write("\r\x1b[2K")
            self._width = 0


def duration(seconds: float) -> str:
    """12 s, 3 min, 2.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
