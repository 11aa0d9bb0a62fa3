"""`engine:` the engine that answers, and its device."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from evomerge.study.section import Section, Text


class VllmSection(Section):
    """Arguments of vLLM's `LLM` with the same names; null: vLLM's default."""

    tensor_parallel_size: int = Field(default=1, ge=1, description="GPUs that share one model.")
    max_model_len: int | None = Field(default=None, description="Longest context, in tokens.")
    gpu_memory_utilization: float | None = Field(
        default=None, gt=0, le=1, examples=[0.9], description="Share of the GPU's memory."
    )
    enforce_eager: bool | None = Field(default=None, description="true: run without CUDA graphs.")
    quantization: Text | None = Field(
        default=None, description="Name of a quantization method, as in vLLM."
    )


class EngineSection(Section):
    """The engine that answers."""

    kind: Literal["transformers", "vllm"] = Field(
        default="transformers", description="Which engine runs the model."
    )
    device: Text = Field(default="auto", description="auto: cuda if available, else cpu.")
    device_map: Text | None = Field(
        default=None, description="auto: one model is spread over several GPUs (accelerate)."
    )
    batch_size: int = Field(default=32, ge=1, description="Maximum number of prompts per batch.")
    batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of tokens per batch, prompts x (the longest + max_new_tokens), "
        "on which memory use depends; null: no limit.",
    )
    population: bool | None = Field(
        default=None,
        description="Answer for all candidates of a generation in one pass; null: only in float32, "
        "and only where it is certain to be faster.",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads; null: a new study of a model below 100 M parameters tries for "
        "half a second which number is the fastest, and keeps it; otherwise torch's choice.",
    )
    residency: Literal["auto", "device", "host", "disk"] = Field(
        default="auto", description="Where base and siblings are kept between candidates."
    )
    quantization: Literal["4bit", "4bit-double"] | None = Field(
        default=None, description="The live model in NF4 (bitsandbytes); merges stay in bfloat16."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that comes with a model."
    )
    vllm: VllmSection = Field(
        default=VllmSection(), description="Arguments of vLLM, with kind vllm."
    )
