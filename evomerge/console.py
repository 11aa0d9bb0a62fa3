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
# seconds without output before a plain line shows the progress within a candidate
DETAIL_EVERY = 60.0
# days, hours, minutes and seconds, or a bare number of seconds
_NUMBER = r"(\d{1,9}(?:\.\d{1,9})?)"
_DURATION = re.compile(
    rf"(?:{_NUMBER} ?d)? ?(?:{_NUMBER} ?h)? ?(?:{_NUMBER} ?m)? ?(?:{_NUMBER} ?s)?|{_NUMBER}"
)
UNITS = (86400, 3600, 60, 1, 1)
LONGEST = 3650 * 86400.0


class Console:
    """`say` leaves a line; `status` is overwritten by what comes next."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.tty = self.stream.isatty()
        self._shown = False  # whether a status is on the current line
        self._last = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._clear()
        print(text, file=self.stream, flush=True)

    def status(self, text: str, detail: bool = False) -> None:
        """Show progress: immediately on a terminal, otherwise as a line every ten seconds at most.

        A `detail` becomes a line every minute at most.
        """
        if self.tty:
            self._clear()
            self.stream.write(text)
            self.stream.flush()
            self._shown = True
            return
        now = time.monotonic()
        if now - self._last >= (DETAIL_EVERY if detail else PLAIN_EVERY):
            self._last = now
            print(text, file=self.stream, flush=True)

    def _clear(self) -> None:
        if self._shown:
            self.stream.write("\r\x1b[2K")
            self._shown = False


def duration(seconds: float) -> str:
    """Seconds as 12 s, 3 min or 2.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def size(number: float) -> str:
    """Bytes as 512 B, 20.4 kB, 852.6 MB or 26.4 GB."""
    if number < 1000:
        return f"{number:.0f} B"
    number, unit = number / 1000, "kB"
    for larger in ("MB", "GB"):
        if number >= 1000:
            number, unit = number / 1000, larger
    return f"{number:.1f} {unit}"


def parse_size(size: str | int) -> int:
    """Bytes of "5GB", "200M", "20K", "5GiB" or a number; "5B" is mergekit's five billion.

    Raises InputError.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(I?)(B?)", str(size).strip().upper())
    if not match or float(match[1]) <= 0 or (match[3] and not match[2]):
        raise InputError(
            "is not a file size",
            where="--out-shard-size",
            found=size,
            remedy="Write 5GB, 200M or a number of bytes.",
        )
    number, unit, binary, byte = match.groups()
    if byte and not unit:
        return int(float(number) * 1000**3)
    base = 1024 if binary else 1000
    return int(float(number) * base ** " KMG".index(unit or " "))


def byte_progress(console: Console, doing: str) -> Callable[[int, int], None]:
    """A function of (bytes done, bytes in all) that shows progress, rate and time left.

    It draws a bar on a terminal, and prints plain lines elsewhere.
    """
    began = time.monotonic()
    shown = -REDRAW_EVERY

    def progress(done: int, total: int) -> None:
        """Show the progress."""
        nonlocal shown
        now = time.monotonic()
        if now - shown < REDRAW_EVERY and done < total:
            return
        shown = now
        share = done / total if total else 1.0
        elapsed = now - began
        bar, rate = "", ""
        if console.tty:
            bar = f"[{'#' * int(share * BAR):{BAR}}] "
        if done and elapsed:
            left = duration(elapsed * (1 / share - 1))
            rate = f"  {size(done / elapsed)}/s  ETA {left}"
        console.status(f"{doing} {bar}{share:4.0%}  {size(done)} of {size(total)}{rate}")

    return progress


def seconds(text: str) -> float | None:
    """The seconds of "90s", "55m", "1h30m", "2d" or a bare number.

    None: not a duration above 0, or longer than ten years.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        return None
    total = sum(
        float(number or 0) * unit for number, unit in zip(match.groups(), UNITS, strict=True)
    )
    return total if 0 < total <= LONGEST else None


def plus_minus(value: float, error: float | None) -> str:
    """A figure with its standard error; a single value has none."""
    return f"{value:.3f} (n = 1)" if error is None else f"{value:.3f} ± {error:.3f}"
