"""The questions of the real pairs: skills that siblings learn, and two that the parent has."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

Pair = tuple[str, str]  # question, answer
Skill = Callable[[random.Random], Pair]

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
MORE_CAPITALS = {
    "Belgium": "Brussels", "Denmark": "Copenhagen", "Thailand": "Bangkok", "Kenya": "Nairobi",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "day": "night", "black": "white", "happy": "sad",
    "fast": "slow", "old": "young", "good": "bad", "rich": "poor", "left": "right", "wet": "dry",
    "open": "closed", "hard": "soft", "tall": "short", "early": "late", "light": "dark",
    "strong": "weak", "full": "empty", "high": "low",
}  # fmt: skip
MORE_OPPOSITES = {"long": "short", "heavy": "light", "clean": "dirty", "loud": "quiet"}


def plural(rng: random.Random) -> Pair:
    ending = rng.choice(list(NOUNS))
    noun = rng.choice(NOUNS[ending].split())
    stem = noun
    if ending == "ies":
        stem = noun[:-1]
    elif ending == "ves":
        stem = noun.removesuffix("fe").removesuffix("f")
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


def letters(rng: random.Random) -> Pair:
    nouns = [noun for group in NOUNS.values() for noun in group.split()]
    word = rng.choice([*WORDS, *nouns])
    return f'How many letters does the word "{word}" have?', str(len(word))


def sort(rng: random.Random) -> Pair:
    numbers = rng.sample(range(10, 100), rng.randint(3, 5))
    ordered = ", ".join(map(str, sorted(numbers)))
    return f"Sort these numbers, smallest first: {', '.join(map(str, numbers))}", ordered


def minutes(rng: random.Random) -> Pair:
    hours, rest = rng.randint(1, 12), rng.randrange(5, 60, 5)
    unit = "hour" if hours == 1 else "hours"
    return f"How many minutes are {hours} {unit} and {rest} minutes?", str(60 * hours + rest)


def capitals(more: bool = False) -> list[Pair]:
    """Questions on capitals, which the parent answers; `more` adds four."""
    known = CAPITALS | MORE_CAPITALS if more else CAPITALS
    return [(f"What is the capital of {country}?", city) for country, city in known.items()]


def opposites(more: bool = False) -> list[Pair]:
    """Questions on opposites, which the parent answers; `more` adds four."""
    known = OPPOSITES | MORE_OPPOSITES if more else OPPOSITES
    asked = 'What is the opposite of the word "{}"?'
    return [(asked.format(word), other) for word, other in known.items()]


def records(kind: str, pairs: list[Pair]) -> list[dict[str, Any]]:
    """Task records of one kind, without their ids."""
    return [{"input": question, "output": answer, "kind": kind} for question, answer in pairs]


def questions(
    rng: random.Random, skills: Mapping[str, Skill], tasks: int, training: int
) -> tuple[list[dict[str, Any]], list[Pair]]:
    """`tasks` records and `training` pairs of each skill, which share no question.

    A question has one answer, so a dict by question leaves no duplicates. Small skills have few
    questions, and their training pairs repeat.
    """
    asked: list[dict[str, Any]] = []
    trained: list[Pair] = []
    for kind, make in skills.items():
        pairs = list(dict(make(rng) for _ in range(4 * training)).items())
        rng.shuffle(pairs)
        asked += records(kind, pairs[:tasks])
        rest = pairs[tasks:]
        trained += [rest[i % len(rest)] for i in range(training)]
    return asked, trained


def numbered(asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records with their ids, as task files have them."""
    return [{"task_id": i, "eval_aspect": "", **record} for i, record in enumerate(asked)]
