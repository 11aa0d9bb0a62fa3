"""What an answer claims: marks of an answer, corrections, negations and choices, shared by the
judges of closed tasks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from evomerge.text import CJK

HEDGE = r"(?:\bor\b|または|もしくは|あるいは|それとも)"
MARKER = re.compile(
    r"\b(?:final answer|correct answer|answer|result|total)\b(?:\s+\w+){0,3}?\s*(?:is|are|was|=|:)+"
    r"|\b(?:so|therefore|thus|hence)\b|(?:答え?|正解|結果|合計|解答|回答)\s*(?:は|:|が|=)|したがって|よって|(?<![=<>])=(?![=>])|####",
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
    rf"^[\"'」』]?[{CJK}]{{0,2}}?(?:ではな|じゃな|でな|ではあり|ではござ|は誤|は間違|は違)|^[\"']?\s+(?:is|are|was)(?:n't|\s+not|\s+wrong|\s+incorrect)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Finding:
    """Right or wrong, how near the answer comes (0 to 1), and why."""

    correct: bool
    nearness: float
    why: str


def whole_word(piece: str) -> re.Pattern[str]:
    """Where a word stands as a whole: by word boundaries, by change of script, or, all kana, beside
    punctuation and です.
    """
    core = re.escape(piece).replace(r"\ ", r"\s+")
    if not re.search(f"[{CJK}]", piece):
        return re.compile(rf"(?<![A-Za-z0-9]){core}(?![A-Za-z0-9]|'[a-z])", re.IGNORECASE)
    if re.fullmatch("[\u3041-\u309f0-9]+", piece):
        before, after = (
            r"(?:(?<![\w])|(?<=[^\W\u3041-\u309f]は)|(?<=こたえは))",
            r"(?=$|\W|です|でした|になります|となります|である)",
        )
        return re.compile(before + core + after)
    script = "\u30a1-\u30ff" if re.match("[\u30a1-\u30ff]", piece) else "\u3400-\u9fff々"
    tail = (
        "\u30a1-\u30ff"
        if re.search("[\u30a1-\u30ff]$", piece)
        else "\u3400-\u9fff々"
        if not re.search("[\u3041-\u309f]$", piece)
        else "々"
    )
    before, after = f"(?<![{script}])", f"(?![{tail}])"
    if re.search("[都道府県州国市区町村郡]$", piece):  # 三重県伊勢市 says both 三重県 and 伊勢市
        before, after = (
            f"(?:{before}|(?<=[都道府県州国市郡]))",
            f"(?:{after}|(?=[{CJK}]{{1,5}}[市区町村郡]))",
        )
    return re.compile(f"{before}{core}{after}", re.IGNORECASE)


def denied(text: str, start: int, end: int) -> bool:
    return bool(
        _NOT_BEFORE.search(text[max(0, start - 40) : start])
        or _NOT_AFTER.match(text[end : end + 30])
    )


def after_correction(text: str) -> str:
    """The part after "wait", "actually" or 訂正, if something stands there."""
    last = max((m.end() for m in _CORRECTION.finditer(text)), default=0)
    return text[last:] if re.search(r"\w{2}", text[last:]) else text


def abbreviated(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"
