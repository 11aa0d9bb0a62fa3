"""Closed tasks (a number, a list, a word, a label): does the answer SAY the expected answer, whatever stands around it?

What an answer says is found by plain rules: a marked answer ("the answer is …", "答えは…") before a bare first line,
that before what stands after "is", "は" or "=". Choices ("Cairo or Tripoli"), negations ("not 80") and mentions in
passing ("Alexandria, north of Cairo") do not count.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache

from evomerge.judging.text import (
    CJK,
    LIST_MARK,
    Number,
    bare,
    clean,
    find_numbers,
)

_UNIT = rf"\s*(?:[A-Za-z°%]+|[{CJK}%℃]{{1,4}})?"
_BARE_NUMBER = re.compile(rf"^[^\w\d-]{{0,2}}(-?[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?[十百千万億兆]?){_UNIT}\s*(?:です)?$")
_LIST_SEPARATOR = re.compile(r"\s*(?:[,、;<>→・/|]|=>|->|\band\b|\bthen\b|と|\n|\s)+\s*")
_HEDGE = r"(?:\bor\b|または|もしくは|あるいは|それとも)"
_OPTION_GAP = re.compile(rf"[^0-9\n]{{0,12}}?(?:{_HEDGE}|か)[^0-9\n]{{0,8}}|\s*[,、/;~]\s*(?:and\s*)?|\s+and\s+|\s+")
_REASON = re.compile(r"\b(?:because|since|as there (?:are|is))\b.*?(?=[.\n]|$)|(?:なぜなら|理由は).*?(?=[。\n]|$)", re.IGNORECASE)
_MARKER = re.compile(
    r"\b(?:final answer|correct answer|answer|result|total)\b(?:\s+\w+){0,3}?\s*(?:is|are|was|=|:)+"
    r"|\b(?:so|therefore|thus|hence)\b|(?:答え?|正解|結果|合計|解答|回答)\s*(?:は|:|が|=)|したがって|よって|(?<![=<>])=(?![=>])|####",
    re.IGNORECASE,
)
_CORRECTION = re.compile(r"\b(?:actually|correction|wait|sorry|scratch that)\b|訂正|間違えました", re.IGNORECASE)
_NOT_BEFORE = re.compile(r"(?:\b(?:not|never|neither|nor)\b|n't\b)(?:\s+(?:the|a|an|be|word|called)\b)*[\s\"']*$", re.IGNORECASE)
_NOT_AFTER = re.compile(
    rf"^[\"'」』]?[{CJK}]{{0,2}}?(?:ではな|じゃな|でな|ではあり|ではござ|は誤|は間違|は違)|^[\"']?\s+(?:is|are|was)(?:n't|\s+not|\s+wrong|\s+incorrect)\b",
    re.IGNORECASE,
)
_COPULA = re.compile(r"(?:\b(?:is|are|was|were|be|called|named|means|equals)\b|'s\b|[:=→]|(?<![でにと])は)\s*[,、]?\s*", re.IGNORECASE)
_ASIDE = re.compile(r",\s*(?:of course|indeed|obviously|in fact|as you know|however)\s*,", re.IGNORECASE)
_CLAUSE_END = re.compile(r"[,、;()]|\b(?:which|where|while|who|because|since)\b")
_FILLER = r"(?:the|a|an|of|word|letter|city|simply|just|probably|usually|also)"
_YES = {"はい", "yes", "true", "正しい", "真", "ok", "正", "yeah"}
_NO = {"いいえ", "no", "false", "正しくない", "偽", "誤り", "誤"}
_STOP = {"the", "what", "which", "who", "how", "are", "for", "this", "that", "and", "answer", "name", "with", "one", "word", "was", "does"}


@dataclass(frozen=True)
class Finding:
    """Right or wrong, how near the answer comes (0 to 1), and why."""

    correct: bool
    nearness: float
    why: str


@lru_cache(maxsize=1024)
def is_closed(reference: str) -> bool:
    """Whether a reference is a number, a list, a word or a label rather than prose."""
    text = clean(reference).strip()
    core = text.rstrip("。.")
    if not core or "\n" in core or "。" in core:
        return False
    if _BARE_NUMBER.match(core) or _number_list(core):
        return True
    pieces = _pieces(core)
    if len(pieces) > 1:
        return len(pieces) <= 12 and all(_is_label(piece) for piece in pieces)
    return _is_label(core)


def _is_label(text: str) -> bool:
    if re.search(r"(?:です|ます|ました|でした|である|だった|ください|ません|ましょう)$", text) or re.search(r"[.!?;]\s", text):
        return False
    return len(text) <= 16 if re.search(f"[{CJK}]", text) else len(text) <= 40 and len(text.split()) <= 4


def judge_closed(question: str, reference: str, answer: str) -> Finding:
    """Whether `answer` says `reference`."""
    expected, said = clean(reference).strip().rstrip("。."), clean(answer)
    if bare(answer) == bare(reference):
        return Finding(True, 1.0, "says exactly the expected answer")
    numbers = _number_list(expected)
    if numbers:
        return _judge_numbers(clean(question), numbers, said)
    number = _BARE_NUMBER.match(expected)
    if number:
        leading_zero = re.fullmatch(r"0[0-9]+", number.group(1))  # a string of digits rather than a quantity
        value = number.group(1).replace(",", "") if leading_zero else find_numbers(number.group(1))[0].value
        unit = re.sub(r"[^A-Za-z\u3041-\u9fff]", "", expected[number.end(1) :]).lower()
        return _judge_number(clean(question), value, said, unit)
    low = bare(reference)
    if low in _YES | _NO:
        return _judge_polarity(low in _YES, said)
    if re.fullmatch(r"\(?[A-J]\)?", expected):
        return _judge_choice(expected.strip("()"), said)
    pieces = _pieces(expected)
    if len(pieces) > 1:
        return _judge_pieces(question, pieces, said)
    return _judge_label(clean(question), low, said, capital=expected[:1].isupper())


def _number_list(text: str) -> list[str]:
    """The numbers of a reference that is a list of two or more numbers, else []."""
    core = text.strip("[](){} ")
    if not re.fullmatch(r"-?[0-9.]+(?:\s*[,、;<→ ]\s*-?[0-9.]+)+", core) or re.fullmatch(r"[0-9]{1,3}(?:,[0-9]{3})+", core):
        return []
    return [n.value for n in find_numbers(core, thousands=False)]


def _judge_numbers(question: str, expected: list[str], said: str) -> Finding:
    text = LIST_MARK.sub("", said)
    asked = [n.value for n in find_numbers(question, thousands=False)]
    runs = [run for run in _runs(text, find_numbers(text, thousands=False)) if len(run) > 1]
    if re.search(r"→|->|=>", text):  # "20, 12, 67 → 12, 20, 67": the list after the question's own
        runs = [run[len(asked) :] if len(run) > len(asked) and run[: len(asked)] == asked else run for run in runs]
    own = [run for run in runs if run != asked[-len(run) :] or run == expected] or runs
    if not own:
        return Finding(False, 0.0, "gives no list of numbers")
    chosen = own[-1]
    distinct = {tuple(run) for run in own}
    if re.search(_HEDGE, text, re.IGNORECASE) and len(distinct) > 1:
        return Finding(False, 0.4, "gives several lists to choose from")
    if chosen == expected:
        return Finding(True, 1.0, "gives the expected list in order")
    near = SequenceMatcher(None, chosen[:50], expected, autojunk=False).ratio()
    return Finding(False, near, f"the list is {_short(', '.join(chosen))}, not {', '.join(expected)}")


def _runs(text: str, numbers: list[Number]) -> list[list[str]]:
    """Neighbouring numbers with nothing but list separators between them; a new line ends a list that stood on one line."""
    runs: list[list[str]] = []
    on_one_line = False
    for i, number in enumerate(numbers):
        gap = text[numbers[i - 1].end : number.start] if i else ""
        if i and _LIST_SEPARATOR.fullmatch(gap) and not ("\n" in gap and on_one_line):
            on_one_line = on_one_line or "\n" not in gap
            runs[-1].append(number.value)
        else:
            runs.append([number.value])
            on_one_line = False
    return runs


def _judge_number(question: str, expected: str, said: str, unit: str) -> Finding:
    first = said.split("\n", 1)[0].strip().rstrip("。.").strip()
    text = _after_correction(_REASON.sub("", said)) if not _BARE_NUMBER.match(first) else first
    asked = {n.value for n in find_numbers(question, words=False)} - {expected}
    numbers = [n for n in find_numbers(text) if not _denied(text, n.start, n.end)]
    numbers = [n for n in numbers if n.value not in asked] or numbers
    if not numbers:
        return Finding(False, 0.0, "states no number")
    at = _stated(question, text, numbers)
    for i in (at, at + 1):
        gap = text[numbers[i - 1].end : numbers[i].start] if 0 < i < len(numbers) else "."
        if _OPTION_GAP.fullmatch(gap) and numbers[i].value != numbers[i - 1].value:
            return Finding(False, 0.4 * any(n.value == expected for n in numbers), "lists several numbers")
    value = numbers[at].value
    given = _unit(text, numbers[at])
    if value == expected and _other_unit(unit or _asked_noun(question), given):
        return Finding(False, 0.4, f"states {expected} {given}, another unit")
    if value == expected:
        return Finding(True, 1.0, f"states {expected}")
    return Finding(False, _closeness(value, expected), f"states {_short(value)}, not {expected}")


def _stated(question: str, text: str, numbers: list[Number]) -> int:
    """Which of the numbers is the answer: a marked one, one with the noun that was asked for, else the last."""
    noun = _asked_noun(question)
    named = [i for i, n in enumerate(numbers) if noun and _unit(text, n).startswith(noun)]
    for mark in reversed([m.end() for m in _MARKER.finditer(text)]):
        after = [i for i, n in enumerate(numbers) if n.start >= mark and not re.search(r"[。\n]|\.\s", text[mark : n.start].strip())]
        if after:
            at = after[0] if text[mark - 1] == "=" else after[-1]
            return named[-1] if named and at not in named and _unit(text, numbers[at]) in _UNIT_NAMES else at
    return named[-1] if named else len(numbers) - 1


def _asked_noun(question: str) -> str:
    noun = re.search(r"\bhow many (\w+)|何([分時秒日年人個本円文字回枚匹冊歳])", question, re.IGNORECASE)
    return (noun.group(1) or noun.group(2)).lower() if noun else ""


def _unit(text: str, number: Number) -> str:
    """The word right after a number."""
    word = re.match(rf"[\s-]*([A-Za-z]+|[{CJK}]+)", text[number.end : number.end + 24])
    return word.group(1).lower() if word else ""


def _other_unit(wanted: str, given: str) -> bool:
    """Whether both are units that are known and differ: 80 seconds are not 80 minutes."""
    return wanted in _UNIT_NAMES and given in _UNIT_NAMES and _UNIT_NAMES[wanted] != _UNIT_NAMES[given]


_UNIT_LINES = (
    "s sec second seconds 秒 秒です|min minute minutes 分 分です 分間|h hour hours 時間 時間です|day days 日 日です|week weeks 週間|"
    "mm millimeters ミリ|cm centimeters センチ|m meter meters metre metres メートル メートルです|"
    "km kilometer kilometers kilometres キロメートル|g gram grams グラム|kg kilogram kilograms キログラム|円 円です yen|ドル dollars dollar"
)
_UNIT_NAMES = {name: i for i, names in enumerate(_UNIT_LINES.split("|")) for name in names.split()}


def _closeness(value: str, expected: str) -> float:
    if not all(re.fullmatch(r"-?[0-9]{1,15}(?:\.[0-9]{1,15})?", number) for number in (value, expected)):
        return 0.0
    gap = abs(float(value) - float(expected)) / max(1.0, abs(float(expected)))
    return 0.5 * max(0.0, 1 - 2 * gap)


def _judge_polarity(yes: bool, said: str) -> Finding:
    alternatives = sorted(_YES | _NO, key=len, reverse=True)
    words = re.compile("|".join(rf"\b{w}\b" if w.isascii() else w for w in alternatives), re.IGNORECASE)
    marked = [m.end() for m in _MARKER.finditer(said)]
    found = (words.search(said, marked[-1]) if marked else None) or words.search(said)
    if found is None:
        return Finding(False, 0.0, "says neither yes nor no")
    if re.match(rf"\s*(?:{_HEDGE}|と|か)", said[found.end() :], re.IGNORECASE):
        return Finding(False, 0.4, "leaves it open")
    right = (found.group().lower() in _YES) == yes
    return Finding(right, float(right), f"says {found.group()}" if right else f"says {found.group()}, the opposite of the expected answer")


def _judge_choice(expected: str, said: str) -> Finding:
    lead = re.match(r"\(?([A-Ja-j])(?:[).:]|\s*$|\s*\n)", said)
    marked = [m.end() for m in _MARKER.finditer(said)]
    pattern = re.compile(r"(?<![A-Za-z])([A-J])(?![A-Za-z'])")
    after = pattern.search(said, marked[-1]) if marked else None
    letters = {m.group(1) for m in pattern.finditer(said)}
    chosen = after.group(1) if after else lead.group(1).upper() if lead else letters.pop() if len(letters) == 1 else ""
    if chosen and lead and re.search(rf"\n\s*\(?[A-J][).]|^.{{0,40}}{_HEDGE}\s*\(?[A-J]\b", said):
        chosen = ""
    if not chosen:
        return Finding(False, 0.4 * (expected in letters), "chooses no single option")
    return Finding(chosen == expected, float(chosen == expected), f"chooses {chosen}" + ("" if chosen == expected else f", not {expected}"))


def _pieces(text: str) -> list[str]:
    """The items of a list of words, each bare; single letters may stand with spaces alone."""
    if re.fullmatch(r"(?:\w )+\w", text):
        return text.casefold().split(" ")
    pieces = [bare(piece) for piece in re.split(r"[,、;・\n]|\s+and\s+", text.strip("[](){}"))]
    return [piece for piece in pieces if piece]


def _judge_pieces(question: str, expected: list[str], said: str) -> Finding:
    text = LIST_MARK.sub("", said).casefold()
    spans = [(m.start(), m.end(), piece) for piece in set(expected) for m in _bounded(piece).finditer(text)]
    spans.sort()
    letters = all(re.fullmatch("[a-z0-9\u3041-\u30ff]", piece) for piece in expected)
    ordered = letters or re.search(r"\bsort|\border\b|\beach\b|順|並|それぞれ", question, re.IGNORECASE)
    best, why = 0.0, "names none of the expected items"
    runs = _piece_runs(text, spans)
    if not runs and bare(said).replace(" ", "") == "".join(expected) and letters:
        return Finding(True, 1.0, "gives the expected letters in order")
    for run in reversed(runs):
        names = [span[2] for span in run]
        same = names == expected if ordered else sorted(names) == sorted(expected)
        extra = _extra(text, run[0][0], run[-1][1], letters=letters)
        if same and not extra:
            return Finding(True, 1.0, "gives the expected items")
        near = SequenceMatcher(None, names[:50], expected, autojunk=False).ratio() * (0.8 if extra else 0.95)
        if near > best:
            best, why = near, f"gives {_short(', '.join(names))}{' and others' if extra else ''}, not {', '.join(expected)}"
    if letters:  # "garden: g, button: b": the letters that stand alone, in order
        alone = re.findall(r"(?<![\w'])\w(?![\w'])", text)
        if alone == expected:
            return Finding(True, 1.0, "gives the expected letters in order")
    return Finding(False, best, why)


def _piece_runs(text: str, spans: list[tuple[int, int, str]]) -> list[list[tuple[int, int, str]]]:
    runs: list[list[tuple[int, int, str]]] = []
    for span in spans:
        gap = text[runs[-1][-1][1] : span[0]] if runs else ""
        if runs and re.fullmatch(r"[\s,、;.・/\-と\"'「」]*(?:and\s*[\"']?)?", gap) and gap:
            runs[-1].append(span)
        else:
            runs.append([span])
    return runs


def _extra(text: str, start: int, end: int, *, letters: bool) -> bool:
    """Whether the list goes on before or after the span with items that are not expected."""
    short = r"\w" if letters else rf"(?:[{CJK}]{{1,8}}|[a-z]+(?:\s[a-z]+)?)"
    after = re.match(rf"\s*(?:[,、・/\n]|\band\b|と)\s*(?:and\s*)?{short}\s*(?:$|[,、.。\n・])", text[end:])
    before = re.search(rf"(?:^|[\s:は])(?:{short})\s*(?:[,、・/]|\band)\s*$", text[:start])
    spaced = letters and re.match(r"\s+\w(?:$|\W)", text[end:])
    return bool(after or before or spaced)


def _bounded(piece: str) -> re.Pattern[str]:
    """Where a word stands as a whole: by word boundaries, by change of script, or, all kana, beside punctuation and です."""
    core = re.escape(piece).replace(r"\ ", r"\s+")
    if not re.search(f"[{CJK}]", piece):
        return re.compile(rf"(?<![A-Za-z0-9]){core}(?![A-Za-z0-9]|'[a-z])", re.IGNORECASE)
    if re.fullmatch("[\u3041-\u309f0-9]+", piece):
        before, after = r"(?:(?<![\w])|(?<=[^\W\u3041-\u309f]は)|(?<=こたえは))", r"(?=$|\W|です|でした|になります|となります|である)"
        return re.compile(before + core + after)
    script = "\u30a1-\u30ff" if re.match("[\u30a1-\u30ff]", piece) else "\u3400-\u9fff々"
    tail = (
        "\u30a1-\u30ff" if re.search("[\u30a1-\u30ff]$", piece) else "\u3400-\u9fff々" if not re.search("[\u3041-\u309f]$", piece) else "々"
    )
    return re.compile(rf"(?<![{script}]){core}(?![{tail}])", re.IGNORECASE)


def _denied(text: str, start: int, end: int) -> bool:
    return bool(_NOT_BEFORE.search(text[max(0, start - 40) : start]) or _NOT_AFTER.match(text[end : end + 30]))


def _after_correction(text: str) -> str:
    """The part after "wait", "actually" or 訂正, if something stands there."""
    last = max((m.end() for m in _CORRECTION.finditer(text)), default=0)
    return text[last:] if re.search(r"\w{2}", text[last:]) else text


def _judge_label(question: str, expected: str, said: str, *, capital: bool) -> Finding:
    pattern = _bounded(expected)
    lines = [line for line in said.split("\n") if line.strip()]
    text = _ASIDE.sub("", _after_correction(said))
    if not pattern.search(text):
        claim = bare(lines[0])[:80] if lines else ""
        near = SequenceMatcher(None, claim, expected, autojunk=False).ratio()
        return Finding(False, 0.8 * near if near >= 0.5 else 0.0, f"does not say {expected}")
    if len(lines) > 1 and bare(LIST_MARK.sub("", lines[0])) == expected:
        others = [bare(LIST_MARK.sub("", line)) for line in lines[1:]]
        if any(other and other != expected and ":" not in other and len(other.split()) <= 2 and len(other) <= 16 for other in others):
            return Finding(False, 0.4, f"lists {expected} among other options")
        return Finding(True, 1.0, f"says {expected}")
    if (
        len(lines) > 1
        and sum(pattern.fullmatch(bare(LIST_MARK.sub("", line))) is not None for line in lines)
        and not lines[0].endswith(":")
    ):
        return Finding(False, 0.4, f"lists {expected} among other options")
    return _judge_sentences(question, expected, pattern, text, capital=capital)


def _judge_sentences(question: str, expected: str, pattern: re.Pattern[str], text: str, *, capital: bool) -> Finding:
    passing = Finding(False, 0.4, f"mentions {expected} only in passing")
    terms = _terms(question)
    for sentence in re.split(r"(?<=[.!?])\s+|。|\n+|(?<=[!?])", text):
        sentence = sentence.strip()
        if not sentence or sentence.endswith("?"):
            continue
        parts = re.split(r"[,、]?\s*(?:\bbut\b|\bhowever\b|しかし|けれど|(?<=です)が[、,])", sentence, flags=re.IGNORECASE)
        for part in reversed(parts):
            if pattern.search(part):
                return _judge_part(question, expected, pattern, part.strip(), capital=capital)
            about = terms and all(term in part.lower() for term in terms)
            if _COPULA.search(part) and (about or re.match(r"(?:it|that|this)(?:'s| is)\b|それは", part, re.IGNORECASE)):
                return passing
    return passing


def _judge_part(question: str, expected: str, pattern: re.Pattern[str], part: str, *, capital: bool) -> Finding:
    matches = [m for m in pattern.finditer(part) if not _denied(part, m.start(), m.end())]
    if not matches:
        return Finding(False, 0.2, f"denies {expected}")
    passing = Finding(False, 0.4, f"mentions {expected} only in passing")
    match = matches[0]
    around = part[max(0, match.start() - 30) : match.start()], part[match.end() : match.end() + 30]
    item = r"[\"'「」(]*\s*"
    if re.match(rf"{item}(?:[^.。]{{0,4}}\s*{_HEDGE}|か|や|/)", around[1], re.IGNORECASE) or re.search(
        rf"(?:{_HEDGE}|か、?|や|/)\s*{item}(?:the\s+)?$", around[0], re.IGNORECASE
    ):
        return Finding(False, 0.4, f"gives {expected} only as one choice")
    if _is_listed(question, part, match):
        return Finding(False, 0.4, f"lists {expected} among others")
    lead = re.match(rf"(?:[\"'「]|\b{_FILLER}\b\s*)*$", part[: match.start()], re.IGNORECASE)
    slot = _COPULA.search(part)
    if lead or not slot:
        # "Cairo is the largest city, and the capital is Alexandria" claims the second
        claims = [
            m for m in _COPULA.finditer(part) if any(part[: m.start()].lower().rstrip().endswith(f"the {t}") for t in _terms(question))
        ]
        rest = (part[claims[-1].end() :] if claims else "") if lead else part
        rivals = _rivals(question, expected, rest, capital=capital)
        return Finding(True, 1.0, f"says {expected}") if not rivals else passing
    claim = _CLAUSE_END.split(part[slot.end() :].strip(), maxsplit=1)[0]
    hits = list(pattern.finditer(claim))
    if not hits or _rivals(question, expected, claim, capital=capital):
        return passing
    if not capital and re.search("[a-z]", expected):  # a plain word must open or close what is claimed
        opens = re.fullmatch(rf"(?:[\"']|\b{_FILLER}\b|\s|-)*", claim[: hits[0].start()], re.IGNORECASE)
        closes = re.fullmatch(r"[\W_]*", claim[hits[-1].end() :])
        if not opens and not closes:
            return passing
    return Finding(True, 1.0, f"says {expected}")


def _is_listed(question: str, part: str, match: re.Match[str]) -> bool:
    """Whether the expected word is one item of a list: "Cairo, Tripoli, Tunis" or, as the whole answer, "Cairo, Tripoli"."""
    items = [bare(item) for item in re.split(r"[,、・;]|\band\b|と(?=[^い])", part[max(0, match.start() - 60) : match.end() + 60])]
    items = [item for item in items if item]
    if not items:
        return False
    at = next((i for i, item in enumerate(items) if bare(match.group()) in item), 0)
    near = items[at + 1 : at + 3] if at == 0 else [items[at - 1], *items[at + 1 : at + 2]]
    others = [item for item in near if len(item.split()) <= 2 and len(item) <= 16 and item not in question.lower()]
    whole = items[at] == bare(match.group())
    return bool(others) and (whole or len(others) > 1)


def _rivals(question: str, expected: str, claim: str, *, capital: bool) -> list[str]:
    """Other names in a claim, known by their capital; Japanese names none."""
    if not capital:
        return []
    known = (question + " " + expected).lower()
    names = re.findall(r"\b[A-Z][a-zà-ÿ]{2,}\b", claim)
    return [name for name in names if name.lower() not in known and name.lower() not in _COMMON]


_COMMON = {
    "the",
    "its",
    "this",
    "that",
    "sure",
    "yes",
    "answer",
    "here",
    "with",
    "republic",
    "city",
    "there",
    "today",
    "for",
    "and",
    "certainly",
}


def _terms(question: str) -> list[str]:
    """The words a sentence must hold to be about the question: of its first sentence, without question words."""
    first = re.split(r"[?。\n]", question.strip(), maxsplit=1)[0].lower()
    return [w for w in re.findall("[a-z]{3,}|[\u30a1-\u30ff]{2,}|[\u3400-\u9fff]{2,}", first) if w not in _STOP]


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"
