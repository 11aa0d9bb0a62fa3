"""lm-eval's model for models that think: its metrics see the answers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from evomerge.answering.encode import first_stop
from evomerge.answering.reply_reader import ReplyReader
from evomerge.answering.thoughts import Marks, split_reply


def thinking_lm(read: ReplyReader, marks: Marks, **settings: Any) -> Any:
    """lm-eval's HFLM with these settings, whose replies are read as elsewhere in evomerge."""
    from lm_eval.models.huggingface import HFLM

    class ThinkingHFLM(_Thinking, HFLM):  # type: ignore[misc]
        """HFLM for a model that thinks."""

    lm = ThinkingHFLM(**settings)
    lm.read, lm.marks = read, marks
    return lm


class _Thinking:
    """What differs from HFLM.

    lm-eval's own `think_end_token` takes thoughts that do not end for an answer, and stop strings
    end replies within thoughts.
    """

    read: ReplyReader
    marks: Marks
    tokenizer: Any
    model: Any
    _opened: bool | None = None  # whether the prompts begin the thoughts; None: nothing is asked

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each request; those whose prompts begin the thoughts go apart."""
        answers = [""] * len(requests)
        for opened in (False, True):
            own = []
            for i, request in enumerate(requests):
                if self.marks.opened_by(str(request.args[0])) == opened:
                    own.append(i)
            if not own:
                continue
            self._opened = opened
            try:
                hflm: Any = super()
                found = hflm.generate_until([requests[i] for i in own], disable_tqdm)
            finally:
                self._opened = None
            for i, answer in zip(own, found, strict=True):
                answers[i] = answer
        return answers

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """The answer in a reply's tokens; other tokens as they are."""
        if self._opened is None or not skip_special_tokens:
            hflm: Any = super()
            return str(hflm.tok_decode(tokens, skip_special_tokens))
        return self._answer(tokens)

    def _answer(self, tokens: Sequence[int]) -> str:
        return split_reply(self.read.text(tokens), self.marks, bool(self._opened)).answer

    def _model_generate(
        self, context: Any, max_length: int, stop: list[str], **settings: Any
    ) -> torch.Tensor:
        """As in HFLM, but a stop string in the thoughts is none."""
        settings.setdefault("temperature", 0.0)
        if settings["temperature"] == 0.0:
            settings.setdefault("do_sample", False)
        if settings["temperature"] == 0.0 and not settings["do_sample"]:
            del settings["temperature"]
        criterion = _StopInAnswer(self, stop, context.shape[1])
        new: torch.Tensor = self.model.generate(
            input_ids=context,
            max_length=max_length,
            stopping_criteria=StoppingCriteriaList([criterion]),
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            **settings,
        )
        return new


class _StopInAnswer(StoppingCriteria):
    """Ends each reply that has a stop string in its answer."""

    def __init__(self, lm: _Thinking, stops: Sequence[str], start: int) -> None:
        self.lm, self.start = lm, start
        self.stops = [stop for stop in stops if stop]
        # a token has at least one byte
        self.longest = max((len(stop.encode()) for stop in self.stops), default=0)
        self.done: set[int] = set()

    def __call__(self, input_ids: Any, scores: Any, **settings: Any) -> Any:
        """Look at the newest tokens, and at the whole reply where these have a stop string."""
        for row, tokens in enumerate(input_ids[:, self.start :].tolist()):
            if row in self.done:
                continue
            newest = self.lm.tokenizer.decode(tokens[-self.longest - 1 :])
            if first_stop(newest, self.stops) is None:
                continue
            if first_stop(self.lm._answer(tokens), self.stops) is not None:
                self.done.add(row)
        rows = range(len(input_ids))
        return torch.tensor([row in self.done for row in rows], device=input_ids.device)
