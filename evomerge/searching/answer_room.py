"""How many tokens prompt and answer share, and the longest answer where a study names none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from evomerge.merging.checkpoints.config_defaults import config_value
from evomerge.merging.checkpoints.model_folder import ModelFolder
from evomerge.study import Study


def context_of(study: Study, base: ModelFolder) -> int | None:
    """How many tokens prompt and answer may have; None where the model does not say."""
    if study.engine.kind == "vllm" and study.engine.vllm.max_model_len is not None:
        return study.engine.vllm.max_model_len
    config: Mapping[str, Any] = base.config
    text = config.get("text_config")
    if "max_position_embeddings" not in config and isinstance(text, dict):
        config = text
    length = config_value(config, "max_position_embeddings")
    return length if isinstance(length, int) else None


def with_room_for_prompts(study: Study, base: ModelFolder, say: Callable[[str], None]) -> Study:
    """The study, its answers limited to half of a context that the default would fill alone.

    A length that the study file names stays as it is.
    """
    context, own = context_of(study, base), study.generation
    if study.lm_eval or context is None or "max_new_tokens" in own.model_fields_set:
        return study
    if context > own.max_new_tokens:
        return study
    longest = max(1, context // 2)
    say(
        f"note: answers have at most {longest} tokens, half of the model's context; "
        "generation.max_new_tokens changes that"
    )
    return study.replace(generation=own.replace(max_new_tokens=longest))
