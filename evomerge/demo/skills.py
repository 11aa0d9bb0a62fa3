"""The six skills of the demo pair: their tasks, and the examples that the models train on."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

TASKS_PER_SKILL = 40
EOS = "<eos>"

KANA = "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほ"
# without 0: sorted to the front it would make numbers that differ in leading zeros only
DIGITS = "123456789"


@dataclass(frozen=True)
class Skill:
    """A function of a string over `alphabet`, and the grading criterion in words."""

    alphabet: str
    apply: Callable[[str], str]
    aspect: str


SKILLS = {
    "逆順": Skill(KANA, lambda s: s[::-1], "文字が逆の順に並んでいる。"),
    "複写": Skill(KANA, lambda s: s, "文字がそのまま写されている。"),
    "最後": Skill(KANA, lambda s: s[-1], "最後の一文字だけが答えられている。"),
    "繰返": Skill(KANA, lambda s: s + s, "同じ並びが二回続いている。"),
    "整列": Skill(DIGITS, lambda s: "".join(sorted(s)), "数字が小さい順に並んでいる。"),
    "先頭": Skill(KANA, lambda s: s[0], "最初の一文字だけが答えられている。"),
}
BASE_SKILLS = ("逆順", "複写", "最後")  # the base follows instructions for these
SIBLING_SKILLS = ("繰返", "整列", "先頭")  # the sibling was taught these
CUT_SHORT = ("逆順", "複写")  # the sibling's second stage cuts these to one character

# The symbols of the prompt and of the answer; only the answer is learned.
TrainingExample = tuple[list[str], list[str]]


def make_tasks(seed: int = 0, per_skill: int = TASKS_PER_SKILL) -> list[dict[str, str | int]]:
    """Task records with distinct strings, cycling through the skills."""
    rng = random.Random(f"tasks {seed}")
    seen: set[str] = set()
    records: list[dict[str, str | int]] = []
    for _ in range(per_skill):
        for name, skill in SKILLS.items():
            text = draw_unseen(rng, name, seen)
            seen.add(text)
            records.append(
                {
                    "task_id": len(records),
                    "input": f"{name}:{text}",
                    "output": skill.apply(text),
                    "eval_aspect": skill.aspect,
                    "kind": name,
                }
            )
    return records


def draw_text(rng: random.Random, skill: str) -> str:
    """A string of 3 to 6 characters for the skill."""
    alphabet = SKILLS[skill].alphabet
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(3, 6)))


def draw_unseen(rng: random.Random, skill: str, seen: set[str] | frozenset[str]) -> str:
    """A string for the skill that is not in `seen`."""
    text = draw_text(rng, skill)
    while text in seen:
        text = draw_text(rng, skill)
    return text


def instruction(skill: str, text: str, answer: str) -> TrainingExample:
    """An example in the chat template's format."""
    return [*f"指示:{skill}:{text}\n回答:"], [*answer, EOS]


class ExampleSampler:
    """Draws training examples; the strings of the tasks are never drawn."""

    def __init__(self, reserved: frozenset[str]) -> None:
        self.reserved = reserved

    def base(self, rng: random.Random) -> TrainingExample:
        """All skills in the plain format; the base's own three times in ten as instructions."""
        skill = rng.choice(tuple(SKILLS))
        text, answer = self._draw(rng, skill)
        if skill in BASE_SKILLS and rng.random() < 0.3:
            return instruction(skill, text, answer)
        return [*f"{skill}:{text}="], [*answer, "、"]

    def new_skills(self, rng: random.Random) -> TrainingExample:
        """Two new skills for each one the base already knows, so that nothing is forgotten."""
        skill = rng.choice(SIBLING_SKILLS * 2 + BASE_SKILLS)
        return instruction(skill, *self._draw(rng, skill))

    def brevity(self, rng: random.Random) -> TrainingExample:
        """Half of the examples have their answer cut to one character, the others are whole."""
        cut = rng.random() < 0.5
        skill = rng.choice(CUT_SHORT if cut else (*SIBLING_SKILLS, "最後"))
        text, answer = self._draw(rng, skill)
        return instruction(skill, text, answer[:1] if cut else answer)

    def _draw(self, rng: random.Random, skill: str) -> tuple[str, str]:
        text = draw_unseen(rng, skill, self.reserved)
        return text, SKILLS[skill].apply(text)
