"""What can be checked about an answer to an open task: does it reach the reference's conclusion?

A check is made once for a task and applied to each answer: 1 for the reference's conclusion, -1 for
another one, values between where both or neither are said, and a few words of explanation.
"""

from __future__ import annotations

import re

from evomerge.judging.rules.open_tasks.formulas import FORMULA, formula_value
from evomerge.judging.rules.open_tasks.option_checks import choice_check, listed, option_lines
from evomerge.judging.rules.open_tasks.parsed_text import Check, CheckResult, ParsedText, compact

# kinds without one right conclusion
INVENTED = frozenset(["translation", "summary", "rewriting", "creative", "role play"])
_ASKED_UNIT = re.compile(
    r"何(曜日|都市|時間|県|色|個|人|分|秒|歳|円|回|本|番|年|日|月|匹|冊|語|枚|市|国|km)"
)
_PAIR = re.compile(r"([1-9])[.),:]?[^\nA-H0-9]{0,20}\(?([A-H])\b")
# between two digits: commas, arrows or dashes, or white space that holds a line break
_ORDER = re.compile(
    r"(?<![0-9])[0-9](?:(?:\s*+[,、→>-][,、→>\n-]*+\s*+|(?=[^\S\n]*+\n)\s++)[0-9](?![0-9])){2,}+"
)
_LINE_NUMBER = re.compile(r"(?m)^\W{0,3}([0-9])[.)]")
_SYMBOLS = re.compile(r"[0-9A-Za-z()\[\]{}<>+*/=,.\-]{5,}")
_NUMBER = re.compile(r"-?[0-9][0-9,.]*")
_YES_OR_NO = re.compile("(?<![ぁ-ん])(?:はい|いいえ)(?![ぁ-ん])")
_VERB = re.compile(r"([\u3400-\u9fff])[ぁ-ん]*か[?。」]*(?:\n|$)")
_POLARITIES = {-1: "no", 0: "nothing", 1: "yes"}


def checks_for(
    question: str, reference: ParsedText, right: tuple[str, ...], kind: str, *, polar: bool
) -> tuple[Check, ...]:
    """The checks that apply to a task.

    They come from its cleaned question, its reference, and the answers that its grading points call
    `right`.
    """
    found: list[Check | None] = []
    if right:
        found.append(_named(right))
    if kind not in INVENTED:
        found.append(_unit(question, reference))
        found.append(choice_check(question, reference))
        found.append(_symbols(question, reference))
        found.append(_pairs(reference))
        if kind in ("order", "question", "choice"):
            found.append(_order(question, reference))
        if polar:
            found.append(_polarity(question, reference))
        if not any(found):
            found.append(_numbers(question, reference, kind))
    return tuple(check for check in found if check)


def _named(right: tuple[str, ...]) -> Check:
    """What the grading points call right (「左が正解」) must be named."""

    def look(answer: ParsedText) -> CheckResult:
        lacking = [word for word in right if word not in answer.text]
        value = 1 - 2 * len(lacking) / len(right)
        if lacking:
            return value, f"lacks {listed(lacking)}"
        return value, f"names {listed(right)}"

    return look


def _unit(question: str, reference: ParsedText) -> Check | None:
    """何曜日, 何個, 何県: the last value with that unit is the answer."""
    asked = _ASKED_UNIT.search(question)
    if not asked:
        return None
    unit = asked.group(1)
    pattern = value_with(unit)
    source = reference.text
    if unit in reference.conclusion:
        source = reference.conclusion
    values = pattern.findall(source)
    if not values:
        return None
    expected = values[-1]

    def look(answer: ParsedText) -> CheckResult:
        """The last value counts most; those of the question are not the answer's."""
        found = pattern.findall(answer.ends) or pattern.findall(answer.text)
        said = []
        for value in found:
            if value + unit not in question:
                said.append(value)
        if not said:
            return -1.0, f"does not say {expected}{unit}"
        if said[-1].endswith(expected):
            return 1.0, f"says {expected}{unit}"
        if said[0].endswith(expected):
            return 0.5, f"says {expected}{unit}, then {said[-1]}{unit}"
        return -1.0, f"says {said[-1]}{unit}, not {expected}{unit}"

    return look


def value_with(unit: str) -> re.Pattern[str]:
    """A number or a short word right before a unit."""
    return re.compile(rf"((?<![0-9.,])[0-9.,]++|[\u3400-\u9fff]{{1,4}}?){unit}")


def _polarity(question: str, reference: ParsedText) -> Check | None:
    """A question of yes or no is answered as the reference answers it."""
    verbs = _VERB.findall(question)
    verb = ""
    if verbs:
        verb = verbs[0]
    both = _yes_and_no(reference.text)
    if len(both) > 1:
        return _several_polarities(both)
    expected = reference.polarity(verb)
    if not expected or len(reference.text) > 400:
        return None

    def look(answer: ParsedText) -> CheckResult:
        said = answer.polarity(verb)
        why = f"answers {_POLARITIES[said]}"
        if said != expected:
            why += ", unlike the reference"
        return float(said * expected), why

    return look


def _several_polarities(both: list[str]) -> Check:
    """Each of several questions of yes or no is answered as expected."""

    def look(answer: ParsedText) -> CheckResult:
        if _yes_and_no(answer.text) == both:
            return 1.0, "answers each as expected"
        return -1.0, f"does not answer {listed(both)}"

    return look


def _yes_and_no(text: str) -> list[str]:
    """はい and いいえ in their order, repetitions left out; two questions have two."""
    words = _YES_OR_NO.findall(text)
    kept = []
    for i, word in enumerate(words):
        if not i or word != words[i - 1]:
            kept.append(word)
    return kept


def _symbols(question: str, reference: ParsedText) -> Check | None:
    """The formula or string of symbols that the reference concludes with is in the answer too."""
    known = compact(question)
    symbols = []
    for found in _SYMBOLS.findall(compact(reference.conclusion)):
        symbol = found.strip(".,:")
        if re.search(r"[0-9\[\]{}<>+*/=]", symbol) and len(symbol) >= 5 and symbol not in known:
            symbols.append(symbol)
    if not symbols:
        return None
    value = formula_value(symbols[0])

    def look(answer: ParsedText) -> CheckResult:
        right = any(symbol in answer.compact for symbol in symbols)
        if not right and value is not None:
            right = value in map(formula_value, FORMULA.findall(answer.compact))
        if right:
            return 1.0, f"holds {symbols[0]}"
        return -1.0, f"lacks {symbols[0]}"

    return look


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
    """An order of single digits: in a row, at line starts, or by the order of the question's lines.

    Any of the three may equal the order that the reference concludes with.
    """
    runs = _ORDER.findall(reference.conclusion)
    if not runs:
        return None
    expected = re.findall("[0-9]", runs[-1])
    starts = [(label, name[:10]) for label, name in option_lines(question)]

    def look(answer: ParsedText) -> CheckResult:
        said = [re.findall("[0-9]", run) for run in _ORDER.findall(answer.text)]
        said.append(_LINE_NUMBER.findall(answer.text))
        places = sorted((answer.text.rfind(start), label) for label, start in starts)
        said.append([label for place, label in places if place >= 0])
        if expected in said:
            return 1.0, "gives the expected order"
        return -1.0, "gives another order"

    return look


def _numbers(question: str, reference: ParsedText, kind: str) -> Check | None:
    """The conclusion's numbers, where nothing else can be checked."""
    known = _numbers_in(question)
    numbers = []
    for number in _numbers_in(reference.conclusion):
        if number not in known and (len(number) > 1 or kind == "calculation"):
            numbers.append(number)
    if not reference.conclusions or not 1 <= len(numbers) <= 3:
        return None

    def look(answer: ParsedText) -> CheckResult:
        said = set(_numbers_in(answer.ends))
        right = sum(number in said for number in numbers)
        return 2 * right / len(numbers) - 1, f"{right} of the conclusion's {len(numbers)} numbers"

    return look


def _numbers_in(text: str) -> list[str]:
    return [number.rstrip(".,") for number in _NUMBER.findall(text)]
