"""What a user is told of models and tensors that transformers does not know."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

log = logging.getLogger(__name__)
TELLING = threading.Lock()
told = set[str]()  # each line is logged once


def tell_what_is_unknown(ref: str, rule: str, stays: Mapping[str, bool]) -> None:
    """Log the rule that decides for a model, if it has one, and what becomes of odd tensors.

    `stays`: the tensors whose role nothing says, and whether they are kept as they are.
    """
    if rule:
        _say(f"{ref}: {rule}")
    kept = [name for name in stays if stays[name]]
    merged = [name for name in stays if not stays[name]]
    if kept:
        _say(f"{ref}: {_unknown(kept)} not merged: the output has this model's")
    if merged:
        _say(f"{ref}: {_unknown(merged)} merged with the first slice's weight")


def _unknown(names: list[str]) -> str:
    if len(names) == 1:
        return f"the role of {names[0]} is unknown, and it is"
    return f"the role of {len(names)} tensors is unknown, such as {names[0]}, and they are"


def _say(text: str) -> None:
    with TELLING:
        if text not in told:
            told.add(text)
            log.warning(text)
