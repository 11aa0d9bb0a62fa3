"""The likelihood of continuations of prompts under a model.

The judge in process, classification by model and the likelihood objective use it.
Prompt and continuation are tokenised as one text, because a tokenizer may attach a space to what
follows it, or begin every text with one. The continuation's tokens are those after what this has in
common with the prompt tokenised alone.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evomerge.answering.encode import first_token
from evomerge.answering.engine import Pairs, items_at
from evomerge.answering.hf.batching import pack, pad_rows, shrink_to_fit
from evomerge.answering.hf.decode import decodable
from evomerge.answering.hf.loading import context_of, load_model, load_tokenizer
from evomerge.answering.servers.openai_protocol import whole
from evomerge.errors import EngineError, ModelError
from evomerge.merging.checkpoints.fingerprint import combined, fingerprint
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.study import EngineSection

log = logging.getLogger(__name__)
BATCH_SIZE = 32  # rows of one forward pass, and their tokens, where no section names them
BATCH_TOKENS = 16_384

# the tokens that a model is given, and those of the continuation
SplitPair = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class TransformersLikelihood:
    """See `LikelihoodCapability`."""

    model: Any
    tokenizer: Any

    def __call__(self, pairs: Pairs) -> list[float]:
        """log P(continuation | prompt) of each pair, in nats; see `loglikelihood`."""
        return loglikelihood(self.model, self.tokenizer, pairs)

    def count_tokens(self, pairs: Pairs) -> list[int]:
        """The number of tokens that each continuation has."""
        return [len(continuation) for _, continuation in split_pairs(self.tokenizer, pairs)]


@dataclass(frozen=True)
class LikelihoodEngine:
    """One model as it is on disk that computes likelihoods; it neither answers nor is merged."""

    model: Any
    tokenizer: Any
    context: int | None  # the number of positions it has
    fingerprint: str  # SHA-256 over its files
    batch_size: int
    batch_tokens: int

    def loglikelihood(self, pairs: Pairs) -> list[float]:
        """See the function `loglikelihood`."""
        return loglikelihood(self.model, self.tokenizer, pairs, self.batch_size, self.batch_tokens)

    def length(self, prompt: str) -> int:
        """The number of tokens of a prompt."""
        return len(self.tokenizer(whole(prompt), add_special_tokens=False)["input_ids"])

    def can_write(self, prompt: str, continuation: str) -> bool:
        """Whether the vocabulary holds what the continuation needs, with no unknown token."""
        ((_, tokens),) = split_pairs(self.tokenizer, [(prompt, continuation)])
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in tokens:
            return False
        return continuation in self.tokenizer.decode(tokens)


def open_likelihood_engine(
    ref: str, section: EngineSection | None = None, dtype: str | None = None
) -> LikelihoodEngine:
    """A folder or hub name, loaded as the section says (device, 4 bits, batches, threads).

    `dtype` None: float32 on the CPU, where it is exact and no slower, else bfloat16. Raises
    ModelError, EngineError.
    """
    folder = open_model(ref)
    if len(folder.places) > 1:
        raise ModelError(
            "a model with an adapter cannot be loaded here",
            where=ref,
            remedy="Merge the two with evomerge merge first.",
        )
    section = section or EngineSection()
    if dtype is None:
        dtype = "float32" if _on_cpu(section) else "bfloat16"
    if section.threads is not None:
        torch.set_num_threads(section.threads)
    tokenizer = load_tokenizer(folder, section.trust_remote_code)
    model = load_model(folder, section, getattr(torch, dtype))
    return LikelihoodEngine(
        model,
        tokenizer,
        context_of(model.config),
        combined(fingerprint(folder.path)),
        section.batch_size,
        section.batch_tokens or BATCH_TOKENS,
    )


def _on_cpu(section: EngineSection) -> bool:
    if section.device_map is not None:
        return False
    return section.device == "cpu" or (section.device == "auto" and not torch.cuda.is_available())


def loglikelihood(
    model: Any,
    tokenizer: Any,
    pairs: Pairs,
    batch_size: int = BATCH_SIZE,
    batch_tokens: int = BATCH_TOKENS,
) -> list[float]:
    """log P(continuation | prompt) of each pair: the sum over its tokens, in nats; 0 if empty.

    A prompt is the whole text that the model sees, special tokens included as text. Pairs that are
    given the same tokens share a row; a batch has at most `batch_size` rows of `batch_tokens`
    tokens together, longest first, padded on the left. Raises EngineError: out of memory with a
    single row.
    """
    parts = split_pairs(tokenizer, pairs)
    by_row: dict[tuple[int, ...], list[int]] = {}  # given tokens -> the pairs that have them
    for i, (given, continuation) in enumerate(parts):
        if continuation:
            by_row.setdefault(given, []).append(i)
    rows = list(by_row)
    found = [0.0] * len(parts)
    padded = decodable(model)  # a recurrent state would take the padding in
    waiting = list(range(len(rows)))
    batch: list[int] = []  # the rows that are being computed

    def run_next() -> None:
        """Compute the next batch of waiting rows, and note in `batch` which these were."""
        lengths = list(map(len, items_at(rows, waiting)))
        first = items_at(waiting, pack(lengths, 0, batch_size, batch_tokens)[0])
        batch[:] = [i for i in first if padded or len(rows[i]) == len(rows[first[0]])]
        asked: list[int] = []  # pairs, and for each of them its row in the batch and what follows
        wanted = []
        for place, row in enumerate(items_at(rows, batch)):
            for i in by_row[row]:
                asked.append(i)
                wanted.append((place, parts[i][1]))
        values = _sums(model, items_at(rows, batch), wanted)
        for i, value in zip(asked, values, strict=True):
            found[i] = value

    def shrink() -> None:
        nonlocal batch_size
        batch_size = _halved(len(batch), len(rows[batch[0]]))

    while waiting:
        shrink_to_fit(run_next, shrink)
        answered = set(batch)
        waiting = [i for i in waiting if i not in answered]
    return found


def split_pairs(tokenizer: Any, pairs: Pairs) -> list[SplitPair]:
    """Each pair as the tokens the model is given, without the last one, and the continuation's."""
    if not pairs:
        return []
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    alone = dict(zip(prompts, _tokens(tokenizer, prompts), strict=True))
    joined = _tokens(tokenizer, [prompt + continuation for prompt, continuation in pairs])
    parts = []
    for (prompt, _), tokens in zip(pairs, joined, strict=True):
        start = _common(alone[prompt], tokens)
        if start == 0:
            # the very first token has a likelihood only after a token that texts begin with
            tokens = [first_token(tokenizer), *tokens]
            start = 1
        parts.append((tuple(tokens[:-1]), tuple(tokens[start:])))
    return parts


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return list(tokenizer(list(map(whole, texts)), add_special_tokens=False)["input_ids"])


@torch.inference_mode()
def _sums(
    model: Any, rows: list[tuple[int, ...]], wanted: list[tuple[int, tuple[int, ...]]]
) -> list[float]:
    """The log-likelihood of each (index of a row, tokens that end it), in one forward pass."""
    device = model.get_input_embeddings().weight.device
    keep = max(len(continuation) for _, continuation in wanted)
    ids, mask = pad_rows(rows, 0, True, device)
    known = inspect.signature(model.forward).parameters
    extra: dict[str, Any] = {}
    if "position_ids" in known:
        extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in known:
        extra["logits_to_keep"] = keep
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **extra).logits
    logits = logits[:, -keep:].float()  # (rows, keep, vocabulary)
    likely = torch.log_softmax(logits, -1)
    sums = []
    for place, continuation in wanted:
        tokens = torch.tensor(continuation, device=likely.device)
        sums.append(likely[place, -len(tokens) :].gather(1, tokens[:, None]).sum())
    return [float(value) for value in torch.stack(sums).tolist()]


def _halved(rows: int, width: int) -> int:
    if rows == 1:
        raise EngineError(
            f"out of memory with a single prompt of {width} tokens",
            remedy="Use a smaller model or a device with more memory.",
        )
    log.warning(
        "out of memory with %d prompts: from now on batches have at most %d", rows, rows // 2
    )
    return rows // 2
