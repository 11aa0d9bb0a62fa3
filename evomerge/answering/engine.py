"""What an engine is: something that takes a recipe's weights and answers prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from evomerge.recipe import Recipe


@dataclass(frozen=True)
class Answer:
    """What the model said to one prompt.

    `truncated` is True when `max_new_tokens` ended it rather than an end token; `tokens` counts new tokens.
    """

    text: str
    truncated: bool
    tokens: int


class Engine(Protocol):
    """One loaded model whose weights are replaced in place between candidates."""

    def apply(self, recipe: Recipe) -> None:
        """Give the live model the recipe's weights, computed from the untouched base."""

    def batches(self, prompts: Sequence[str]) -> list[list[int]]:
        """Which prompts share a batch, by index: a function of the prompts and the settings alone."""

    def answer(self, prompts: Sequence[str]) -> list[Answer]:
        """Answer the prompts of one batch, in their order.

        A prompt is the whole text the model sees, special tokens included as text. Raises EngineError.
        """
