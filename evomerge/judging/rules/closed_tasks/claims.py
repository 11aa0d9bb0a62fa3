"""What an answer claims: marked answers, corrections, negations and alternatives.

Shared by the graders of closed tasks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from evomerge.text import CJK

HEDGE = r"(?:\bor\b|または|もしくは|あるいは|それとも)"
MARKER = re.compile(
    r"\b(?:final answer|correct answer|answer|result|total)\b"
    r"(?:\s+\w+){0,3}?\s*(?:is|are|was|=|:)+"
    r"|\b(?:so|therefore|thus|hence)\b|(?:答え?|正解|結果|合計|解答|回答)\s*(?:は|:|が|=)"
    r"|したがって|よって|(?<![=<>])=(?![=>])|####",
    re.IGNORECASE,
)
_CORRECTION = re.compile(
    r"\b(?:actually|correction|wait|sorry|scratch that)\b|訂正|間違えました", re.IGNORECASE
)
_NOT_BEFORE = re.compile(
    r"(?:\b(?:not|never|neither|nor)\b|n't\b)(?:\s+(?:the|a|an|be|word|called)\b)*[\s\"']*$",
    re.IGNORECASE,
)
_NOT_AFTER = re.compile(
    rf"^[\"'」』]?[{CJK}]{{0,2}}?(?:ではな|じゃな|でな|ではあり|ではござ|は誤|は間違|は違)"
    r"|^[\"']?\s+(?:is|are|was)(?:n't|\s+not|\s+wrong|\s+incorrect)\b",
    re.IGNORECASE,
)
_HIRAGANA, _KATAKANA, _KANJI = "\u3041-\u309f", "\u30a1-\u30ff", "\u3400-\u9fff々"


@dataclass(frozen=True)
class Finding:
    """Right or wrong, how near the answer comes (0 to 1), and why."""

    correct: bool
    nearness: float
    why: str


def whole_word(word: str) -> re.Pattern[str]:
    """A pattern for a word that is not part of another one.

    Its ends are word boundaries, or in Japanese changes of script; a word of hiragana alone must
    have punctuation or です next to it.
    """
    core = re.escape(word).replace(r"\ ", r"\s+")
    if not re.search(f"[{CJK}]", word):
        return re.compile(rf"(?<![A-Za-z0-9]){core}(?![A-Za-z0-9]|'[a-z])", re.IGNORECASE)
    if re.fullmatch(f"[{_HIRAGANA}0-9]+", word):
        before = rf"(?:(?<![\w])|(?<=[^\W{_HIRAGANA}]は)|(?<=こたえは))"
        after = r"(?=$|\W|です|でした|になります|となります|である)"
        return re.compile(before + core + after)
    head = _KANJI
    if re.match(f"[{_KATAKANA}]", word):
        head = _KATAKANA
    if re.search(f"[{_KATAKANA}]$", word):
        tail = _KATAKANA
    elif re.search(f"[{_HIRAGANA}]$", word):
        tail = "々"
    else:
        tail = _KANJI
    before = f"(?<![{head}])"
    after = f"(?![{tail}])"
    if re.search("[都道府県州国市区町村郡]$", word):  # 三重県伊勢市 says both 三重県 and 伊勢市
        before = f"(?:{before}|(?<=[都道府県州国市郡]))"
        after = f"(?:{after}|(?=[{CJK}]{{1,5}}[市区町村郡]))"
    return re.compile(f"{before}{core}{after}", re.IGNORECASE)


def denied(text: str, start: int, end: int) -> bool:
    """Whether a negation comes right before or after text[start:end]."""
    if _NOT_BEFORE.search(text[max(0, start - 40) : start]):
        return True
    return _NOT_AFTER.match(text[end : end + 30]) is not None


def after_correction(text: str) -> str:
    """The part after "wait", "actually" or 訂正, if any words follow there."""
    last = max((m.end() for m in _CORRECTION.finditer(text)), default=0)
    if re.search(r"\w{2}", text[last:]):
        return text[last:]
    return text


def abbreviated(text: str) -> str:
    """The text, cut to 60 characters."""
    if len(text) <= 60:
        return text
    return text[:59] + "…"
