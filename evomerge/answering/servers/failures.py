"""What a failed request for an answer means to the user, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable

from evomerge.answering.servers.client import OpenAIClient, ServerFailure, names
from evomerge.answering.servers.openai_protocol import KEY
from evomerge.errors import EngineError, EvomergeError, ModelError

PENALTY = "repetition_penalty"
SHORTEN = "Shorten the task, or lower generation.max_new_tokens. Finished answers are kept."
NO_COMPLETIONS = "Check --server, or use --format chat: not every server offers completions."
GOES_ON = "Finished answers are kept: run the same command again to resume."


def lasting_error(failure: ServerFailure, client: OpenAIClient, chat: bool) -> EngineError:
    """The error of a request whose retries are over; `chat`: which endpoint it was sent to."""
    status, said = failure.status, failure.said
    if failure.kind == "timeout":
        what, remedy = f"the server gave no answer within {client.timeout:.0f} s", GOES_ON
    elif failure.kind in ("unreachable", "broken"):
        what = f"the server cannot be reached: {said}"
        remedy = f"Start it, or check --server. {GOES_ON}"
    elif failure.kind == "unreadable":
        what, remedy = f"the server's reply contains no answer: {said}", GOES_ON
    elif failure.refused:
        what = f"the server refused access with status {status}: {said}"
        remedy = f"Check the key in {KEY}." if client.key else f"Set {KEY}."
    else:
        what = f"the server answered with {failure.in_words}"
        remedy = _remedy(failure, chat)
    where = client.url
    if status == 404:
        where += "/chat/completions" if chat else "/completions"
    return EngineError(what, where=where, remedy=remedy)


def unknown_model(
    failure: ServerFailure, model: str | None, url: str, list_models: Callable[[], list[str]]
) -> ModelError | None:
    """An error that names the server's models, where it does not list the requested one."""
    if model is None or (failure.status != 404 and model not in failure.said):
        return None
    try:
        listed = list_models()
    except EvomergeError:
        return None
    if not listed or model in listed:
        return None
    return ModelError(
        f"the server does not know this model: {failure.said}",
        where=url,
        found=model,
        remedy=f"It lists: {names(listed)}.",
    )


def _remedy(failure: ServerFailure, chat: bool) -> str:
    """What to do about a status that is neither a refused key nor an unknown model."""
    if PENALTY in failure.said:  # OpenAI's own server, transformers'
        return "Set repetition_penalty to 1: this server does not accept it."
    if failure.status == 404:
        return "Check --server." if chat else NO_COMPLETIONS
    if failure.status == 429:
        return f"Lower --concurrency. {GOES_ON}"
    return SHORTEN if failure.too_long else GOES_ON
