"""The defaults of older versions, with which the studies of their time go on."""

from __future__ import annotations

from typing import Any

# The behaviour of studies from before the key existed.
BEFORE: dict[str, dict[str, Any]] = {
    "split": {"validation": 0.0},
    "search": {
        "ranking": "all",
        "sampling": "uniform",
        "lr_adapt": False,
        "start": 1.0,
        "warm_start": None,
    },
    "generation": {"reasoning": None},
    "genome": {"outside": "base"},
}
# Defaults that have changed. Older studies have stored the one that they began with.
FORMER: dict[str, dict[str, Any]] = {
    "search": {"sampling": "uniform", "start": 1.0, "warm_start": None},
    "generation": {"reasoning": None},
}
