"""The choice of the engine."""

from __future__ import annotations

from evomerge.answering.engine import Engine, EngineSpec


def make_engine(spec: EngineSpec) -> Engine:
    """The engine that `engine.kind` names, with its model loaded.

    Raises EngineError, and ModelError for a model that it cannot load.
    """
    if spec.engine.kind == "vllm":
        from evomerge.answering.vllm.engine import VllmEngine

        return VllmEngine(spec)
    from evomerge.answering.hf.engine import TransformersEngine

    return TransformersEngine(spec)
