"""Prompts to tokens: one rule for every engine about empty, too long and invalid texts."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from evomerge.answering.servers.openai_protocol import whole
from evomerge.errors import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
KEPT = 100_000  # prompts whose tokens are remembered: every candidate gets the same ones


class Encoder:
    """Token lists of prompts, each with room for its answer in the context.

    Special tokens are part of the text: none are added.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
        max_new_tokens: int,
        too_long: Literal["refuse", "truncate"] = "refuse",
    ) -> None:
        self.tokenizer = tokenizer
        self.context = context
        self.max_new_tokens = max_new_tokens
        self.too_long = too_long
        self._known: dict[str, list[int]] = {}
        self._warned = False

    def __call__(
        self, prompts: Sequence[str], new_tokens: Sequence[int] | None = None
    ) -> list[list[int]]:
        """The tokens of prompts; `new_tokens`: the longest answer to each, else `max_new_tokens`.

        Raises EngineError: a prompt that leaves no room, unless `too_long` is truncate.
        """
        if len(self._known) + len(prompts) > KEPT:
            self._known.clear()
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if new:
            texts = list(map(whole, new))
            rows = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
            for prompt, row in zip(new, rows, strict=True):
                # an empty prompt becomes one token, as in transformers' `generate`
                self._known[prompt] = list(row) or [first_token(self.tokenizer)]
        if new_tokens is None:
            new_tokens = [self.max_new_tokens] * len(prompts)
        fitted = []
        for prompt, most in zip(prompts, new_tokens, strict=True):
            fitted.append(self._fitted(self._known[prompt], prompt, most))
        return fitted

    def _fitted(self, row: list[int], prompt: str, new_tokens: int) -> list[int]:
        if self.context is None or len(row) + new_tokens <= self.context:
            return row
        room = self.context - new_tokens
        if self.too_long == "refuse" or room < 1:
            remedy = "Lower generation.max_new_tokens or shorten the task"
            raise EngineError(
                f"a prompt of {len(row)} tokens and max_new_tokens {new_tokens} "
                f"exceed the context of {self.context}",
                found=prompt,
                remedy=remedy + (", or set prompt.too_long: truncate." if room > 0 else "."),
            )
        if not self._warned:
            log.warning(
                "a prompt of %d tokens is cut on the left to the %d that leave room for an answer; "
                "other prompts that are too long are cut as well",
                len(row),
                room,
            )
            self._warned = True
        return row[-room:]


def first_token(tokenizer: Any) -> int:
    """The token that texts begin with, or else one that always exists."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if token is not None:
            return int(token)
    return 0


def prompt_seed(seed: int, prompt: str) -> int:
    """A seed from the study's seed and the prompt.

    An answer therefore depends neither on its neighbours nor on what was answered before.
    """
    text = f"{seed}\0{prompt}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big")


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """The position at which the earliest stop string begins."""
    return min((text.find(stop) for stop in stops if stop in text), default=None)
