"""How far a judge can be trusted: its agreement with reference grades."""

from __future__ import annotations

from evomerge.judging.families import family, is_tuning, split_models

__all__ = ["family", "is_tuning", "split_models"]
