"""Loading a model into vLLM: its arguments, its memory on a CPU, end tokens, errors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from evomerge.errors import EngineError, ModelError
from evomerge.merging.checkpoints.hub_kernels import refuse_hub_kernels
from evomerge.merging.checkpoints.model_folder import ModelFolder
from evomerge.merging.checkpoints.size import kv_cache_bytes
from evomerge.merging.device_memory import free_bytes, is_out_of_memory
from evomerge.study import EngineSection

# Prompts given to vLLM in one call, and the most that it runs concurrently. Answers are kept by
# whole batches, so an interrupted candidate loses at most one. vLLM fills a finished answer's place
# only from what it was given: at the end of a batch the device idles, which with 256 costs little.
# The number is fixed because what shares a batch must not depend on the machine.
BATCH = 256
CPU_SHARE = 0.4  # share of the free host memory that keys and values may take on a CPU
BLOCK = 128  # positions of a block of keys and values on a CPU: the least that a prompt takes
ENVIRONMENT = {
    # the scheduler in this process: the same prompts are scheduled the same way
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for data
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def refuse_others(engine: EngineSection) -> None:
    """Refuse keys that only the transformers engine honours; they are never ignored.

    `batch_size` has a default, so it is not among them; see BATCH.
    """
    device = None if engine.device == "auto" else engine.device
    keys: list[tuple[str, object, str]] = [
        ("device", device, "Leave it out: vLLM's build decides."),
        ("device_map", engine.device_map, "Use engine.vllm.tensor_parallel_size."),
        ("quantization", engine.quantization, "Use engine.vllm.quantization."),
        ("batch_tokens", engine.batch_tokens, "Leave it out: vLLM manages its memory itself."),
        ("population", engine.population or None, "Leave it out."),
    ]
    for key, found, remedy in keys:
        if found is not None:
            raise EngineError(
                "the vLLM engine does not support this key",
                where=f"engine.{key}",
                found=found,
                remedy=remedy,
            )


def refuse_quantized_base(base: ModelFolder) -> None:
    """Raise ModelError where vLLM would hold weights in fp8 or mxfp4, which cannot be replaced."""
    if base.is_dequantized:
        raise ModelError(
            "vLLM would load the base quantised, as it is on disk, and takes no merged weights",
            where=base.path,
            remedy="Write a plain folder first: `evomerge merge` with this model alone and "
            "`merge_method: passthrough`.",
        )


def load_llm(base: ModelFolder, engine: EngineSection, dtype: str, seed: int) -> Any:
    """vLLM's `LLM` on the base.

    Raises EngineError with vLLM's reason, ModelError where code of the hub would be run.
    """
    if not engine.trust_remote_code:
        refuse_hub_kernels(base.config, base.path)
    arguments = {}
    for key, value in engine.vllm.model_dump().items():
        if value is not None:
            arguments[key] = value
    with _environment(ENVIRONMENT):
        try:
            from vllm import LLM, SamplingParams
            from vllm.platforms import current_platform

            set_by_user = (
                engine.vllm.gpu_memory_utilization is not None
                or "VLLM_CPU_KVCACHE_SPACE" in os.environ
            )
            if current_platform.is_cpu() and not set_by_user:
                longest = engine.vllm.max_model_len
                arguments["kv_cache_memory_bytes"] = _cpu_cache(base.config, longest, dtype)
            llm = LLM(
                model=str(base.path),
                dtype=dtype,
                seed=seed,
                max_num_seqs=BATCH,
                trust_remote_code=engine.trust_remote_code,
                generation_config="vllm",
                use_tqdm_on_load=False,
                disable_log_stats=True,
                **arguments,
            )
            # A shape that vLLM has no kernel for, such as heads of 24 numbers on a CPU, shows only
            # when it answers: better here than in every trial.
            llm.generate(
                [{"prompt_token_ids": [0]}],
                SamplingParams(max_tokens=1, detokenize=False),
                use_tqdm=False,
            )
            return llm
        except Exception as error:  # vLLM raises many kinds of errors
            if is_out_of_memory(error):
                raise EngineError(
                    "the model does not fit the device",
                    where=base.path,
                    remedy="Raise engine.vllm.tensor_parallel_size, or quantise.",
                ) from error
            raise EngineError(
                f"vLLM cannot load the model: {first_line(error)}",
                where=base.path,
                remedy="Change the keys of engine.vllm, or engine.kind.",
            ) from error


def _cpu_cache(config: Mapping[str, Any], max_model_len: int | None, dtype: str) -> int:
    """Bytes of keys and values on a CPU: a whole batch at its longest, within CPU_SHARE.

    vLLM's own default, nine tenths of the machine's memory, is refused on any machine that does
    something else too.
    """
    longest = max_model_len or config.get("max_position_embeddings") or 4096
    blocks = -(-longest // BLOCK) + 1
    one = kv_cache_bytes(config, blocks * BLOCK, getattr(torch, dtype).itemsize)
    return max(one, min(BATCH * one, int(CPU_SHARE * free_bytes(torch.device("cpu")))))


def end_tokens(base: ModelFolder, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends an answer: by generation_config.json, else config.json, else the tokenizer.

    That is the rule of transformers too. Raises ModelError for a file that cannot be read.
    """
    ends: Any = base.config.get("eos_token_id")
    if (base.path / "generation_config.json").is_file():
        try:
            ends = GenerationConfig.from_pretrained(str(base.path)).eos_token_id
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(
                f"generation_config.json cannot be read: {error}",
                where=base.path,
                remedy="Fix it, or remove it.",
            ) from error
    if ends is None:
        ends = tokenizer.eos_token_id
    if isinstance(ends, list):
        return list(ends)
    return [] if ends is None else [ends]


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set these environment variables, unless the user has, until the context ends.

    They are for what vLLM takes only from the environment.
    """
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def first_line(error: Exception) -> str:
    """The error's first line, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
