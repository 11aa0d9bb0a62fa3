"""How likely a model finds a continuation of a prompt: what a judge in process and lm-eval's
multiple choice ask.

Prompt and continuation are tokenised as one text, for a tokenizer may glue a space to what follows
it, or begin every text with one. The continuation's tokens are those behind what this has in common
with the prompt tokenised alone.
"""

from __future__ import annotations

import gc
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evomerge.answering.engine import make_engine, pack
from evomerge.answering.hf.decode import decodable
from evomerge.answering.servers.openai_protocol import whole
from evomerge.errors import EngineError, ModelError
from evomerge.merging.checkpoints.fingerprint import combined, fingerprint
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.placement import is_out_of_memory
from evomerge.study import EngineSection, GenerationSection

log = logging.getLogger(__name__)
BATCH_TOKENS = 16_384  # of one forward pass, where the section names none

# the tokens that a model is given, and those of the continuation
Spoken = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class LikelihoodEngine:
    """One model as it lies on disk that tells how likely continuations are; it answers nothing and
    is never merged.
    """

    model: Any
    tokenizer: Any
    context: int | None  # tokens that it has positions for
    fingerprint: str  # SHA-256 over its files
    batch_size: int
    batch_tokens: int

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """As the function below."""
        return loglikelihood(self.model, self.tokenizer, pairs, self.batch_size, self.batch_tokens)

    def length(self, prompt: str) -> int:
        """Its tokens."""
        return len(self.tokenizer(whole(prompt), add_special_tokens=False)["input_ids"])

    def can_write(self, prompt: str, continuation: str) -> bool:
        """Whether the vocabulary holds what the continuation needs, none of it as the unknown
        token.
        """
        ((_, tokens),) = spoken(self.tokenizer, [(prompt, continuation)])
        unknown = self.tokenizer.unk_token_id
        return (unknown is None or unknown not in tokens) and continuation in self.tokenizer.decode(
            tokens
        )


def open_likelihood_engine(
    ref: str, section: EngineSection | None = None, dtype: str | None = None
) -> LikelihoodEngine:
    """A folder or hub name, loaded by the section (device, 4 bits, batches) beside whatever else is
    in memory.

    `dtype` None: float32 on the CPU, where it is exact and no slower, else bfloat16. Raises
    ModelError, EngineError.
    """
    folder = open_model(ref)
    if len(folder.places) > 1:
        raise ModelError(
            "a model and its adapter cannot be loaded as one",
            where=ref,
            remedy="Write the merge of both with evomerge merge.",
        )
    section = (section or EngineSection()).replace(kind="transformers")
    on_cpu = section.device_map is None and (
        section.device == "cpu" or (section.device == "auto" and not torch.cuda.is_available())
    )
    engine: Any = make_engine(
        folder,
        [],
        section,
        GenerationSection(max_new_tokens=1),
        dtype or ("float32" if on_cpu else "bfloat16"),
    )
    return LikelihoodEngine(
        engine.model,
        engine.tokenizer,
        engine.encode.context,
        combined(fingerprint(folder.path)),
        section.batch_size,
        section.batch_tokens or BATCH_TOKENS,
    )


def loglikelihood(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    batch_size: int = 32,
    batch_tokens: int = BATCH_TOKENS,
) -> list[float]:
    """log P(continuation | prompt) of each pair: the sum over the continuation's tokens, in nats; 0
    for an empty one.

    A prompt is the whole text that the model sees, special tokens included as text. Pairs that are
    given the same tokens share a row; a batch has at most `batch_size` rows of `batch_tokens`
    tokens together, longest first, padded on the left.
    Raises EngineError: out of memory with a single row.
    """
    parts = spoken(tokenizer, pairs)
    rows = list(dict.fromkeys(given for given, said in parts if said))
    wanted: dict[tuple[int, ...], list[int]] = {row: [] for row in rows}
    for i, (given, said) in enumerate(parts):
        if said:
            wanted[given].append(i)
    found = [0.0] * len(parts)
    padded = decodable(model)  # a recurrent state would take the padding in
    waiting = list(range(len(rows)))
    while waiting:
        first = [
            waiting[i]
            for i in pack([len(rows[i]) for i in waiting], 0, batch_size, batch_tokens)[0]
        ]
        batch = [i for i in first if padded or len(rows[i]) == len(rows[first[0]])]
        asked = [(place, i) for place, row in enumerate(batch) for i in wanted[rows[row]]]
        values = _attempt(
            model, [rows[i] for i in batch], [(place, parts[i][1]) for place, i in asked]
        )
        if values is None:
            batch_size = _halved(len(batch), len(rows[batch[0]]))
            continue
        for (_, i), value in zip(asked, values, strict=True):
            found[i] = value
        waiting = [i for i in waiting if i not in set(batch)]
    return found


def spoken(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Spoken]:
    """Each pair as the tokens that the model is given, which end before the last one, and the
    continuation's tokens.
    """
    if not pairs:
        return []
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    alone = dict(zip(prompts, _tokens(tokenizer, prompts), strict=True))
    parts = []
    for (prompt, _), tokens in zip(
        pairs,
        _tokens(tokenizer, [prompt + continuation for prompt, continuation in pairs]),
        strict=True,
    ):
        before = alone[prompt]
        most = min(len(before), len(tokens))
        start = next((i for i in range(most) if before[i] != tokens[i]), most)
        # the first token of all has a likelihood only after one that texts begin with
        if start == 0:
            tokens, start = [_beginning(tokenizer), *tokens], 1
        parts.append((tuple(tokens[:-1]), tuple(tokens[start:])))
    return parts


def _tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return list(tokenizer([whole(text) for text in texts], add_special_tokens=False)["input_ids"])


def _beginning(tokenizer: Any) -> int:
    t = tokenizer
    return next(
        int(token)
        for token in (t.bos_token_id, t.eos_token_id, t.pad_token_id, 0)
        if token is not None
    )


def _attempt(
    model: Any, rows: list[tuple[int, ...]], asked: list[tuple[int, tuple[int, ...]]]
) -> list[float] | None:
    """The sums for (place of the row, the continuation's tokens), or None when memory did not
    suffice.
    """
    try:
        return _sums(model, rows, asked)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return None  # only here have the error and all that its frames held been let go


@torch.inference_mode()
def _sums(
    model: Any, rows: list[tuple[int, ...]], asked: list[tuple[int, tuple[int, ...]]]
) -> list[float]:
    device = model.get_input_embeddings().weight.device
    width, keep = max(map(len, rows)), max(len(said) for _, said in asked)
    # [rows, width]
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    known = inspect.signature(model.forward).parameters
    extra: dict[str, Any] = (
        {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if "position_ids" in known else {}
    )
    extra |= {"logits_to_keep": keep} if "logits_to_keep" in known else {}
    # [rows, keep, vocabulary]
    logits = (
        model(input_ids=ids, attention_mask=mask, use_cache=False, **extra)
        .logits[:, -keep:]
        .float()
    )
    likely = torch.log_softmax(logits, -1)
    sums = []
    for place, said in asked:
        tokens = torch.tensor(said, device=likely.device)
        sums.append(likely[place, -len(said) :].gather(1, tokens[:, None]).sum())
    return [float(value) for value in torch.stack(sums).tolist()]


def _halved(rows: int, width: int) -> int:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if rows == 1:
        raise EngineError(
            f"out of memory with a single prompt of {width} tokens",
            remedy="Use a smaller model or a device with more memory.",
        )
    log.warning(
        "out of memory with %d prompts: batches of at most %d from here on", rows, rows // 2
    )
    return rows // 2
