"""The transformers engine: one live model, weights replaced in place, a decode loop of our own."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch
from transformers import (
    GenerationConfig,
    StoppingCriteriaList,
    set_seed,
)

from evomerge.answering.encode import Encoder, first_stop, prompt_seed
from evomerge.answering.engine import Answer, Got, Settings, Watch, pack
from evomerge.answering.hf.decode import Hooks, Output, decodable, decode
from evomerge.answering.hf.gradient import MICRO_TOKENS, GradientModel, Likelihood, Pair, make_pair
from evomerge.answering.hf.loading import context_of, load_model, load_tokenizer
from evomerge.answering.hf.sampling import Rules
from evomerge.errors import EngineError
from evomerge.genome.weights import Genome
from evomerge.merging.checkpoints.model_folder import ModelFolder
from evomerge.merging.live import LiveModel
from evomerge.merging.placement import is_out_of_memory
from evomerge.recipe import Recipe
from evomerge.study import EngineSection, GenerationSection

log = logging.getLogger(__name__)
T = TypeVar("T")
STOP_MARGIN = 8  # tokens more than a stop string can have: what is decoded to look for one
Done = Callable[[int, Output], None]  # a row's place in its part, and its output


@dataclass(frozen=True)
class Ask:
    """One prompt with its tokens and settings."""

    prompt: str
    row: list[int]
    settings: GenerationSection


class TransformersEngine:
    """Answers batches of similar length with `decode`, and models whose caches it does not know
    with `generate`.

    Without siblings the model answers as it lies on disk, and `apply` is not there for it.
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
        self.settings, self.generation, self.seed = engine, generation, seed
        self.limits: dict[str, int] = {}
        self.watch: Watch | None = None
        if engine.threads is not None:
            torch.set_num_threads(engine.threads)
        self.tokenizer = load_tokenizer(base, engine.trust_remote_code)
        self.model = load_model(base, engine, getattr(torch, dtype))
        if siblings and any(p.device.type == "meta" for p in self.model.parameters()):
            raise EngineError(
                "the model does not fit the devices: parts of it wait on the CPU or the disk, where no merge reaches them",
                where="engine.device_map",
                found=engine.device_map,
                remedy="Use engine.quantization: 4bit, or more GPUs.",
            )
        self.live = (
            LiveModel(self.model, base, siblings, seed, engine.residency) if siblings else None
        )
        self.context = context_of(self.model.config)
        self.encode = Encoder(self.tokenizer, self.context, generation.max_new_tokens, too_long)
        self.rules = self._rules()
        self._gradient: GradientModel | None = None

    def apply(self, recipe: Recipe) -> None:
        """Give the live model the recipe's weights, in place."""
        assert self.live is not None, "an engine without siblings merges nothing"
        self.live.apply(recipe)

    def batches(self, prompts: Sequence[str], settings: Settings = None) -> list[list[int]]:
        """Indices of the prompts, longest first, in batches of `batch_size` and `batch_tokens`;
        `limits` do not change them.
        """
        new = self._new_tokens(prompts, settings)
        lengths = [len(row) for row in self.encode(prompts, new)]
        return pack(lengths, new, self.settings.batch_size, self.settings.batch_tokens)

    def answer(
        self,
        prompts: Sequence[str],
        settings: Settings = None,
        got: Got | None = None,
        deadline: float | None = None,
    ) -> list[Answer]:
        """Answer one batch, in parts where memory has shown that it must be.

        Out of memory, the limit becomes half of what failed and is remembered in `limits`; the
        prompts are tried again, but for those that `got` was told of. Raises EngineError: out of
        memory with one prompt, a prompt that leaves no room in the context.
        """
        rows = self.encode(prompts, self._new_tokens(prompts, settings))
        own = [self.generation] * len(prompts) if settings is None else settings
        asks = [Ask(*ask) for ask in zip(prompts, rows, own, strict=True)]
        outputs: dict[int, Output] = {}
        waiting, part = list(range(len(asks))), list[int]()

        def done(place: int, output: Output) -> None:
            if got is not None:
                outputs[part[place]] = output
                got(part[place], self._finish(output, asks[part[place]].settings))

        while waiting and not _over(deadline):
            part[:] = [waiting[i] for i in self._packed([asks[i] for i in waiting])]
            found = self._attempt([asks[i] for i in part], list(outputs.values()), done, deadline)
            if found is None:
                self._halve([asks[i] for i in part])
            else:
                outputs |= dict(zip(part, found, strict=True))
            waiting = [i for i in waiting if i not in outputs]
        return [self._finish(outputs.get(i, Output()), ask.settings) for i, ask in enumerate(asks)]

    def gradient(
        self, genome: Genome, vector: Sequence[float], pairs: Sequence[tuple[str, str]]
    ) -> Likelihood:
        """The references' log-likelihood at a vector and its gradient by the genome's numbers, of
        (prompt, reference) pairs.

        The live model has the vector's weights afterwards. Raises StudyFileError for a genome that
        is not linear in its
        numbers, EngineError: out of memory with one pair.
        """
        assert self.live is not None, "an engine without siblings merges nothing"
        if self._gradient is None or self._gradient.genome != genome:
            self._gradient = GradientModel(self.model, self.live, genome)
        return self._in_memory(partial(self._gradient, vector=vector), pairs)

    def _in_memory(self, compute: Callable[..., T], pairs: Sequence[tuple[str, str]]) -> T:
        """`compute(pairs, micro_tokens=…)`; out of memory, `limits` gets half of what failed and it
        is computed anew.
        """
        tokens = [self._pair(*pair) for pair in pairs]
        longest = max(len(prompt) + len(reference) for prompt, reference in tokens)
        while True:
            micro = self.limits.get("gradient_tokens", MICRO_TOKENS)
            try:
                return compute(tokens, micro_tokens=micro)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if micro <= longest:
                raise EngineError(
                    f"out of memory with the gradient of a single task of {longest} tokens",
                    remedy="Leave out search.warm_start, or use a device with more memory.",
                )
            self.limits["gradient_tokens"] = micro // 2
            log.warning(
                "out of memory with %d tokens: gradients of %d at a time from here on",
                micro,
                micro // 2,
            )

    def _pair(self, prompt: str, reference: str) -> Pair:
        """Tokens of a prompt, and of its reference up to an end token of the model's."""
        own, ends = self.tokenizer.eos_token_id, self.rules.ends
        return make_pair(
            self.encode, prompt, reference, own if own in ends or not ends else min(ends)
        )

    def _new_tokens(self, prompts: Sequence[str], settings: Settings) -> list[int]:
        """The longest answer to each prompt."""
        return (
            [self.generation.max_new_tokens] * len(prompts)
            if settings is None
            else [g.max_new_tokens for g in settings]
        )

    def _packed(self, asks: Sequence[Ask]) -> list[int]:
        """The first batch of these, within settings and limits."""
        budgets = [
            b
            for b in (self.settings.batch_tokens, self.limits.get("batch_tokens"))
            if b is not None
        ]
        new = [ask.settings.max_new_tokens for ask in asks]
        return pack(
            [len(ask.row) for ask in asks],
            new,
            self.settings.batch_size,
            min(budgets, default=None),
        )[0]

    def _attempt(
        self, asks: list[Ask], before: list[Output], done: Done, deadline: float | None
    ) -> list[Output] | None:
        """The outputs of one part, or None when memory did not suffice; `before` are those of other
        parts.
        """
        ended, tokens = len(before), sum(len(output.tokens) for output in before)
        watch = self.watch
        shifted = None if watch is None else lambda e, t: watch(ended + e, tokens + t)
        try:
            if not decodable(self.model):
                return self._generate_all(asks, done, deadline)
            rules = [self.rules_of(ask.settings) for ask in asks]
            seeds = [self.seed_of(ask) for ask in asks] if any(r.do_sample for r in rules) else []
            over = None if deadline is None else lambda: _over(deadline)
            return decode(
                self.model,
                [ask.row for ask in asks],
                rules,
                seeds,
                Hooks(self._stops(asks), shifted, done=done, over=over),
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return None  # only here have the error and all that its frames held been let go

    def _halve(self, asks: Sequence[Ask]) -> None:
        """Let batches have at most half of the tokens that were too many. Raises EngineError at one
        prompt.
        """
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        width, new = (
            max(len(ask.row) for ask in asks),
            max(ask.settings.max_new_tokens for ask in asks),
        )
        if len(asks) == 1:
            raise EngineError(
                f"out of memory with a single prompt of {width} tokens and max_new_tokens {new}",
                remedy="Lower generation.max_new_tokens, shorten the task, or use a device with more memory.",
            )
        self.limits["batch_tokens"] = len(asks) * (width + new) // 2
        log.warning(
            "out of memory with %d prompts: batches of at most %d tokens from here on",
            len(asks),
            self.limits["batch_tokens"],
        )

    def _stops(self, asks: Sequence[Ask]) -> Callable[[int, list[int]], bool] | None:
        """What `decode` asks of each row's new tokens, where any prompt has stop strings."""
        if not any(ask.settings.stop for ask in asks):
            return None
        return lambda place, tokens: (
            bool(asks[place].settings.stop) and self._stopped(tokens, asks[place].settings.stop)
        )

    def _stopped(self, tokens: list[int], stops: Sequence[str]) -> bool:
        """Whether the latest tokens complete a stop string; a character has up to four of them."""
        most = 4 * max(map(len, stops)) + STOP_MARGIN
        text = str(self.tokenizer.decode(tokens[-most:], skip_special_tokens=True))
        return first_stop(text, stops) is not None

    def _finish(self, output: Output, settings: GenerationSection) -> Answer:
        text = str(self.tokenizer.decode(output.tokens, skip_special_tokens=True))
        stop = first_stop(text, settings.stop)
        return Answer(
            text[:stop], truncated=not output.ended and stop is None, tokens=len(output.tokens)
        )

    def seed_of(self, ask: Ask) -> int:
        """Of the draws of one answer."""
        return prompt_seed(
            self.seed if ask.settings.seed is None else ask.settings.seed, ask.prompt
        )

    def rules_of(self, g: GenerationSection) -> Rules:
        """The prompt's own settings; what ends an answer is the model's."""
        return Rules(
            g.max_new_tokens,
            self.rules.ends,
            g.do_sample,
            g.temperature,
            g.top_p,
            g.repetition_penalty,
        )

    def _rules(self) -> Rules:
        """The model's own end tokens, our settings, and nothing else from its
        generation_config.json.
        """
        g, own = self.generation, self.model.generation_config
        ends = (
            own.eos_token_id
            if own is not None and own.eos_token_id is not None
            else self.tokenizer.eos_token_id
        )
        several = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
        return Rules(
            g.max_new_tokens, several, g.do_sample, g.temperature, g.top_p, g.repetition_penalty
        )

    def _generate_all(
        self, asks: Sequence[Ask], done: Done, deadline: float | None
    ) -> list[Output]:
        """`_generate` for each group of prompts with the same settings."""
        outputs = [Output() for _ in asks]
        for settings in dict.fromkeys(ask.settings for ask in asks):
            places = [i for i, ask in enumerate(asks) if ask.settings == settings]
            if _over(deadline):
                break
            for i, output in zip(
                places, self._generate([asks[i] for i in places], settings, deadline), strict=True
            ):
                outputs[i] = output
                if output.ended or len(output.tokens) == settings.max_new_tokens:
                    done(i, output)
        return outputs

    @torch.inference_mode()
    def _generate(
        self, asks: Sequence[Ask], settings: GenerationSection, deadline: float | None
    ) -> list[Output]:
        """transformers' `generate`, all rows to the end of the longest answer: for caches that hold
        more than keys and values.
        """
        r, rows = self.rules_of(settings), [ask.row for ask in asks]
        width, pad = max(map(len, rows)), self.tokenizer.pad_token_id
        config = GenerationConfig(
            max_new_tokens=r.max_new_tokens,
            do_sample=r.do_sample,
            repetition_penalty=r.repetition_penalty,
            eos_token_id=sorted(r.ends) or None,
            pad_token_id=pad,
            **({"temperature": r.temperature, "top_p": r.top_p, "top_k": 0} if r.do_sample else {}),
        )
        device = self.model.get_input_embeddings().weight.device
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor(
            [[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device
        )

        def stop(ids: torch.Tensor, scores: object) -> torch.Tensor:
            # transformers' own `stop_strings` fail with tokenizers that have no rule for joining
            # tokens
            ended = [
                bool(settings.stop) and self._stopped(row, settings.stop)
                for row in ids[:, width:].tolist()
            ]
            return ids.new_tensor([_over(deadline) or e for e in ended]).bool()

        stopping = StoppingCriteriaList([stop] if settings.stop or deadline is not None else [])
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if r.do_sample:
                seed = self.seed if settings.seed is None else settings.seed
                set_seed(prompt_seed(seed, "\0".join(ask.prompt for ask in asks)))
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                stopping_criteria=stopping,
            )
        return [self._until_end(row, settings.stop) for row in output[:, width:].tolist()]

    def _until_end(self, tokens: list[int], stops: Sequence[str]) -> Output:
        """What `decode` would have made of a row: `generate` fills it up after its end."""
        end = next((i for i, token in enumerate(tokens) if token in self.rules.ends), None)
        kept = tokens[:end]
        stop = (
            next((i for i in range(1, len(kept) + 1) if self._stopped(kept[:i], stops)), None)
            if stops
            else None
        )
        return Output(kept[:stop], end is not None or stop is not None)


def _over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline
