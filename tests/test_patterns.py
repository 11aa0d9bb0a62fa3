"""Every pattern of the package takes time in proportion to the text, whatever the text.

EVOMERGE_FUZZ=N (`make test-fuzz`) pumps each with N of the characters, words and pairs that it
mentions, to a megabyte, pairs to a tenth; without it a few come to ten thousand characters, which
is enough to tell a square from a line.
"""

import os
import random
import re
from types import SimpleNamespace

import pytest
from pattern_tools import Found, inline, mentioned, patterns, pumps, slow

from evomerge.answering.prompts import COMMON
from evomerge.judging.rules.closed_tasks.claims import whole_word
from evomerge.judging.rules.open_tasks.checks import value_with
from evomerge.judging.rules.open_tasks.kinds import _KINDS
from evomerge.judging.rules.open_tasks.option_checks import preference

COUNT = int(os.environ.get("EVOMERGE_FUZZ", "0"))
PARTS = 8 if COUNT else 1  # for several processes
WORDS = ["Cairo", "New York", "漢", "カタカナ", "ひらがな", "三重県", "1", "a.b"]
# patterns that are made at run time, by the function that makes them
MADE = {
    "evomerge.judging.rules.closed_tasks.claims:whole_word": [whole_word(word) for word in WORDS],
    "evomerge.judging.rules.open_tasks.checks:value_with": [value_with("個"), value_with("km")],
    "evomerge.judging.rules.open_tasks.option_checks:preference": [preference(["円", "円柱"])],
    "evomerge.judging.rules.open_tasks.kinds:": [pattern for _, pattern in _KINDS],
    "evomerge.answering.prompts:control_tokens": [COMMON],
    "evomerge.answering.thoughts:_find": [re.compile("</think>|<think>")],
    "evomerge.answering.thoughts:bare_thoughts": [re.compile(r"</think>\s*<think>")],
    # of transformers' classes, for names of tensors
    "evomerge.merging.architecture.architecture:_lacking": [re.compile(r"lm_head\.weight")],
    "evomerge.merging.architecture.spare:spare_of": [re.compile(r"^mtp.*")],
}
# a user's own expressions: tests/test_lora.py bounds what they may cost
USERS = "evomerge.merging.adapters."


@pytest.fixture(scope="module")
def found():
    return patterns(MADE, USERS)


def seconds_allowed(size):
    """Far above what a linear pattern takes, far below what a square one does."""
    return max(0.01, size * 3e-6)


def test_all_patterns_are_found(found):
    places = {one.where.split(":")[0] for one in found}
    assert len(found) > 120
    assert {"evomerge.text", "evomerge.judging.llm.judge_prompt", "evomerge.console"} <= places


@pytest.mark.parametrize("part", range(PARTS))
def test_every_pattern_is_linear(found, part):
    rng = random.Random(part)
    wrong = []
    for one in found[part::PARTS]:
        characters, words = mentioned(one.pattern)
        for i, pump in enumerate(pumps(one.pattern, rng, COUNT or 6)):
            sizes = (30, 300, 3000, 10_000)
            if COUNT:
                sizes = (30, 1000, 10_000, 10**6 if i < 2 * len(characters + words) else 10**5)
            slower = slow(one.pattern, pump, sizes, seconds_allowed)
            if slower:
                wrong.append(f"{one}: {pump} takes {slower[1]:.3f} s at {slower[0]} characters")
                break
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "pump"),
    [
        (r"(?:\s|\n)+x", ("", "\n", "")),
        (r"\s*,\s*x", ("", " ", "")),
        (r"(?:a|b)*<think>.*?</think>", ("", "<think>", "")),
    ],
)
def test_a_bad_pattern_is_recognised(text, pump):
    assert slow(re.compile(text, re.DOTALL), pump, (30, 3000, 20_000), seconds_allowed)


def test_a_pattern_in_a_function_is_found(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("import re\nA = 'x'\ndef f(t):\n    return re.sub(rf'{A}+', '', t)\n")
    module = SimpleNamespace(__file__=str(path), __name__="module", A="x")
    assert [Found(where, p).pattern.pattern for where, p in inline(module, {})] == ["x+"]
