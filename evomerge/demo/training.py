"""Training the demo pair: stages of AdamW on the answers' tokens."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM

from evomerge.demo.model import PAD, VOCABULARY
from evomerge.demo.skills import TrainingExample

BATCH = 96
CHUNK = 32  # a batch is sorted by length and computed in chunks: a third less padding


@dataclass(frozen=True)
class Stage:
    """One stage of training; `layers` are the layers that learn (None: everything)."""

    name: str
    steps: int
    peak_rate: float  # the learning rate after warm-up
    layers: range | None
    seed: int


BASE = Stage("base", 320, 2e-3, None, 0)
SIBLING_STAGES = (
    Stage("sibling, new skills", 80, 2e-3, range(0, 4), 1),
    Stage("sibling, brevity", 50, 2e-3, range(4, 8), 2),
)


def train(
    model: LlamaForCausalLM,
    stage: Stage,
    draw: Callable[[random.Random], TrainingExample],
    seed: int,
    progress: Callable[[str], None],
) -> None:
    """AdamW with warm-up and cosine decay; layers outside the stage keep their weights."""
    rng = random.Random(f"{stage.name} {stage.seed} {seed}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns(name, stage))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        learning, lr=stage.peak_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    model.train()
    for step in range(stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step)
        optimizer.zero_grad()
        loss = backward(model, [draw(rng) for _ in range(BATCH)])
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        if (step + 1) % 40 == 0 or step + 1 == stage.steps:
            progress(f"{stage.name}: step {step + 1} of {stage.steps}, loss {loss:.3f}")


def learns(name: str, stage: Stage) -> bool:
    """Whether the stage trains the parameter of this name."""
    return stage.layers is None or any(f".layers.{i}." in name for i in stage.layers)


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up over a sixteenth of the steps, times a cosine decay to zero."""
    warm_up = min(1.0, (step + 1) / max(1, stage.steps // 16))
    return stage.peak_rate * warm_up * (0.5 + 0.5 * math.cos(math.pi * step / stage.steps))


def backward(model: LlamaForCausalLM, examples: Sequence[TrainingExample]) -> float:
    """Add the gradient of the mean cross-entropy over the answers' tokens; return that mean.

    Logits are computed at the positions of answers only.
    """
    total = sum(len(answer) for _, answer in examples)
    ordered = sorted(examples, key=lambda example: len(example[0]) + len(example[1]))
    mean = 0.0
    for at in range(0, len(ordered), CHUNK):
        tokens, targets = collate(ordered[at : at + CHUNK])
        # (chunk, width - 1, hidden)
        hidden = model.model(input_ids=tokens).last_hidden_state[:, :-1]
        wanted = targets[:, 1:]
        kept = wanted != -100
        logits = model.lm_head(hidden[kept])
        loss = torch.nn.functional.cross_entropy(logits, wanted[kept], reduction="sum") / total
        torch.autograd.backward(loss)
        mean += loss.item()
    return mean


def collate(examples: Sequence[TrainingExample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and targets, both (batch, width), padded on the right; target -100 is ignored."""
    ids = {symbol: i for i, symbol in enumerate(VOCABULARY)}
    width = max(len(prompt) + len(answer) for prompt, answer in examples)
    tokens = torch.full((len(examples), width), ids[PAD])
    targets = torch.full((len(examples), width), -100)
    for row, (prompt, answer) in enumerate(examples):
        start, end = len(prompt), len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor([ids[symbol] for symbol in [*prompt, *answer]])
        targets[row, start:end] = torch.tensor([ids[symbol] for symbol in answer])
    return tokens, targets
