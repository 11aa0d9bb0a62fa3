"""Prompts to tokens: what is empty, too long, or no valid text has its rule here, the same for
every engine.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from evomerge.answering.servers.openai_protocol import whole
from evomerge.errors import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
KEPT = 100_000  # prompts whose tokens are remembered: every candidate asks the same ones


class Encoder:
    """Token lists of prompts, each with room for its answer in the context; special tokens stand in
    the text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context: int | None,
        max_new_tokens: int,
        too_long: Literal["refuse", "truncate"] = "refuse",
    ) -> None:
        self.tokenizer, self.context, self.max_new_tokens, self.too_long = (
            tokenizer,
            context,
            max_new_tokens,
            too_long,
        )
        self._known: dict[str, list[int]] = {}
        self._cut = 0

    def __call__(
        self, prompts: Sequence[str], new_tokens: Sequence[int] | None = None
    ) -> list[list[int]]:
        """`new_tokens`: the longest answer to each; None: `max_new_tokens` to all.

        Raises EngineError: a prompt that leaves no room, unless `too_long` is truncate.
        """
        if len(self._known) + len(prompts) > KEPT:
            self._known.clear()
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if new:
            texts = [whole(prompt) for prompt in new]
            rows = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
            self._known |= {
                prompt: list(row) or self._first() for prompt, row in zip(new, rows, strict=True)
            }
        wanted = [self.max_new_tokens] * len(prompts) if new_tokens is None else new_tokens
        return [
            self._fitted(self._known[prompt], prompt, most)
            for prompt, most in zip(prompts, wanted, strict=True)
        ]

    def _first(self) -> list[int]:
        """What stands for an empty prompt, as in transformers' `generate`: the token that texts
        begin with, or else one that is there.
        """
        t = self.tokenizer
        return [
            next(
                token
                for token in (t.bos_token_id, t.eos_token_id, t.pad_token_id, 0)
                if token is not None
            )
        ]

    def _fitted(self, row: list[int], prompt: str, new_tokens: int) -> list[int]:
        if self.context is None or len(row) + new_tokens <= self.context:
            return row
        room = self.context - new_tokens
        if self.too_long == "refuse" or room < 1:
            raise EngineError(
                f"a prompt of {len(row)} tokens and max_new_tokens {new_tokens} exceed the context of {self.context}",
                found=prompt,
                remedy="Lower generation.max_new_tokens, shorten the task"
                + (", or set prompt.too_long: truncate." if room > 0 else "."),
            )
        if not self._cut:
            log.warning(
                "a prompt of %d tokens is cut from the left to the %d that leave room for an answer",
                len(row),
                room,
            )
        self._cut += 1
        return row[-room:]


def prompt_seed(seed: int, prompt: str) -> int:
    """A seed from the study's and the prompt: an answer depends on neither its neighbours nor on
    what was answered before.
    """
    return int.from_bytes(
        hashlib.sha256(f"{seed}\0{prompt}".encode("utf-8", "surrogatepass")).digest()[:4], "big"
    )


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the earliest stop string begins."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
