"""Writes the Excel base of the demo, which ships in the package; Excel files show no differences in
git, so it is made here.

python benchmarks/make_knowledge.py [FOLDER]
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from evomerge.demo import SKILLS
from evomerge.knowledge.records import Example, Knowledge, KnowledgeClass
from evomerge.knowledge.write_base import write_knowledge

FOLDER = Path(__file__).resolve().parents[1] / "evomerge" / "knowledge"
KNOWN = 5  # examples of each skill, by which tasks are told apart


def demo() -> Knowledge:
    """The base of the demo's tasks; its models know no prompt but the bare task, so no example is
    shown.
    """
    rng = random.Random(0)
    examples: list[Example] = []
    for name, skill in SKILLS.items():
        for _ in range(KNOWN):
            text = "".join(rng.sample(skill.alphabet, rng.randint(3, 6)))
            examples.append(Example(len(examples) + 2, name, f"{name}:{text}", skill.apply(text)))
    return Knowledge(
        tuple(KnowledgeClass(name, "", "{input}", shots=0) for name in SKILLS), tuple(examples)
    )


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    print(write_knowledge(demo(), folder / "demo.xlsx"))


if __name__ == "__main__":
    main()
