"""The transformers engine: one live model, weights replaced in place, batches padded on the left."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging as transformers_logging

from evomerge.answering.engine import Answer
from evomerge.errors import EngineError, ModelError
from evomerge.merging.layout import ModelFolder
from evomerge.merging.live import LiveModel
from evomerge.recipe import Recipe
from evomerge.study import EngineSection, GenerationSection

log = logging.getLogger(__name__)


class TransformersEngine:
    """Answers with `generate`, in batches of similar length.

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
    ) -> None:
        self.settings, self.generation, self.seed = engine, generation, seed
        if engine.threads is not None:
            torch.set_num_threads(engine.threads)
        self.tokenizer = load_tokenizer(base, engine.trust_remote_code)
        self.model = _load_model(base, engine, getattr(torch, dtype))
        self.live = LiveModel(self.model, base, siblings, seed, engine.residency) if siblings else None
        self.config = self._generation_config()

    def apply(self, recipe: Recipe) -> None:
        """Give the live model the recipe's weights, in place."""
        assert self.live is not None, "an engine without siblings merges nothing"
        self.live.apply(recipe)

    def batches(self, prompts: Sequence[str]) -> list[list[int]]:
        """Indices of the prompts, longest first, in groups of `batch_size`; ties keep their order."""
        lengths = [len(ids) for ids in self.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]]
        order = sorted(range(len(prompts)), key=lambda i: (-lengths[i], i))
        size = self.settings.batch_size
        return [order[at : at + size] for at in range(0, len(order), size)]

    @torch.inference_mode()
    def answer(self, prompts: Sequence[str]) -> list[Answer]:
        """Answer one batch. Raises EngineError: out of memory, a prompt that leaves no room in the context."""
        inputs = self.tokenizer(list(prompts), add_special_tokens=False, padding=True, return_tensors="pt")
        width = inputs["input_ids"].shape[1]
        context = getattr(self.model.config, "max_position_embeddings", None)
        if context is not None and width + self.generation.max_new_tokens > context:
            raise EngineError(
                f"a prompt of {width} tokens and max_new_tokens {self.generation.max_new_tokens} exceed the context of {context}",
                remedy="Lower generation.max_new_tokens, or shorten the task.",
            )
        if self.generation.do_sample:
            set_seed(_batch_seed(self.seed, prompts))
        device = self.model.get_input_embeddings().weight.device
        try:
            output = self.model.generate(
                input_ids=inputs["input_ids"].to(device), attention_mask=inputs["attention_mask"].to(device), generation_config=self.config
            )
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"out of memory with {len(prompts)} prompts of up to {width} tokens",
                where="engine.batch_size",
                found=self.settings.batch_size,
                remedy="Lower it; the study file's hash changes with it, so start a new study.",
            ) from error
        return [self._finish(row) for row in output[:, width:].tolist()]

    def _finish(self, ids: list[int]) -> Answer:
        ends = self.config.eos_token_id if isinstance(self.config.eos_token_id, list) else [self.config.eos_token_id]
        stop = next((i for i, token in enumerate(ids) if token in ends), None)
        kept = ids if stop is None else ids[:stop]
        return Answer(str(self.tokenizer.decode(kept, skip_special_tokens=True)), truncated=stop is None, tokens=len(kept))

    def _generation_config(self) -> GenerationConfig:
        """The model's own end tokens, our settings, and nothing else from its generation_config.json."""
        g, own = self.generation, self.model.generation_config
        ends = own.eos_token_id if own is not None and own.eos_token_id is not None else self.tokenizer.eos_token_id
        sampling = {"temperature": g.temperature, "top_p": g.top_p, "top_k": 0} if g.do_sample else {}
        return GenerationConfig(
            max_new_tokens=g.max_new_tokens,
            do_sample=g.do_sample,
            repetition_penalty=g.repetition_penalty,
            eos_token_id=ends,
            pad_token_id=self.tokenizer.pad_token_id,
            **sampling,
        )


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


def _batch_seed(seed: int, prompts: Sequence[str]) -> int:
    """A seed from the study's and the batch's texts, so that sampling is the same after a resume."""
    text = "\0".join([str(seed), *prompts])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:4], "big")
