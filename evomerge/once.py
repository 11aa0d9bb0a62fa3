"""Warnings that a process logs once, however often and in how many threads their cause is met."""

from __future__ import annotations

import logging
import threading

_LOCK = threading.Lock()
said = set[str]()


def warn_once(log: logging.Logger, text: str) -> None:
    """Log a warning unless the same text has been logged before."""
    with _LOCK:
        if text in said:
            return
        said.add(text)
    log.warning("%s", text)
