"""A recipe's parts in checked form: sources, slices, the tokenizer section."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Source:
    """One model in a slice, with its own parameters."""

    model: str
    layers: tuple[int, int] | None  # [start, end), or None for all of them
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Slice:
    """Layers that are merged alike; its parameters rank below a source's and above the recipe's."""

    sources: tuple[Source, ...]
    parameters: Mapping[str, Any]
    base_model: str | None  # its own, or the recipe's

    @property
    def siblings(self) -> tuple[Source, ...]:
        """The sources that are not the base."""
        return tuple(source for source in self.sources if source.model != self.base_model)


@dataclass(frozen=True)
class TokenizerSection:
    """Whose tokens the merged model has: `source` is base, union, or a model."""

    source: str
    tokens: Mapping[str, Any]  # token -> where its row comes from; mergekit's format
    pad_to_multiple_of: int | None
