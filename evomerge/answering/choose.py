"""Which engine a study asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from evomerge.answering.engine import Engine
from evomerge.merging.folder import ModelFolder
from evomerge.study import EngineSection, GenerationSection


def make_engine(
    base: ModelFolder,
    siblings: Sequence[ModelFolder],
    engine: EngineSection,
    generation: GenerationSection,
    dtype: str,
    seed: int = 0,
    too_long: Literal["refuse", "truncate"] = "refuse",
) -> Engine:
    """The engine of `engine.kind`, loaded; without siblings it answers as the base lies on disk.

    Raises EngineError: not installed, no memory. ModelError: weights or tokenizer cannot be loaded.
    """
    if engine.kind == "vllm":
        from evomerge.answering.vllm import VllmEngine

        return VllmEngine(base, siblings, engine, generation, dtype, seed, too_long)
    from evomerge.answering.hf import TransformersEngine

    return TransformersEngine(base, siblings, engine, generation, dtype, seed, too_long)
