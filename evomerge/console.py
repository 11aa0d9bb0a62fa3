"""What a person sees: progress and messages on stderr, data on stdout.

Control characters from paths, names, servers and models are shown escaped; this is the one place.
"""

from __future__ import annotations

import json
import re
import sys
import time
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

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
# what has no glyph but belongs to ordinary text: tabs, and what joins letters and emoji or does not
_JOINERS = "\t\u200c\u200d"


def is_seen(character: str) -> bool:
    """Whether a terminal shows it: spaces do, controls and characters without width do not."""
    if character.isprintable() or character in _JOINERS:
        return True
    return unicodedata.category(character) == "Zs"


def shown(text: str) -> str:
    """The text on one line, with what a terminal would obey or hide as escapes."""
    if text.isprintable():
        return text
    return "".join(c if is_seen(c) else ascii(c)[1:-1] for c in text)


def put(text: str = "") -> None:
    """Print one line of data on stdout."""
    print(shown(text))


def put_json(value: Any) -> None:
    """Print one JSON value on stdout, as ASCII where the terminal knows nothing else."""
    plain = not (sys.stdout.encoding or "").lower().startswith("utf")
    text = json.dumps(value, ensure_ascii=plain)
    if not text.isprintable():
        text = "".join(c if is_seen(c) else json.dumps(c)[1:-1] for c in text)
    print(text)


class Console:
    """`say` leaves a line; `status` is overwritten by what comes next.

    Where the stream is closed or full, the words are lost and the work goes on.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.tty = self.stream.isatty()
        self._shown = False  # whether a status is on the current line
        self._last = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._clear()
        self._write(f"{shown(text)}\n")

    def status(self, text: str, detail: bool = False) -> None:
        """Show progress: immediately on a terminal, otherwise as a line every ten seconds at most.

        A `detail` becomes a line every minute at most.
        """
        if self.tty:
            self._clear()
            self._write(shown(text))
            self._shown = True
            return
        now = time.monotonic()
        if now - self._last >= (DETAIL_EVERY if detail else PLAIN_EVERY):
            self._last = now
            self._write(f"{shown(text)}\n")

    def _clear(self) -> None:
        if self._shown:
            self._write("\r\x1b[2K")
            self._shown = False

    def _write(self, text: str) -> None:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        known = text.encode(encoding, "backslashreplace").decode(encoding)
        with suppress(OSError, ValueError):
            self.stream.write(known)
            self.stream.flush()


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
    if not match or not 0 < float(match[1]) < 1e18 or (match[3] and not match[2]):
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
    parts = []
    for number, unit in zip(match.groups(), UNITS, strict=True):
        parts.append(float(number or 0) * unit)
    total = sum(parts)
    return total if 0 < total <= LONGEST else None


def counted(n: int, noun: str) -> str:
    """ "1 sibling", "3 siblings": a number and a noun that takes an s."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def plus_minus(value: float, error: float | None) -> str:
    """A figure with its standard error; a single value has none."""
    if error is None:
        return f"{value:.3f} (n = 1)"
    return f"{value:.3f} ± {error:.3f}"
