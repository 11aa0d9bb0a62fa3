"""Answers to prompts, from the cache where they were computed before, else from the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

from evomerge.answering.cache import MERGED, AnswerCache
from evomerge.answering.engine import Answer, Engine, PromptSettings, items_at
from evomerge.answering.pace import Pace

# the prompts' indices and the answers of a batch, as soon as it is complete
OnBatch: TypeAlias = Callable[[Sequence[int], Sequence[Answer]], None]


def answer_all(
    engine: Engine,
    cache: AnswerCache,
    *,
    recipe: str,
    prompts: Sequence[str],
    settings: PromptSettings = None,
    mode: str = MERGED,
    apply: Callable[[], None],
    pace: Pace,
    remember: Callable[[Mapping[str, int]], None] = lambda limits: None,
    on_batch: OnBatch = lambda indices, answers: None,
) -> list[Answer]:
    """Answers to all prompts, in order; `apply` merges, if any batch is not in the cache.

    `recipe` is the digest. `remember` gets the engine's limits when memory has changed them, before
    the answers under them are kept. `settings` are the prompts' own, if they have any.
    """
    answers: dict[int, Answer] = {}
    applied = False
    for batch in engine.batches(prompts, settings):
        texts = items_at(prompts, batch)
        own = None if settings is None else items_at(settings, batch)
        key = cache.key(recipe, texts, mode, own)
        found = cache.get(key, len(batch))
        if found is not None:
            pace.found(len(batch))
        else:
            if not applied:
                apply()
                applied = True
            with watched(engine, pace, remember):
                found = engine.answer(texts, own)
            pace.end(len(batch), sum(answer.tokens for answer in found))
            cache.put(key, found)
        on_batch(batch, found)
        answers.update(zip(batch, found, strict=True))
    return [answers[i] for i in range(len(prompts))]


@contextmanager
def watched(
    engine: Engine, pace: Pace, remember: Callable[[Mapping[str, int]], None]
) -> Iterator[None]:
    """While the engine answers, `pace` watches it.

    Limits that memory forces are remembered, even if it fails in the end.
    """
    limits = dict(engine.limits)
    engine.watch = pace.watch
    pace.begin()
    try:
        yield
    finally:
        engine.watch = None
        if engine.limits != limits:
            remember(engine.limits)
