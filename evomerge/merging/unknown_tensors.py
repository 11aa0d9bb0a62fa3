"""What a user is told of models and tensors that transformers does not know."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from evomerge.once import warn_once

log = logging.getLogger(__name__)


def tell_what_is_unknown(ref: str, rule: str, stays: Mapping[str, bool]) -> None:
    """Log the rule that decides for a model, if it has one, and what becomes of odd tensors.

    `stays`: the tensors whose role nothing says, and whether they are kept as they are.
    """
    if rule:
        warn_once(log, f"{ref}: {rule}")
    kept = [name for name in stays if stays[name]]
    merged = [name for name in stays if not stays[name]]
    if kept:
        warn_once(log, f"{ref}: {_unknown(kept)} not merged: the output has this model's")
    if merged:
        warn_once(log, f"{ref}: {_unknown(merged)} merged with the first slice's weight")


def _unknown(names: list[str]) -> str:
    if len(names) == 1:
        return f"the role of {names[0]} is unknown, and it is"
    return f"the role of {len(names)} tensors is unknown, such as {names[0]}, and they are"
