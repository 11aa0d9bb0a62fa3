"""The grading points of a task (`eval_aspect`), read for what a rule can check.

Lines look like "- 三重県と答えられている: 5点", "- Xが抜けている場合: -2点", "問題1は左が正解".
What a good answer must contain is on lines with four or five points, on lines that deduct for
something missing, and before 正解.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from evomerge.text import QUOTED, TERM

_POINTS = re.compile(r"([1-5])点(?!減)")
_DEDUCTION = re.compile(r"-\s*[0-9]点|減点")
_MISSING = re.compile(r"抜け|欠け|ない場合|ていない|できてい|不足")
_RIGHT = re.compile(r"([^\s、。はがをの・:-]{1,12})が正解")
_WORDS_OF_GRADING = frozenset(
    re.findall(
        r"\S+",
        "場合 以下 適切 意味 選択肢 文章 理由 回答 正解 不正解 答 文中 可能性 内容 言葉 表現 "
        "次 上記 質問 説明 一般的 最 必要 対応 減点 減点項目 得点 点 要素 指示 記述 出題意図 "
        "補足 注意事項 間違 誤 自然 不自然 全 文体 回答例 正解例 該当",
    )
)


@dataclass(frozen=True)
class Points:
    """`wanted` are words that a good answer contains, `right` the answers that are called right."""

    wanted: tuple[str, ...]
    right: tuple[str, ...]


def read_points(points: str, reference: str) -> Points:
    """What cleaned grading points demand.

    A word counts only where the reference, which is a good answer, contains it too.
    """
    wanted: dict[str, None] = {}
    demands = True
    for line in points.split("\n"):
        grade = _POINTS.search(line)
        if _DEDUCTION.search(line):
            demands = bool(_MISSING.search(line))
        elif grade:
            demands = int(grade.group(1)) >= 4
        elif not line.startswith(" "):  # an indented line belongs to the one above
            demands = True
        if demands:
            wanted.update(dict.fromkeys([*QUOTED.findall(line), *TERM.findall(line)]))
    words = []
    for word in wanted:
        if word not in _WORDS_OF_GRADING and not word.isdigit() and word in reference:
            words.append(word)
    return Points(tuple(words), tuple(dict.fromkeys(_RIGHT.findall(points))))
