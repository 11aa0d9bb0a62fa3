"""What can be checked about an answer to an open task: does it come to the reference's conclusion?

A check is made from the task once and looks at each answer: 1 for the reference's conclusion, -1
for another, values between where both or neither are said, and a few words of explanation.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from evomerge.judging.rules.open_tasks.parsed_text import ParsedText, compact
from evomerge.text import QUOTED

CheckResult = tuple[float, str]
Check = Callable[[ParsedText], CheckResult]

# kinds without one right conclusion
INVENTED = frozenset(["translation", "summary", "rewriting", "creative", "role play"])
_OPTION_LINE = re.compile(
    r"(?m)^[\s・-]*(?:選択肢|情報|文)?\s*[(]?([A-Ha-h1-9])[).:、]\s*(.{1,60}?)\s*$"
)
_OPTION_INLINE = re.compile(r"\(([a-hA-H])\)\s*([^\s(),、。]{1,20})")
_BULLET = re.compile(r"(?m)^[-・]\s*(.{1,40})$")
_ASKED_UNIT = re.compile(
    r"何(曜日|都市|時間|県|色|個|人|分|秒|歳|円|回|本|番|年|日|月|匹|冊|語|枚|市|国|km)"
)
_PAIR = re.compile(r"([1-9])[.),:]?[^\nA-H0-9]{0,20}\(?([A-H])\b")
_ORDER = re.compile(r"(?<![0-9])[0-9](?:\s*[,、→>\n-]+\s*[0-9](?![0-9])){2,}")
_LINE_NUMBER = re.compile(r"(?m)^\W{0,3}([0-9])[.)]")
_SYMBOLS = re.compile(r"[0-9A-Za-z()\[\]{}<>+*/=,.\-]{5,}")
_NUMBER = re.compile(r"-?[0-9][0-9,.]*")
_FORMULA = re.compile(r"(?<![0-9.])[0-9(][0-9+\-*/()]{3,60}[0-9)]")
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FAR = 10**9


def checks_for(
    question: str, reference: ParsedText, right: tuple[str, ...], kind: str, *, polar: bool
) -> tuple[Check, ...]:
    """The checks that apply to a task, from its cleaned question, its reference, and what its
    points call right.
    """
    found = [_named(right) if right else None]
    if kind not in INVENTED:
        found += [
            _unit(question, reference),
            _choice(question, reference),
            _symbols(question, reference),
            _pairs(reference),
        ]
        found.append(
            _order(question, reference) if kind in ("order", "question", "choice") else None
        )
        found.append(_polarity(question, reference) if polar else None)
        if not any(found):
            found.append(_numbers(question, reference, kind))
    return tuple(check for check in found if check)


def _named(right: tuple[str, ...]) -> Check:
    """What the grading points call right (「左が正解」) must be named."""

    def look(answer: ParsedText) -> CheckResult:
        lacking = [word for word in right if word not in answer.text]
        return 1 - 2 * len(lacking) / len(
            right
        ), f"lacks {_some(lacking)}" if lacking else f"names {_some(right)}"

    return look


def _unit(question: str, reference: ParsedText) -> Check | None:
    """何曜日, 何個, 何県: the last value with that unit is the answer."""
    asked = _ASKED_UNIT.search(question)
    if not asked:
        return None
    unit = asked.group(1)
    pattern = re.compile(rf"([0-9.,]+|[\u3400-\u9fff]{{1,4}}?){unit}")
    values = pattern.findall(
        reference.conclusion if unit in reference.conclusion else reference.text
    )
    if not values:
        return None
    expected = values[-1]

    def look(answer: ParsedText) -> CheckResult:
        said = [
            v
            for v in pattern.findall(answer.ends) or pattern.findall(answer.text)
            if v + unit not in question
        ]
        if said and said[-1].endswith(expected):
            return 1.0, f"says {expected}{unit}"
        if said and said[0].endswith(expected):
            return 0.5, f"says {expected}{unit}, then {said[-1]}{unit}"
        return (
            -1.0,
            f"says {said[-1]}{unit}, not {expected}{unit}"
            if said
            else f"does not say {expected}{unit}",
        )

    return look


def _choice(question: str, reference: ParsedText) -> Check | None:
    """Among options that the question names, the answer chooses those that the reference chooses."""
    if (
        not re.search(r"どちら|どれ|いずれ|選|入れるの|誰[がを]|choose|which", question)
        or "説明して" in question
    ):
        return None
    options = [*_OPTION_LINE.findall(question), *_OPTION_INLINE.findall(question)]
    names = [name.strip() for _, name in options] + _BULLET.findall(question)
    if not names and "どちら" in question:
        names = QUOTED.findall(question)
    names = [name for name in dict.fromkeys(names) if name and name not in ("はい", "いいえ")]
    right = [n for n in names if n in reference.conclusion] or [
        n for n in names if n in reference.text
    ]
    # 円 stands in 円柱
    right = [n for n in right if not any(n != other and n in other for other in right)]
    wrong = [n for n in names if n not in right and not any(n in r for r in right)]
    if not 2 <= len(names) <= 8 or not right or not wrong:
        return None
    either = "|".join(re.escape(name) for name in sorted(right + wrong, key=len, reverse=True))
    preferred = re.compile(
        rf"({either})[」\"]?(?:の方が|のほうが|が(?:より|最も|適切|正解|正しい|ふさわし)|を選(?:び|択))"
    )
    labels = (
        {label for label, name in options if name.strip() in right},
        {label for label, name in options if name.strip() in wrong},
    )

    def look(answer: ParsedText) -> CheckResult:
        chosen = preferred.search(answer.text)
        if chosen:
            value = 1.0 if chosen.group(1) in right else -1.0
        else:
            value = (_side(answer.head[:150], right, wrong) + _side(answer.ends, right, wrong)) / 2
        if not value and any(labels):
            said = set(
                re.findall(r"(?<![A-Za-z0-9])[(]?([A-Ha-h1-9])(?![A-Za-z0-9])", answer.head[:80])
            )
            value = 0.8 * (bool(said & labels[0]) - bool(said & labels[1]))
        return (
            value,
            f"chooses {_some(right)}" if value > 0.3 else f"does not clearly choose {_some(right)}",
        )

    return look


def _side(text: str, right: list[str], wrong: list[str]) -> float:
    """1 when only right options are named, -1 when only wrong ones, a little to the side that is
    named first.
    """
    a = min((text.find(n) for n in right if n in text), default=_FAR)
    b = min((text.find(n) for n in wrong if n in text), default=_FAR)
    if a == b:
        return 0.0
    weight = 1.0 if max(a, b) == _FAR else 0.3
    return weight if a < b else -weight


def _polarity(question: str, reference: ParsedText) -> Check | None:
    """A question of yes or no is answered as the reference answers it."""
    verbs = re.findall(r"([\u3400-\u9fff])[ぁ-ん]*か[?。」]*(?:\n|$)", question)
    verb = verbs[0] if verbs else ""
    expected = reference.polarity(verb)
    both = _yes_and_no(reference.text)
    if len(both) > 1:
        return lambda answer: (
            (1.0, "answers each as expected")
            if _yes_and_no(answer.text) == both
            else (-1.0, f"does not answer {_some(both)}")
        )
    if not expected or len(reference.text) > 400:
        return None

    def look(answer: ParsedText) -> CheckResult:
        said = answer.polarity(verb)
        return float(said * expected), f"answers {('no', 'nothing', 'yes')[said + 1]}" + (
            "" if said == expected else ", unlike the reference"
        )

    return look


def _yes_and_no(text: str) -> list[str]:
    """はい and いいえ in the order in which they come, repetitions left out; two questions have two."""
    words = re.findall("(?<![ぁ-ん])(?:はい|いいえ)(?![ぁ-ん])", text)
    return [word for i, word in enumerate(words) if not i or word != words[i - 1]]


def _symbols(question: str, reference: ParsedText) -> Check | None:
    """A formula, a list or a string of symbols that the reference concludes with stands in the
    answer as it is.
    """
    known = compact(question)
    found = [s.strip(".,:") for s in _SYMBOLS.findall(compact(reference.conclusion))]
    symbols = [
        s for s in found if re.search(r"[0-9\[\]{}<>+*/=]", s) and len(s) >= 5 and s not in known
    ]
    if not symbols:
        return None

    value = _value(symbols[0])

    def look(answer: ParsedText) -> CheckResult:
        right = any(s in answer.compact for s in symbols) or (
            value is not None and value in map(_value, _FORMULA.findall(answer.compact))
        )
        return (1.0, f"holds {symbols[0]}") if right else (-1.0, f"lacks {symbols[0]}")

    return look


def _value(formula: str) -> Fraction | None:
    """The value of a formula of + - * / and brackets, exact; None for anything else."""
    if not _FORMULA.fullmatch(formula) or not re.search(r"[*/+]", formula):
        return None
    try:
        return _worked_out(
            ast.parse(formula.lstrip("0") if formula[1:2].isdigit() else formula, mode="eval").body
        )
    except (
        SyntaxError,
        ValueError,
        ZeroDivisionError,
        KeyError,
        AttributeError,
        TypeError,
        RecursionError,
        MemoryError,
    ):
        return None


def _worked_out(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_worked_out(node.left), _worked_out(node.right))
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    raise ValueError("no formula")


def _pairs(reference: ParsedText) -> Check | None:
    """Numbers matched with letters: (1, B), (2, C)."""
    expected = dict(_PAIR.findall(reference.text))
    if len(expected) < 3:
        return None

    def look(answer: ParsedText) -> CheckResult:
        said = dict(_PAIR.findall(answer.text))
        right = sum(said.get(number) == letter for number, letter in expected.items())
        return 2 * right / len(expected) - 1, f"{right} of {len(expected)} pairs are right"

    return look


def _order(question: str, reference: ParsedText) -> Check | None:
    """An order of single numbers: in a row, at the beginnings of lines, or by the order in which
    the question's lines come.
    """
    runs = _ORDER.findall(reference.conclusion)
    if not runs:
        return None
    expected = re.findall("[0-9]", runs[-1])
    starts = [(label, name[:10]) for label, name in _OPTION_LINE.findall(question)]

    def look(answer: ParsedText) -> CheckResult:
        said = [re.findall("[0-9]", run) for run in _ORDER.findall(answer.text)] + [
            _LINE_NUMBER.findall(answer.text)
        ]
        places = sorted((answer.text.rfind(start), label) for label, start in starts)
        said.append([label for place, label in places if place >= 0])
        right = expected in said
        return (1.0, "gives the expected order") if right else (-1.0, "gives another order")

    return look


def _numbers(question: str, reference: ParsedText, kind: str) -> Check | None:
    """Where nothing else can be checked, the conclusion's own numbers."""
    known = {n.rstrip(".,") for n in _NUMBER.findall(question)}
    numbers = [
        n
        for m in _NUMBER.findall(reference.conclusion)
        if (n := m.rstrip(".,")) not in known and (len(n) > 1 or kind == "calculation")
    ]
    if not numbers or len(reference.conclusions) == 0 or len(numbers) > 3:
        return None

    def look(answer: ParsedText) -> CheckResult:
        said = {n.rstrip(".,") for n in _NUMBER.findall(answer.ends)}
        right = sum(n in said for n in numbers)
        return 2 * right / len(numbers) - 1, f"{right} of the conclusion's {len(numbers)} numbers"

    return look


def _some(words: list[str] | tuple[str, ...]) -> str:
    text = ", ".join(words)
    return text if len(text) <= 40 else text[:39] + "…"
