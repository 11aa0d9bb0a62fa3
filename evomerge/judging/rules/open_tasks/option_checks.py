"""The check of a task that names options: does the answer choose those that the reference does?"""

from __future__ import annotations

import re
from collections.abc import Sequence

from evomerge.judging.rules.open_tasks.parsed_text import Check, CheckResult, ParsedText
from evomerge.text import QUOTED

# finds the beginnings of lines, where an option may follow: each run of blanks is looked at once
_OPTION_LINE = re.compile(
    r"(?m)(?:^|\n)[\s・-]*+"
    r"(?:(?:選択肢|情報|文)?+\s*+[(]?+([A-Ha-h1-9])[).:、]\s*+(.{0,59}?\S)[^\S\n]*+$)?"
)
_OPTION_INLINE = re.compile(r"\(([a-hA-H])\)\s*([^\s(),、。]{1,20})")
_BULLET = re.compile(r"(?m)^[-・]\s*(.{1,40})$")
_CHOOSES = re.compile(r"どちら|どれ|いずれ|選|入れるの|誰[がを]|choose|which")
_LABEL = re.compile(r"(?<![A-Za-z0-9])[(]?([A-Ha-h1-9])(?![A-Za-z0-9])")
_FAR = 10**9


def choice_check(question: str, reference: ParsedText) -> Check | None:
    """Among the question's options, the answer chooses those that the reference chooses."""
    if not _CHOOSES.search(question) or "説明して" in question:
        return None
    options = [*option_lines(question), *_OPTION_INLINE.findall(question)]
    right, wrong = _right_and_wrong(_names(question, options), reference)
    if not right or not wrong:
        return None
    preferred = preference(right + wrong)
    right_labels, wrong_labels = set(), set()
    for label, name in options:
        if name.strip() in right:
            right_labels.add(label)
        if name.strip() in wrong:
            wrong_labels.add(label)

    def look(answer: ParsedText) -> CheckResult:
        """From -1 to 1: how clearly the answer chooses a right option, and why."""
        chosen = preferred.search(answer.text)
        if chosen:
            value = -1.0
            if chosen.group(1) in right:
                value = 1.0
        else:
            value = (_side(answer.head[:150], right, wrong) + _side(answer.ends, right, wrong)) / 2
        if not value and (right_labels or wrong_labels):
            said = set(_LABEL.findall(answer.head[:80]))
            value = 0.8 * (bool(said & right_labels) - bool(said & wrong_labels))
        if value > 0.3:
            return value, f"chooses {listed(right)}"
        return value, f"does not clearly choose {listed(right)}"

    return look


def preference(names: Sequence[str]) -> re.Pattern[str]:
    """One of several options, as what is chosen."""
    either = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.compile(
        rf"({either})[」\"]?"
        "(?:の方が|のほうが|が(?:より|最も|適切|正解|正しい|ふさわし)|を選(?:び|択))"
    )


def option_lines(question: str) -> list[tuple[str, str]]:
    """(label, name) of the options that have a line of their own: "A. Cairo"."""
    found = []
    for label, name in _OPTION_LINE.findall(question):
        if label:
            found.append((label, name))
    return found


def _names(question: str, options: Sequence[tuple[str, str]]) -> list[str]:
    """The different options that a question names."""
    names = [name.strip() for _, name in options] + _BULLET.findall(question)
    if not names and "どちら" in question:
        names = QUOTED.findall(question)
    different = []
    for name in dict.fromkeys(names):
        if name and name not in ("はい", "いいえ"):
            different.append(name)
    return different


def _right_and_wrong(names: list[str], reference: ParsedText) -> tuple[list[str], list[str]]:
    """(the options that a reference chooses, the others); both empty for under 2 or over 8."""
    if not 2 <= len(names) <= 8:
        return [], []
    right = [name for name in names if name in reference.conclusion]
    if not right:
        right = [name for name in names if name in reference.text]
    right = [name for name in right if not _is_part(name, right)]
    wrong = []
    for name in names:
        if name not in right and not _is_part(name, right):
            wrong.append(name)
    return right, wrong


def _is_part(name: str, others: list[str]) -> bool:
    """Whether a name is part of another one: 円 of 円柱."""
    return any(name != other and name in other for other in others)


def _side(text: str, right: list[str], wrong: list[str]) -> float:
    """1 when only right options are named, -1 when only wrong ones.

    Where both are, a little to the side that is named first.
    """
    first_right = min((text.find(name) for name in right if name in text), default=_FAR)
    first_wrong = min((text.find(name) for name in wrong if name in text), default=_FAR)
    if first_right == first_wrong:
        return 0.0
    weight = 0.3
    if max(first_right, first_wrong) == _FAR:
        weight = 1.0
    if first_right < first_wrong:
        return weight
    return -weight


def listed(words: Sequence[str]) -> str:
    """The words with commas between them, cut to 40 characters."""
    text = ", ".join(words)
    if len(text) <= 40:
        return text
    return text[:39] + "…"
