"""From new tokens to an answer: the text up to a stop string, and the thoughts before it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from evomerge.answering.encode import first_stop
from evomerge.answering.engine import Answer
from evomerge.answering.reasoning import Wanted, find_marks, is_token
from evomerge.answering.thoughts import Marks, SplitReply, split_reply

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ReplyReader:
    """Reads the replies of one model; `wanted` is `generation.reasoning`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, wanted: Wanted) -> None:
        self.tokenizer: Any = tokenizer
        self.wanted = wanted

    @cached_property
    def marks(self) -> Marks | None:
        """The marks of thoughts, looked up late: a recipe may replace the chat template."""
        return find_marks(self.wanted, self.tokenizer)

    def __call__(
        self, prompt: str, tokens: Sequence[int], ended: bool, stops: Sequence[str]
    ) -> Answer:
        """The answer in the new tokens, without an end token; `ended`: one has followed them.

        Thoughts without an end are no answer: they are cut, unless the model ended there itself.
        """
        text = self.text(tokens)
        stop = first_stop(text, stops)
        cut, count = not ended and stop is None, len(tokens)
        if self.marks is None:
            return Answer(text[:stop], cut, count)
        reply = split_reply(text[:stop], self.marks, self.marks.opened_by(prompt))
        if reply.is_open:
            return Answer("", not ended, count, reply.thoughts, count)
        thinking = min(count, self._thought_tokens(tokens, reply, self.marks))
        return Answer(reply.answer, cut, count, reply.thoughts + reply.later, thinking)

    def text(self, tokens: Sequence[int]) -> str:
        """The tokens' text without special tokens, except those that marks are made of."""
        special = self._special
        if not special:
            return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        kept = [token for token in tokens if special.get(token, True)]
        return str(self.tokenizer.decode(kept, skip_special_tokens=False))

    def _thought_tokens(self, tokens: Sequence[int], reply: SplitReply, marks: Marks) -> int:
        """How many tokens there are up to the end of the thoughts, and in later ones."""
        later = 0
        if reply.later:
            later = len(self.tokenizer(reply.later, add_special_tokens=False)["input_ids"])
        ends = reply.thoughts.count(marks.end)
        if not ends:
            return later
        if is_token(self.tokenizer, marks.end):
            number = self.tokenizer.convert_tokens_to_ids(marks.end)
            places = [i for i, token in enumerate(tokens) if token == number]
            if len(places) >= ends:
                return places[ends - 1] + 1 + later
        before = bisect_left(
            range(len(tokens)), ends, key=lambda n: self.text(tokens[:n]).count(marks.end)
        )
        return before + later

    @cached_property
    def _special(self) -> dict[int, bool]:
        """Special token -> whether it is a part of a mark; {} if none is."""
        if self.marks is None:
            return {}
        both, found = self.marks.start + self.marks.end, {}
        for number in self.tokenizer.all_special_ids:
            token = str(self.tokenizer.convert_ids_to_tokens(number))
            found[int(number)] = token in both
        return found if any(found.values()) else {}
