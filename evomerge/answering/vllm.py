"""The vLLM engine: loads once, takes each candidate's weights from memory, and schedules a whole batch itself.

vLLM packs weights into layouts of its own, which cannot be merged into. So the live model is kept in host memory as its
files would hold it (`HostWeights`), is merged there, and every worker takes its part from that memory by vLLM's own
`reload_weights`: no disk, no pickling, and the same way for one worker and for several (`tensor_parallel_size`).
"""

from __future__ import annotations

import functools
import importlib.util
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from evomerge.answering.encode import Encoder, first_stop, prompt_seed
from evomerge.answering.engine import Answer, Watch
from evomerge.answering.hf import load_tokenizer
from evomerge.answering.host_weights import host_weights_of
from evomerge.errors import EngineError, ModelError
from evomerge.merging.folder import ModelFolder
from evomerge.merging.live import LiveModel
from evomerge.merging.resident import free_bytes
from evomerge.merging.size import kv_cache_bytes
from evomerge.recipe import Recipe
from evomerge.study import EngineSection, GenerationSection

# Prompts given to vLLM at once, and the most that it runs at once. Answers are kept by whole batches, so an interrupted
# candidate loses at most one. vLLM fills a finished answer's place only from what it was given: at the end of a batch
# the device idles, which with 256 costs little. Fixed, as what shares a batch must not depend on the machine.
BATCH = 256
CPU_SHARE = 0.4  # of the free host memory, that keys and values may take on a CPU
BLOCK = 128  # positions of a block of keys and values on a CPU: the least that a prompt takes
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler in this process: the same prompts are scheduled the same way
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for data
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class VllmEngine:
    """Answers with vLLM. Without siblings the model answers as it lies on disk, and `apply` is not there for it."""

    def __init__(
        self,
        base: ModelFolder,
        siblings: Sequence[ModelFolder],
        engine: EngineSection,
        generation: GenerationSection,
        dtype: str,
        seed: int = 0,
        too_long: Literal["refuse", "truncate"] = "refuse",
    ) -> None:
        """Raises EngineError when vLLM is absent or refuses its arguments, ModelError for a bad tokenizer or tensor."""
        _refuse_others(engine)
        if importlib.util.find_spec("vllm") is None:
            raise EngineError("vLLM is not installed", where="engine.kind", found="vllm", remedy="Run pip install 'evomerge[vllm]'.")
        self.settings, self.generation, self.seed = engine, generation, seed
        self.limits: dict[str, int] = {}  # vLLM fits its batches into memory itself
        self.watch: Watch | None = None
        if engine.threads is not None:
            torch.set_num_threads(engine.threads)
        self.tokenizer = load_tokenizer(base, engine.trust_remote_code)
        self.ends = _end_tokens(base, self.tokenizer)
        self.live: LiveModel | None = None
        if siblings:
            self.weights = host_weights_of(base, getattr(torch, dtype))
            self.live = LiveModel(self.weights.module, base, siblings, seed, engine.residency)
        self.llm = _load(base, engine, dtype, seed)
        self.encode = Encoder(self.tokenizer, self.llm.llm_engine.model_config.max_model_len, generation.max_new_tokens, too_long)
        self._applied = ""  # digest of the recipe whose weights vLLM holds
        self._broken: str | None = None  # why it can answer no more

    def apply(self, recipe: Recipe) -> None:
        """Merge in host memory, then let vLLM take the weights. What fails to merge leaves vLLM as it was."""
        assert self.live is not None, "an engine without siblings merges nothing"
        self._check()
        if recipe.digest() == self._applied:
            return
        self._applied = ""
        self.live.apply(recipe)
        with self._breaking("vLLM could not take the weights"):
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(self.weights.folder)})
        self._applied = recipe.digest()

    def batches(self, prompts: Sequence[str]) -> list[list[int]]:
        """Indices of the prompts, in their order, in groups of BATCH: vLLM needs no sorting, as it pads nothing."""
        return [list(range(at, min(at + BATCH, len(prompts)))) for at in range(0, len(prompts), BATCH)]

    def answer(self, prompts: Sequence[str]) -> list[Answer]:
        """Answer one batch. Raises EngineError: out of memory, a prompt that leaves no room in the context."""
        self._check()
        inputs = [{"prompt_token_ids": row} for row in self.encode(prompts)]  # all are checked before vLLM has any
        settings = [self._sampling(prompt) for prompt in prompts]
        with self._breaking("vLLM could not answer"):
            # Keys and values of other weights must go; and those of an earlier batch, which a resumed run does not answer.
            if not self.llm.reset_prefix_cache():
                raise RuntimeError("its prefix cache is in use")
            outputs = self.llm.generate(inputs, settings, use_tqdm=_bar(self.watch) if self.watch else False)
        return [self._finish(output.outputs[0]) for output in outputs]

    def _sampling(self, prompt: str) -> Any:
        """vLLM's settings for one prompt, with a seed of its own, so that its answer does not depend on what shares the batch."""
        from vllm import SamplingParams

        g = self.generation
        return SamplingParams(
            max_tokens=g.max_new_tokens,
            temperature=g.temperature if g.do_sample else 0.0,
            top_p=g.top_p if g.do_sample else 1.0,
            top_k=0,
            repetition_penalty=g.repetition_penalty,
            seed=prompt_seed(self.seed, prompt) if g.do_sample else None,
            stop=list(g.stop) or None,
            stop_token_ids=self.ends,
            ignore_eos=True,  # `ends` says all: vLLM's own end token is the tokenizer's, which may be another
            detokenize=bool(g.stop),
        )

    def _finish(self, output: Any) -> Answer:
        """The text up to an end token or a stop text."""
        ids = list(output.token_ids)
        ended = bool(ids) and ids[-1] in self.ends
        kept = ids[:-1] if ended else ids
        text = str(self.tokenizer.decode(kept, skip_special_tokens=True))
        stop = first_stop(text, self.generation.stop)
        return Answer(text[:stop], truncated=not ended and stop is None, tokens=len(kept))

    def _check(self) -> None:
        if self._broken is not None:
            raise EngineError(self._broken, remedy="Run the same command again: it goes on where it stopped.")

    @contextmanager
    def _breaking(self, what: str) -> Iterator[None]:
        """What fails within leaves vLLM half changed: the error says so, and nothing is answered any more."""
        try:
            yield
        except Exception as error:  # vLLM lets through torch's, its own and its kernels' errors
            self._broken = f"{what}: {_line(error)}"
            self._applied = ""
            if isinstance(error, torch.OutOfMemoryError):
                raise EngineError(what + ": out of memory", remedy="Lower engine.vllm.gpu_memory_utilization or max_model_len.") from error
            raise EngineError(self._broken, remedy="Run the same command again: it goes on where it stopped.") from error


def _refuse_others(engine: EngineSection) -> None:
    """Keys that only the transformers engine honours are refused, never ignored; `batch_size` has a default, and see BATCH."""
    keys: list[tuple[str, object, str]] = [
        ("device", engine.device if engine.device != "auto" else None, "Leave it out: vLLM's build decides."),
        ("device_map", engine.device_map, "Use engine.vllm.tensor_parallel_size."),
        ("quantization", engine.quantization, "Use engine.vllm.quantization."),
        ("batch_tokens", engine.batch_tokens, "Leave it out: vLLM fits what it runs into memory itself."),
        ("population", engine.population or None, "Leave it out."),
    ]
    for key, found, remedy in keys:
        if found is not None:
            raise EngineError("the vLLM engine does not take this key", where=f"engine.{key}", found=found, remedy=remedy)


def _load(base: ModelFolder, engine: EngineSection, dtype: str, seed: int) -> Any:
    """vLLM's `LLM` on the base. Raises EngineError with vLLM's reason."""
    arguments = {key: value for key, value in asdict(engine.vllm).items() if value is not None}
    with _environment(ENVIRONMENT):
        try:
            from vllm import LLM, SamplingParams
            from vllm.platforms import current_platform

            if current_platform.is_cpu() and engine.vllm.gpu_memory_utilization is None and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
                arguments["kv_cache_memory_bytes"] = _cpu_cache(base.config, engine.vllm.max_model_len, dtype)
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
            # A shape that vLLM has no kernel for, such as heads of 24 numbers on a CPU, shows only now: better than in every trial.
            llm.generate([{"prompt_token_ids": [0]}], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
            return llm
        except torch.OutOfMemoryError as error:
            raise EngineError(
                "the model does not fit the device", where=base.path, remedy="Raise engine.vllm.tensor_parallel_size, or quantise."
            ) from error
        except Exception as error:  # many kinds, by what vLLM cannot do
            raise EngineError(
                f"vLLM cannot load the model: {_line(error)}", where=base.path, remedy="Change the keys of engine.vllm, or engine.kind."
            ) from error


def _cpu_cache(config: Mapping[str, Any], max_model_len: int | None, dtype: str) -> int:
    """Bytes of keys and values on a CPU: of a whole batch at its longest, if CPU_SHARE of the free memory holds that.

    vLLM's own default, nine tenths of the machine's memory, is refused on any machine that does something else too.
    """
    longest = max_model_len or config.get("max_position_embeddings") or 4096
    blocks = -(-longest // BLOCK) + 1
    one = kv_cache_bytes(config, blocks * BLOCK, getattr(torch, dtype).itemsize)
    return max(one, min(BATCH * one, int(CPU_SHARE * free_bytes(torch.device("cpu")))))


def _end_tokens(base: ModelFolder, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends an answer, by the same rule as transformers: generation_config.json, else config.json, else the tokenizer."""
    ends: Any = base.config.get("eos_token_id")
    if (base.path / "generation_config.json").is_file():
        try:
            ends = GenerationConfig.from_pretrained(str(base.path)).eos_token_id
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(f"generation_config.json cannot be read: {error}", where=base.path, remedy="Mend it, or remove it.") from error
    if ends is None:
        ends = tokenizer.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, list) else [ends]


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """These variables where the user set none, for what only the environment can tell vLLM; afterwards it is as before."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _line(error: Exception) -> str:
    """The error's first line, as one."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _bar(watch: Watch) -> Callable[..., tqdm[Any]]:
    """What vLLM takes for its progress bar: it draws nothing and tells `watch` how many answers have ended.

    The number of new tokens is not told: vLLM hands out no unfinished answers here.
    """

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if self.desc and "Processed" in self.desc:  # another bar counts the prompts that are handed over
                watch(int(self.n), 0)
            return shown

    return functools.partial(Bar, file=io.StringIO())
