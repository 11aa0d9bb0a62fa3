"""The features of the learned judge: hashed character n-grams and words, and measures.

The measures are of its form, its overlap with the reference, and its grade by the rules. All but
the rules is numpy over the text's code points, some 0.3 ms for an answer of 600 characters. A
change of what a number means must raise VERSION, which includes that of the rules; files fitted
before are then refused.
"""

from __future__ import annotations

import math
import re
import unicodedata
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from evomerge.judging.rules.judge import RulesJudge

if TYPE_CHECKING:
    from evomerge.answering.engine import Answer
    from evomerge.tasks import Task

VERSION = f"3+rules-{RulesJudge.version}"
BITS = 16  # 65,536 buckets: half for long n-grams, a quarter for short ones, a quarter for words
LONG, SHORT = (3, 4), (1, 2)
# of an n-gram of one or two characters and of a word, of which there are fewer; a longer one has 1
SHORT_WEIGHT = 2.0
LONGEST = 20_000  # characters that are measured
LONGEST_GRAMS = 4_000  # characters whose n-grams are taken
NAMES = (
    "length",
    "length_ratio",
    "length_distance",
    "precision",
    "recall",
    "f1",
    "repetition",
    "kana",
    "kanji",
    "latin",
    "digits",
    "lines",
    "bold",
    "items",
    "sentences",
    "exclamations",
    "headings",
    "distinct_characters",
    "distinct_4_grams",
    "ends",
    "polite",
    "apologies",
    "commas",
    "leaks",
    "rules",
)

_LATIN, _KANA = NAMES.index("latin"), NAMES.index("kana")
_RULES = RulesJudge()
# Words without a dictionary: runs of one script, which are stems and names in Japanese, and
# numbers. Hiragana is mostly grammar.
_WORD = re.compile(r"[\u4e00-\u9fff々]+|[ァ-ヿ]{2,}|[A-Za-z][A-Za-z'-]+|[0-9]+(?:[.,][0-9]+)*")
_ITEM = re.compile(r"^[ \t]*(?:[-*・•]|[0-9]{1,3}[.):])", re.MULTILINE)
_HEADING = re.compile(r"^#", re.MULTILINE)
_END = re.compile(r"[。.!?)」*`]\s*$")
# a template's marks: the answer did not end
_LEAK = re.compile(r"<\||\|>|###|human:|user:|assistant:", re.IGNORECASE)
_PRIME, _GOLDEN = np.uint64(1099511628211), np.uint64(0x9E3779B97F4A7C15)

Ints: TypeAlias = NDArray[np.int64]
Float32s: TypeAlias = NDArray[np.float32]


def normalise(text: str) -> str:
    """NFKC, with halves of surrogate pairs replaced: what everything here is computed on."""
    text = text[:LONGEST].encode("utf-8", "replace").decode()
    return unicodedata.normalize("NFKC", text)[:LONGEST]


def hashed_grams(text: str) -> tuple[Ints, Float32s]:
    """(buckets, weights) of a normalised text's n-grams and words.

    The buckets ascend; a weight is (1 + ln(times)) x the weight of the kind.
    """
    text = text[:LONGEST_GRAMS]
    codes = _codes(text)
    long = np.concatenate([_hashes(codes, n) for n in LONG])
    short = np.concatenate([_hashes(codes, n) for n in SHORT])
    words = np.array([crc32(word.encode()) for word in _WORD.findall(text)], np.uint64)
    places = [
        (long >> np.uint64(64 - (BITS - 1))).astype(np.int64),
        (short >> np.uint64(64 - (BITS - 2))).astype(np.int64) + (1 << (BITS - 1)),
        (words >> np.uint64(32 - (BITS - 2))).astype(np.int64) + (3 << (BITS - 2)),
    ]
    buckets, times = np.unique(np.concatenate(places), return_counts=True)
    weight = np.where(buckets < 1 << (BITS - 1), 1.0, SHORT_WEIGHT)
    return buckets, (weight * (1 + np.log(times))).astype(np.float32)


def look(task: Task, answer: Answer) -> tuple[tuple[Ints, Float32s], Float32s]:
    """(n-grams, measures) of an answer to a task."""
    text = normalise(answer.text)
    return hashed_grams(text), measures(text, task.output, _RULES.grade(task, answer).value)


def measures(text: str, reference: str, rules: float = 3.0) -> Float32s:
    """[len(NAMES)] numbers about a normalised answer.

    The reference may be empty; `rules` is the grade by the rules.
    """
    codes = _codes(text)
    n = max(1, len(text))
    size = len(_reference(reference)[0])
    ratio = 0.0
    if size:
        ratio = math.log((len(text) + 5) / (size + 5))
    precision, recall = _overlap(codes, reference)
    ten = _hashes(codes, 10)

    def share(low: int, high: int) -> float:
        return float(((codes >= low) & (codes <= high)).sum()) / n

    values = {
        "length": math.log1p(len(text)),
        "length_ratio": ratio,
        "length_distance": abs(ratio),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall + 1e-9),
        "repetition": 1 - _distinct(ten) / max(1, len(ten)),
        "kana": share(0x3041, 0x30FF),
        "kanji": share(0x4E00, 0x9FFF),
        "latin": share(0x41, 0x5A) + share(0x61, 0x7A),
        "digits": share(0x30, 0x39),
        "lines": math.log1p(text.count("\n")),
        "bold": math.log1p(text.count("**")),
        "items": math.log1p(len(_ITEM.findall(text))),
        "sentences": math.log1p(text.count("。")),
        "exclamations": 100 * (text.count("!") + text.count("?")) / n,
        "headings": math.log1p(len(_HEADING.findall(text))),
        "distinct_characters": _distinct(codes) / n,
        "distinct_4_grams": _distinct(_hashes(codes, 4)) / n,
        "ends": float(bool(_END.search(text))),
        "polite": 100 * (text.count("ます") + text.count("です")) / n,
        "apologies": text.count("申し訳") + text.count("できません"),
        "commas": 100 * text.count("、") / n,
        "leaks": len(_LEAK.findall(text)),
        "rules": rules,
    }
    assert tuple(values) == NAMES
    return np.array(list(values.values()), np.float32)


def in_english(z: Float32s) -> NDArray[np.bool_]:
    """[...]: whether answers with measures [..., M] are in English, or in other Latin letters."""
    return np.asarray((z[..., _LATIN] > 0.4) & (z[..., _KANA] < 0.15))


def _codes(text: str) -> NDArray[np.uint64]:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.uint64)


def _hashes(codes: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """[len - n + 1] 64-bit hashes of the n-grams: multiply and xor, as FNV-1a, on code points."""
    count = max(0, len(codes) - n + 1)
    hashed = np.full(count, n, np.uint64)
    for i in range(n):
        hashed = ((hashed * _PRIME) ^ codes[i : i + count]) * _GOLDEN
    return hashed


def _distinct(values: NDArray[np.uint64]) -> int:
    """How many different values; for texts of this size 3 x as fast as numpy's hashing."""
    ordered = np.sort(values)
    return int(np.count_nonzero(ordered[1:] != ordered[:-1])) + bool(len(values))


@lru_cache(maxsize=4096)
def _reference(reference: str) -> tuple[str, Ints, Ints]:
    text = normalise(reference).strip()
    return (text, *_bigrams(_codes(text)))


def _bigrams(codes: NDArray[np.uint64]) -> tuple[Ints, Ints]:
    hashed = (_hashes(codes, 2) >> np.uint64(40)).astype(np.int64)
    buckets, times = np.unique(hashed, return_counts=True)
    return buckets, times


def _overlap(codes: NDArray[np.uint64], reference: str) -> tuple[float, float]:
    """(precision, recall) of the answer's character bigrams."""
    _, theirs, their_times = _reference(reference)
    ours, our_times = _bigrams(codes)
    if not len(theirs) or not len(ours):
        return 0.0, 0.0
    at = np.searchsorted(theirs, ours).clip(max=len(theirs) - 1)
    shared = int(np.minimum(our_times, their_times[at])[theirs[at] == ours].sum())
    return shared / int(our_times.sum()), shared / int(their_times.sum())
