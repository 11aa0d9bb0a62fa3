"""The transformers engine: one live model, weights replaced in place, a decode loop of our own."""

from __future__ import annotations

import gc
import importlib.util
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from evomerge.answering.decode import Hooks, Output, Rules, decodable, decode
from evomerge.answering.encode import Encoder, first_stop, prompt_seed
from evomerge.answering.engine import Answer, Watch, pack
from evomerge.answering.gradient import MICRO_TOKENS, GradientModel, Likelihood, Pair, make_pair
from evomerge.errors import EngineError, ModelError
from evomerge.genome import Genome
from evomerge.merging.folder import ModelFolder
from evomerge.merging.live import LiveModel
from evomerge.merging.resident import is_out_of_memory
from evomerge.recipe import Recipe
from evomerge.study import EngineSection, GenerationSection

log = logging.getLogger(__name__)
T = TypeVar("T")
STOP_MARGIN = 8  # tokens more than a stop string can have: what is decoded to look for one


class TransformersEngine:
    """Answers batches of similar length with `decode`, and models whose caches it does not know with `generate`.

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
        self.model = _load_model(base, engine, getattr(torch, dtype))
        self.live = LiveModel(self.model, base, siblings, seed, engine.residency) if siblings else None
        self.encode = Encoder(self.tokenizer, _context(self.model.config), generation.max_new_tokens, too_long)
        self.rules = self._rules()
        self._gradient: GradientModel | None = None

    def apply(self, recipe: Recipe) -> None:
        """Give the live model the recipe's weights, in place."""
        assert self.live is not None, "an engine without siblings merges nothing"
        self.live.apply(recipe)

    def batches(self, prompts: Sequence[str]) -> list[list[int]]:
        """Indices of the prompts, longest first, in batches of `batch_size` and `batch_tokens`; `limits` do not change them."""
        lengths = [len(row) for row in self.encode(prompts)]
        return pack(lengths, self.generation.max_new_tokens, self.settings.batch_size, self.settings.batch_tokens)

    def answer(self, prompts: Sequence[str]) -> list[Answer]:
        """Answer one batch, in parts where memory has shown that it must be.

        Out of memory, the limit becomes half of what failed and is remembered in `limits`; the prompts are tried again.
        Raises EngineError: out of memory with one prompt, a prompt that leaves no room in the context.
        """
        rows = self.encode(prompts)
        outputs: dict[int, Output] = {}
        waiting = list(range(len(rows)))
        while waiting:
            part = [waiting[i] for i in self._packed([len(rows[i]) for i in waiting])]
            found = self._attempt([rows[i] for i in part], [prompts[i] for i in part], outputs)
            if found is None:
                self._halve([len(rows[i]) for i in part])
                continue
            outputs |= dict(zip(part, found, strict=True))
            waiting = [i for i in waiting if i not in outputs]
        return [self._finish(outputs[i]) for i in range(len(prompts))]

    def gradient(self, genome: Genome, vector: Sequence[float], pairs: Sequence[tuple[str, str]]) -> Likelihood:
        """The references' log-likelihood at a vector and its gradient by the genome's numbers, of (prompt, reference) pairs.

        The live model has the vector's weights afterwards. Raises StudyFileError for a genome that is not linear in its
        numbers, EngineError: out of memory with one pair.
        """
        assert self.live is not None, "an engine without siblings merges nothing"
        if self._gradient is None or self._gradient.genome != genome:
            self._gradient = GradientModel(self.model, self.live, genome)
        return self._in_memory(partial(self._gradient, vector=vector), pairs)

    def _in_memory(self, compute: Callable[..., T], pairs: Sequence[tuple[str, str]]) -> T:
        """`compute(pairs, micro_tokens=…)`; out of memory, `limits` gets half of what failed and it is computed anew."""
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
            log.warning("out of memory with %d tokens: gradients of %d at a time from here on", micro, micro // 2)

    def _pair(self, prompt: str, reference: str) -> Pair:
        """Tokens of a prompt, and of its reference up to an end token of the model's."""
        own, ends = self.tokenizer.eos_token_id, self.rules.ends
        return make_pair(self.encode, prompt, reference, own if own in ends or not ends else min(ends))

    def _packed(self, lengths: Sequence[int]) -> list[int]:
        """The first batch of these, within settings and limits."""
        budgets = [b for b in (self.settings.batch_tokens, self.limits.get("batch_tokens")) if b is not None]
        return pack(lengths, self.generation.max_new_tokens, self.settings.batch_size, min(budgets, default=None))[0]

    def _attempt(self, rows: list[list[int]], prompts: list[str], before: dict[int, Output]) -> list[Output] | None:
        """The outputs of one part, or None when memory did not suffice."""
        ended, tokens = len(before), sum(len(output.tokens) for output in before.values())
        watch = self.watch
        shifted = None if watch is None else lambda e, t: watch(ended + e, tokens + t)
        try:
            if not decodable(self.model):
                return self._generate(rows, prompts)
            stopped = (lambda _, tokens: self._stopped(tokens)) if self.generation.stop else None
            seeds = [prompt_seed(self.seed, prompt) for prompt in prompts] if self.rules.do_sample else []
            return decode(self.model, rows, self.rules, seeds, Hooks(stopped, shifted))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return None  # only here have the error and all that its frames held been let go

    def _halve(self, lengths: Sequence[int]) -> None:
        """Let batches have at most half of the tokens that were too many. Raises EngineError at one prompt."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        width, new = max(lengths), self.generation.max_new_tokens
        if len(lengths) == 1:
            raise EngineError(
                f"out of memory with a single prompt of {width} tokens and max_new_tokens {new}",
                remedy="Lower generation.max_new_tokens, shorten the task, or use a device with more memory.",
            )
        self.limits["batch_tokens"] = len(lengths) * (width + new) // 2
        log.warning("out of memory with %d prompts: batches of at most %d tokens from here on", len(lengths), self.limits["batch_tokens"])

    def _stopped(self, tokens: list[int]) -> bool:
        """Whether the latest tokens complete a stop string; a character has up to four of them."""
        most = 4 * max(map(len, self.generation.stop)) + STOP_MARGIN
        text = str(self.tokenizer.decode(tokens[-most:], skip_special_tokens=True))
        return first_stop(text, self.generation.stop) is not None

    def _finish(self, output: Output) -> Answer:
        text = str(self.tokenizer.decode(output.tokens, skip_special_tokens=True))
        stop = first_stop(text, self.generation.stop)
        return Answer(text[:stop], truncated=not output.ended and stop is None, tokens=len(output.tokens))

    def _rules(self) -> Rules:
        """The model's own end tokens, our settings, and nothing else from its generation_config.json."""
        g, own = self.generation, self.model.generation_config
        ends = own.eos_token_id if own is not None and own.eos_token_id is not None else self.tokenizer.eos_token_id
        several = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
        return Rules(g.max_new_tokens, several, g.do_sample, g.temperature, g.top_p, g.repetition_penalty)

    @torch.inference_mode()
    def _generate(self, rows: list[list[int]], prompts: list[str]) -> list[Output]:
        """transformers' `generate`, all rows to the end of the longest answer: for caches that hold more than keys and values."""
        r, width, pad = self.rules, max(map(len, rows)), self.tokenizer.pad_token_id
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
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        # transformers' own `stop_strings` fail with tokenizers that have no rule for joining tokens.
        stop = StoppingCriteriaList([lambda ids, scores: ids.new_tensor([self._stopped(row) for row in ids[:, width:].tolist()]).bool()])
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if r.do_sample:
                set_seed(prompt_seed(self.seed, "\0".join(prompts)))
            output = self.model.generate(
                input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=stop if self.generation.stop else None
            )
        return [self._until_end(row) for row in output[:, width:].tolist()]

    def _until_end(self, tokens: list[int]) -> Output:
        """What `decode` would have made of a row: `generate` fills it up after its end."""
        end = next((i for i, token in enumerate(tokens) if token in self.rules.ends), None)
        kept = tokens[:end]
        stop = next((i for i in range(1, len(kept) + 1) if self._stopped(kept[:i])), None) if self.generation.stop else None
        return Output(kept[:stop], end is not None or stop is not None)


def _context(config: Any) -> int | None:
    """How many tokens the model has positions for."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def load_tokenizer(folder: ModelFolder, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, padding on the left; a missing pad token is the end token. Raises ModelError."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder.path), trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, … for a bad tokenizer
        raise ModelError(f"the tokenizer cannot be loaded: {error}", where=folder.path, remedy="Add the tokenizer's files.") from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has neither a pad nor an end token", where=folder.path, remedy="Set one in tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_model(
    folder: ModelFolder, engine: EngineSection, dtype: torch.dtype
) -> Any:  # a PreTrainedModel, whose own annotations hide `generate`
    transformers_logging.disable_progress_bar()  # our own progress says what takes time
    device = engine.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device_map: Any = engine.device_map
    quantization = _quantization(engine)
    if quantization is not None and device_map is None:
        device_map = {"": device}  # tensor by tensor: the unquantised model is never there as a whole
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder.path),
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=engine.trust_remote_code,
            use_safetensors=True,
            quantization_config=quantization,
        )
        if device_map is None:
            model.to(torch.device(device))  # type: ignore[arg-type]
    except torch.OutOfMemoryError as error:
        raise EngineError(
            "the model does not fit the device", where=folder.path, found=device, remedy="Use engine.device_map: auto."
        ) from error
    except Exception as error:  # as above: many kinds, none of them ours
        raise ModelError(f"transformers cannot load the model: {error}", where=folder.path, remedy="Check config.json.") from error
    model.eval()
    return model


def _quantization(engine: EngineSection) -> BitsAndBytesConfig | None:
    """How the live model is quantised: NF4, computed in bfloat16. Raises EngineError without bitsandbytes."""
    if engine.quantization is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise EngineError(
            "a live model in 4 bits needs bitsandbytes",
            where="engine.quantization",
            found=engine.quantization,
            remedy="Run pip install 'evomerge[4bit]'.",
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=engine.quantization == "4bit-double",
    )
