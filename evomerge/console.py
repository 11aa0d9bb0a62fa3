"""Progress and messages on stderr: one line rewritten on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from typing import TextIO

from evomerge.errors import InputError

PLAIN_EVERY = 10.0  # seconds between plain progress lines
REDRAW_EVERY = 0.1  # seconds between a progress bar's changes
BAR = 24  # its columns
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
        """On a terminal at once; elsewhere a line at most every ten seconds, or every minute for a
        detail.
        """
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


def size(number: float) -> str:
    """Bytes as 512 B, 20.4 kB, 852.6 MB, 26.4 GB."""
    units = ["B", "kB", "MB", "GB"]
    while number >= 1000 and len(units) > 1:
        number /= 1000
        units.pop(0)
    return f"{number:.0f} B" if units[0] == "B" else f"{number:.1f} {units[0]}"


def parse_size(size: str | int) -> int:
    """Bytes of "5GB", "200M", "20K", "5GiB" or a number; "5B" is mergekit's five billion. Raises
    InputError.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(I?)(B?)", str(size).strip().upper())
    if not match or float(match[1]) <= 0 or (match[3] and not match[2]):
        raise InputError(
            "no size of a file",
            where="--out-shard-size",
            found=size,
            remedy="Write 5GB, 200M or a number of bytes.",
        )
    if match[4] and not match[2]:
        return int(float(match[1]) * 1000**3)
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMG".index(match[2] or " "))


def byte_progress(console: Console, doing: str) -> Callable[[int, int], None]:
    """What to call with (bytes done, bytes in all): a bar on a terminal, plain lines elsewhere,
    with rate and time left.
    """
    began = time.monotonic()
    shown = -REDRAW_EVERY

    def progress(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < REDRAW_EVERY and done < total:
            return
        shown = now
        share, seconds = done / total if total else 1.0, now - began
        rate = (
            f"  {size(done / seconds)}/s  ETA {duration(seconds * (1 / share - 1))}"
            if done and seconds
            else ""
        )
        bar = f"[{'#' * int(share * BAR):{BAR}}] " if console.tty else ""
        console.status(f"{doing} {bar}{share:4.0%}  {size(done)} of {size(total)}{rate}")

    return progress


def seconds(text: str) -> float | None:
    """The seconds of "90s", "55m", "8h" or "2d"; a bare number is seconds. None: no duration above
    0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    if match is None or not float(match[1]):
        return None
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def plus_minus(value: float, error: float | None) -> str:
    """A figure with its standard error; a single value has none."""
    return f"{value:.3f} (n = 1)" if error is None else f"{value:.3f} ± {error:.3f}"
