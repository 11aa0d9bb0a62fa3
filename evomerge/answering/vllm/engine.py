"""The vLLM engine: loads once, takes each candidate's weights from memory, and schedules a whole
batch itself.

vLLM packs weights into layouts of its own, which cannot be merged into. So the live model is kept
in host memory as its files would hold it (`HostWeights`), is merged there, and every worker takes
its part from that memory by vLLM's own `reload_weights`: no disk, no pickling, and the same way for
one worker and for several (`tensor_parallel_size`).
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, Literal

import torch

from evomerge.answering.encode import Encoder, first_stop, prompt_seed
from evomerge.answering.engine import Answer, Got, Settings, Watch
from evomerge.answering.hf.loading import load_tokenizer
from evomerge.answering.vllm.host_weights import host_weights_of
from evomerge.answering.vllm.loading import BATCH, end_tokens, first_line, load_llm, refuse_others
from evomerge.errors import EngineError
from evomerge.merging.checkpoints.model_folder import ModelFolder
from evomerge.merging.live import LiveModel
from evomerge.recipe import Recipe
from evomerge.study import EngineSection, GenerationSection

# a prompt's place, its tokens, whether it has ended
Outputs = Generator[tuple[int, list[int], bool], None, None]


class VllmEngine:
    """Answers with vLLM. Without siblings the model answers as it lies on disk, and `apply` is not
    there for it.
    """

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
        """Raises EngineError when vLLM is absent or refuses its arguments, ModelError for a bad
        tokenizer or tensor.
        """
        refuse_others(engine)
        if importlib.util.find_spec("vllm") is None:
            raise EngineError(
                "vLLM is not installed",
                where="engine.kind",
                found="vllm",
                remedy="Run pip install 'evomerge[vllm]'.",
            )
        self.settings, self.generation, self.seed = engine, generation, seed
        self.limits: dict[str, int] = {}  # vLLM fits its batches into memory itself
        self.watch: Watch | None = None
        if engine.threads is not None:
            torch.set_num_threads(engine.threads)
        self.tokenizer = load_tokenizer(base, engine.trust_remote_code)
        self.ends = end_tokens(base, self.tokenizer)
        self.live: LiveModel | None = None
        if siblings:
            self.weights = host_weights_of(base, getattr(torch, dtype))
            self.live = LiveModel(self.weights.module, base, siblings, seed, engine.residency)
        self.llm = load_llm(base, engine, dtype, seed)
        self.context: int | None = self.llm.llm_engine.model_config.max_model_len
        self.encode = Encoder(self.tokenizer, self.context, generation.max_new_tokens, too_long)
        self._applied = ""  # digest of the recipe whose weights vLLM holds
        self._broken: str | None = None  # why it can answer no more

    def apply(self, recipe: Recipe) -> None:
        """Merge in host memory, then let vLLM take the weights. What fails to merge leaves vLLM as
        it was.
        """
        assert self.live is not None, "an engine without siblings merges nothing"
        self._check()
        if recipe.digest() == self._applied:
            return
        self._applied = ""
        self.live.apply(recipe)
        with self._breaking("vLLM could not take the weights"):
            self.llm.collective_rpc(
                "reload_weights", kwargs={"weights_path": str(self.weights.folder)}
            )
        self._applied = recipe.digest()

    def batches(self, prompts: Sequence[str], settings: Settings = None) -> list[list[int]]:
        """Indices of the prompts, in their order, in groups of BATCH: vLLM needs no sorting, as it
        pads nothing.
        """
        return [
            list(range(at, min(at + BATCH, len(prompts)))) for at in range(0, len(prompts), BATCH)
        ]

    def answer(
        self,
        prompts: Sequence[str],
        settings: Settings = None,
        got: Got | None = None,
        deadline: float | None = None,
    ) -> list[Answer]:
        """Answer one batch; see `Engine.answer`. Raises EngineError: out of memory, a prompt that
        leaves no room in the context.

        At the deadline the step under way is still finished. What `got` raises goes through, and
        the engine answers on.
        """
        self._check()
        own = [self.generation] * len(prompts) if settings is None else settings
        # all are checked before vLLM has any
        rows = self.encode(prompts, [g.max_new_tokens for g in own])
        parameters = [self._sampling(prompt, g) for prompt, g in zip(prompts, own, strict=True)]
        answers = [Answer("", True, 0)] * len(prompts)
        with closing(self._outputs(rows, parameters, deadline)) as outputs:
            for place, tokens, ended in outputs:
                answers[place] = self._finish(tokens, own[place])
                if ended and got is not None:
                    got(place, answers[place])
        return answers

    def _outputs(
        self, rows: Sequence[list[int]], parameters: Sequence[Any], deadline: float | None
    ) -> Outputs:
        """Each answer when it ends; at the deadline the others with their tokens so far."""
        with self._breaking("vLLM could not answer"):
            # Keys and values of other weights must go; and those of an earlier batch, which a
            # resumed run does not answer.
            if not self.llm.reset_prefix_cache():
                raise RuntimeError("its prefix cache is in use")
            yield from run_steps(self.llm.llm_engine, rows, parameters, self.watch, deadline)

    def _sampling(self, prompt: str, g: GenerationSection) -> Any:
        """vLLM's settings for one prompt, with a seed of its own, so that its answer does not
        depend on what shares the batch.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=g.max_new_tokens,
            temperature=g.temperature if g.do_sample else 0.0,
            top_p=g.top_p if g.do_sample else 1.0,
            top_k=0,
            repetition_penalty=g.repetition_penalty,
            seed=prompt_seed(self.seed if g.seed is None else g.seed, prompt)
            if g.do_sample
            else None,
            stop=list(g.stop) or None,
            stop_token_ids=self.ends,
            # `ends` says all: vLLM's own end token is the tokenizer's, which may be another
            ignore_eos=True,
            detokenize=bool(g.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _finish(self, tokens: Sequence[int], g: GenerationSection) -> Answer:
        """The text up to an end token or a stop text."""
        ended = bool(tokens) and tokens[-1] in self.ends
        kept = list(tokens[:-1] if ended else tokens)
        text = str(self.tokenizer.decode(kept, skip_special_tokens=True))
        stop = first_stop(text, g.stop)
        return Answer(text[:stop], truncated=not ended and stop is None, tokens=len(kept))

    def _check(self) -> None:
        if self._broken is not None:
            raise EngineError(
                self._broken, remedy="Run the same command again: it goes on where it stopped."
            )

    @contextmanager
    def _breaking(self, what: str) -> Iterator[None]:
        """What fails within leaves vLLM half changed: the error says so, and nothing is answered
        any more.
        """
        try:
            yield
        except Exception as error:  # vLLM lets through torch's, its own and its kernels' errors
            self._broken = f"{what}: {first_line(error)}"
            self._applied = ""
            if isinstance(error, torch.OutOfMemoryError):
                raise EngineError(
                    what + ": out of memory",
                    remedy="Lower engine.vllm.gpu_memory_utilization or max_model_len.",
                ) from error
            raise EngineError(
                self._broken, remedy="Run the same command again: it goes on where it stopped."
            ) from error


def run_steps(
    engine: Any,
    rows: Sequence[list[int]],
    parameters: Sequence[Any],
    watch: Watch | None = None,
    deadline: float | None = None,
) -> Outputs:
    """What vLLM's `LLM.generate` does with token lists, an answer given out in the step that ends
    it; see `_outputs`.

    Whoever closes this early leaves nothing under way in vLLM. Unfinished tokens are read from
    where vLLM keeps them: having it hand them out with every step costs 1 ms a step of 256 prompts,
    a tenth of a small model's speed.
    """
    from vllm.inputs import tokens_input

    under_way: set[int] = set()
    done = 0  # tokens of ended answers
    try:
        for place, (row, own) in enumerate(zip(rows, parameters, strict=True)):
            if _over(deadline):
                return
            engine.add_request(str(place), tokens_input(list(row)), own)
            under_way.add(place)
        while engine.has_unfinished_requests() and not _over(deadline):
            for output in engine.step():
                place, tokens = int(output.request_id), list(output.outputs[0].token_ids)
                under_way.remove(place)
                done += len(tokens)
                yield place, tokens, True
            if watch is not None:
                watch(
                    len(rows) - len(under_way),
                    done + sum(s.detokenizer.num_output_tokens() for s in _unfinished(engine)),
                )
        for state in _unfinished(engine):
            yield int(state.external_req_id), list(state.detokenizer.output_token_ids), False
    finally:
        if under_way:
            engine.abort_request([str(place) for place in under_way])


def _unfinished(engine: Any) -> list[Any]:
    """The states of all requests that have not ended: no stable interface, but the version is
    pinned and tests hold it.
    """
    return list(engine.output_processor.request_states.values())


def _over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline
