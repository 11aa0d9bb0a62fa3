"""The vLLM engine: it loads once and takes each candidate's weights from memory.

vLLM packs weights into its own layouts, which cannot be merged into. So the live model is kept
in host memory as its files would hold it (`HostWeights`) and merged there, and every worker takes
its part from that memory with vLLM's own `reload_weights`: no disk, no pickling, and the same way
for one worker and for several (`tensor_parallel_size`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch

from evomerge.answering.encode import Encoder, prompt_seed
from evomerge.answering.engine import (
    Answer,
    EngineSpec,
    OnAnswer,
    PromptSettings,
    Watch,
    has_passed,
    settings_of_each,
)
from evomerge.answering.hf.loading import load_tokenizer
from evomerge.answering.reply_reader import ReplyReader
from evomerge.answering.thoughts import Marks
from evomerge.answering.vllm.host_weights import host_weights_of
from evomerge.answering.vllm.loading import (
    BATCH,
    end_tokens,
    first_line,
    load_llm,
    refuse_others,
    refuse_quantized_base,
)
from evomerge.errors import EngineError
from evomerge.merging.device_memory import is_out_of_memory
from evomerge.merging.live import LiveModel
from evomerge.recipe import Recipe
from evomerge.study import GenerationSection

# a prompt's index, its new tokens, whether its answer has ended
Outputs = Generator[tuple[int, list[int], bool], None, None]
RESUME = "Run the same command again: it resumes where it stopped."


class VllmEngine:
    """Answers with vLLM; it has no capabilities beyond that."""

    batched_candidates = None
    gradient = None
    likelihood = None

    def __init__(self, spec: EngineSpec) -> None:
        """Raises EngineError: vLLM is absent or refuses its arguments; ModelError: bad files."""
        refuse_others(spec.engine)
        if spec.siblings:
            refuse_quantized_base(spec.base)
        if importlib.util.find_spec("vllm") is None:
            raise EngineError(
                "vLLM is not installed",
                where="engine.kind",
                found="vllm",
                remedy="Run pip install 'evomerge[vllm]'.",
            )
        base, section = spec.base, spec.engine
        self.generation, self.seed = spec.generation, spec.seed
        self.limits: dict[str, int] = {}  # vLLM fits its batches into memory itself
        self.watch: Watch | None = None
        if section.threads is not None:
            torch.set_num_threads(section.threads)
        self.tokenizer = load_tokenizer(base, section.trust_remote_code)
        self.ends = end_tokens(base, self.tokenizer)
        self.live: LiveModel | None = None
        if spec.siblings:
            self.weights = host_weights_of(base, getattr(torch, spec.dtype))
            self.live = LiveModel(
                self.weights.module, base, spec.siblings, spec.seed, section.residency
            )
        self.threads = torch.get_num_threads()  # vLLM leaves one to torch
        self.llm = load_llm(base, section, spec.dtype, spec.seed)
        self.context: int | None = self.llm.llm_engine.model_config.max_model_len
        most = spec.generation.max_new_tokens
        self.encode = Encoder(self.tokenizer, self.context, most, spec.too_long)
        self.read = ReplyReader(self.tokenizer, spec.generation.reasoning)
        self._applied = ""  # digest of the recipe whose weights vLLM holds
        self._broken: str | None = None  # why it can no longer answer

    @property
    def marks(self) -> Marks | None:
        """See `Engine`."""
        return self.read.marks

    def apply(self, recipe: Recipe) -> None:
        """Merge in host memory, then have vLLM take the weights.

        If merging fails, vLLM is left as it was.
        """
        assert self.live is not None, "an engine without siblings merges nothing"
        self._check()
        if recipe.digest() == self._applied:
            return
        self._applied = ""
        with _threads(self.threads):
            self.live.apply(recipe)
        with self._breaking("vLLM could not load the weights"):
            self.llm.collective_rpc(
                "reload_weights", kwargs={"weights_path": str(self.weights.folder)}
            )
        self._applied = recipe.digest()

    def batches(self, prompts: Sequence[str], settings: PromptSettings = None) -> list[list[int]]:
        """Indices of the prompts, in order, in groups of BATCH: without padding none are sorted."""
        indices = list(range(len(prompts)))
        return [indices[at : at + BATCH] for at in range(0, len(indices), BATCH)]

    def answer(
        self,
        prompts: Sequence[str],
        settings: PromptSettings = None,
        on_answer: OnAnswer | None = None,
        deadline: float | None = None,
    ) -> list[Answer]:
        """Answer one batch; see `Engine.answer`.

        At the deadline the current step is still finished. What `on_answer` raises is passed on,
        and the engine stays usable. Raises EngineError: out of memory, or a prompt that leaves no
        room in the context.
        """
        self._check()
        own = settings_of_each(prompts, settings, self.generation)
        # all are checked before vLLM gets any
        rows = self.encode(prompts, [g.max_new_tokens for g in own])
        params = [self._sampling(prompt, g) for prompt, g in zip(prompts, own, strict=True)]
        answers = [Answer("", True, 0)] * len(prompts)
        with closing(self._outputs(rows, params, deadline)) as outputs:
            for index, tokens, ended in outputs:
                answers[index] = self._finish(prompts[index], tokens, own[index])
                if ended and on_answer is not None:
                    on_answer(index, answers[index])
        return answers

    def _outputs(
        self, rows: Sequence[list[int]], params: Sequence[Any], deadline: float | None
    ) -> Outputs:
        """Each answer as it ends; at the deadline the others with their tokens so far."""
        with self._breaking("vLLM could not answer"):
            # Keys and values computed with other weights must go, and also those of an earlier
            # batch, which a resumed run does not answer.
            if not self.llm.reset_prefix_cache():
                raise RuntimeError("its prefix cache is in use")
            yield from run_steps(self.llm.llm_engine, rows, params, self.watch, deadline)

    def _sampling(self, prompt: str, g: GenerationSection) -> Any:
        """vLLM's parameters for one prompt.

        It has its own seed, so its answer does not depend on what shares the batch.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        drawing: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "seed": None}
        if g.do_sample:
            seed = prompt_seed(self.seed if g.seed is None else g.seed, prompt)
            drawing = {"temperature": g.temperature, "top_p": g.top_p, "seed": seed}
        return SamplingParams(
            max_tokens=g.max_new_tokens,
            top_k=0,
            repetition_penalty=g.repetition_penalty,
            stop=list(g.stop) or None,
            stop_token_ids=self.ends,
            # `ends` is complete: vLLM's own end token is the tokenizer's, which may be another
            ignore_eos=True,
            detokenize=bool(g.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
            **drawing,
        )

    def _finish(self, prompt: str, tokens: Sequence[int], g: GenerationSection) -> Answer:
        """The text up to an end token or a stop string, and the thoughts before it."""
        ended = bool(tokens) and tokens[-1] in self.ends
        kept = list(tokens)
        if ended:
            kept.pop()
        return self.read(prompt, kept, ended, g.stop)

    def _check(self) -> None:
        if self._broken is not None:
            raise EngineError(self._broken, remedy=RESUME)

    @contextmanager
    def _breaking(self, what: str) -> Iterator[None]:
        """Refuse to answer after a failure within, because it leaves vLLM half changed."""
        try:
            yield
        except Exception as error:  # vLLM raises torch's, its own and its kernels' errors
            self._broken = f"{what}: {first_line(error)}"
            self._applied = ""
            if is_out_of_memory(error):
                raise EngineError(
                    what + ": out of memory",
                    remedy="Lower engine.vllm.gpu_memory_utilization or max_model_len.",
                ) from error
            raise EngineError(self._broken, remedy=RESUME) from error


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use so many CPU threads until the context ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_steps(
    engine: Any,
    rows: Sequence[list[int]],
    params: Sequence[Any],
    watch: Watch | None = None,
    deadline: float | None = None,
) -> Outputs:
    """What vLLM's `LLM.generate` does with token lists, but each answer is yielded as it ends.

    Closing this early leaves no request behind in vLLM. Unfinished tokens are read from where vLLM
    keeps them: having it return them with every step costs 1 ms a step of 256 prompts, a tenth of a
    small model's speed.
    """
    from vllm.inputs import tokens_input

    running: set[int] = set()
    done = 0  # tokens of ended answers
    try:
        for place, (row, own) in enumerate(zip(rows, params, strict=True)):
            if has_passed(deadline):
                return
            engine.add_request(str(place), tokens_input(list(row)), own)
            running.add(place)
        while engine.has_unfinished_requests() and not has_passed(deadline):
            for output in engine.step():
                place, tokens = int(output.request_id), list(output.outputs[0].token_ids)
                running.remove(place)
                done += len(tokens)
                yield place, tokens, True
            if watch is not None:
                states = _unfinished(engine)
                tokens_so_far = sum(state.detokenizer.num_output_tokens() for state in states)
                watch(len(rows) - len(running), done + tokens_so_far)
        for state in _unfinished(engine):
            yield int(state.external_req_id), list(state.detokenizer.output_token_ids), False
    finally:
        if running:
            engine.abort_request([str(place) for place in running])


def _unfinished(engine: Any) -> list[Any]:
    """The states of all requests that have not ended.

    This is not a stable interface, but vLLM's version is pinned and tests cover it.
    """
    return list(engine.output_processor.request_states.values())
