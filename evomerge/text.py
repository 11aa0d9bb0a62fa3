"""Japanese and English text: cleaning, numbers, sentences, script, repetition, lists."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache

_PLAIN = r"(?:(?<![\w)])-)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
_SINGLE = r"(?:(?<![\w)])-)?[0-9]+(?:\.[0-9]+)?"
_NUMBER = re.compile(rf"(?:{_PLAIN}[十百千万億兆]+)+(?:{_PLAIN})?|{_PLAIN}")
_NUMBER_NO_THOUSANDS = re.compile(_SINGLE)
_KANJI_NUMBER = re.compile(r"[〇零一二三四五六七八九十百千万億]+")
_KANJI_DIGITS = {c: i for i, c in enumerate("〇一二三四五六七八九")} | {"零": 0}
_KANJI_SCALES = {"十": 10, "百": 100, "千": 1000, "万": 10**4, "億": 10**8, "兆": 10**12}
_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMBER_WORDS = {word: i for i, word in enumerate(_UNITS.split())}
NUMBER_WORDS |= {word: 10 * i for i, word in enumerate(_TENS.split(), start=2)}
_WORD = "|".join(sorted(NUMBER_WORDS, key=len, reverse=True))
_WORD_NUMBER = re.compile(
    rf"\b(?:{_WORD}|hundred)(?:(?:[\s-]+|\s+and\s+)(?:{_WORD}|hundred))*\b", re.IGNORECASE
)
_MARKS = re.compile(r"\*\*|__|`+|\\boxed|\\\(|\\\)|^#+\s*", re.MULTILINE)
# Both find every line's beginning, blank lines included, and what stands there is optional: each
# run of white space is looked at once.
_ITEM_LINE = re.compile(
    r"(?:^|\n)(\s*+)(?:(?:([0-9]{1,2})[.)．:、]|[-*・•●◦‣])\s*+(\S))?", re.MULTILINE
)
_LIST_MARK = re.compile(r"(^|\n)\s*+((?:\(?[0-9]{1,2}[.)](?=\s)|[-*・•●])\s*+)?", re.MULTILINE)
_KANA = re.compile("[\u3041-\u309f\u30a1-\u30ff]+")
_HAN = re.compile("[\u3400-\u9fff々]+")
_LATIN = re.compile("[A-Za-zÀ-ɏ]+")
_OTHER = re.compile("[\u0370-\u1fff\uac00-\ud7af]+")
_ODD = re.compile("[^\u0000-\u024f\u3000-\u30ff\uff00-\uffef]")
_NO_WORD = re.compile(r"[\W_]+")
_SENTENCE_END = re.compile(r"(?<=[。!?])(?![」』)])|\n+")
QUOTED = re.compile(r"[「\"]([^「」\"\n]{1,40})[」\"]")
TERM = re.compile(
    r"[\u30a1-\u30ff]{2,}|[\u3400-\u9fff々]{2,}|[A-Za-z][A-Za-z'-]+|[0-9]+(?:[.,][0-9]+)*"
)
CJK = "\u3041-\u30ff\u3400-\u9fff々"


def clean(text: str) -> str:
    """NFKC, plain quotes and dashes, no Markdown marks; case and line breaks stay."""
    text = unicodedata.normalize("NFKC", text)
    for fancy, plain in _PLAIN_CHARS:
        text = text.replace(fancy, plain)
    return _MARKS.sub("", text).strip()


# str.replace is ten times faster than str.translate on Japanese text
_PLAIN_CHARS = [
    ("\r\n", "\n"),
    ("’", "'"),
    ("‘", "'"),
    ("“", '"'),
    ("”", '"'),
    ("−", "-"),
    ("–", "-"),
    ("—", "-"),
    ("\r", "\n"),
]


def bare(text: str) -> str:
    """`clean` in lower case, without the punctuation, quotes and article around it.

    White space becomes one space, or nothing next to Japanese characters.
    """
    text = re.sub(r"\s+", " ", clean(text).casefold())
    text = re.sub(rf"(?<=[{CJK}]) | (?=[{CJK}])", "", text)
    text = text.strip(" \t.,;:!?。、・'\"「」『』()[]【】<>*_=→")
    text = re.sub(r"^-+\s*(?![0-9])", "", text)
    if text.endswith("-"):
        text = text.rstrip("-").rstrip()
    return re.sub(r"^(?:the|a|an) (?=\w)", "", text)


def without_list_marks(text: str) -> str:
    """The text without the numbers and marks of lists, and without the white space around them."""
    return _LIST_MARK.sub(lambda match: match[1] if match[2] else match[0], text)


@dataclass(frozen=True)
class Number:
    """A number in a text and its position; `value` keeps leading zeros: 0012 is not 12."""

    value: str
    start: int
    end: int


def find_numbers(text: str, *, thousands: bool = True, words: bool = True) -> list[Number]:
    """The numbers of a cleaned text, in order.

    `thousands`: a comma between groups of three digits belongs to the number. `words`: where the
    text has no digits, English number words count, and where it has none of those, kanji numbers.
    """
    pattern = _NUMBER if thousands else _NUMBER_NO_THOUSANDS
    found = [Number(_digits_of(m.group()), m.start(), m.end()) for m in pattern.finditer(text)]
    if found or not words:
        return found
    for m in _WORD_NUMBER.finditer(text):
        found.append(Number(str(_words_value(m.group())), m.start(), m.end()))
    if found:
        return found
    for m in _KANJI_NUMBER.finditer(text):
        if len(m.group()) < 16:
            found.append(Number(str(_kanji_value(m.group())), m.start(), m.end()))
    return found


def _digits_of(token: str) -> str:
    token = token.replace(",", "")
    if token[-1] in _KANJI_SCALES or any(c in _KANJI_SCALES for c in token):
        token = format(_scaled_value(token), "f")
    if "." in token:
        token = token.rstrip("0").rstrip(".")
    return token


def _scaled_value(token: str) -> Decimal:
    total = Decimal(0)
    for digits, scales in re.findall(r"(-?[0-9]+(?:\.[0-9]+)?)([十百千万億兆]*)", token):
        value = Decimal(digits[:30])
        for scale in scales[:6]:
            value *= _KANJI_SCALES[scale]
        total += value
    return total


def _kanji_value(token: str) -> int:
    if not any(c in _KANJI_SCALES for c in token):
        return int("".join(str(_KANJI_DIGITS[c]) for c in token))
    total = part = digit = 0
    for c in token:
        if c in _KANJI_DIGITS:
            digit = _KANJI_DIGITS[c]
        elif _KANJI_SCALES[c] < 10**4:
            part += (digit or 1) * _KANJI_SCALES[c]
            digit = 0
        else:
            total += ((part + digit) or 1) * _KANJI_SCALES[c]
            part = digit = 0
    return total + part + digit


def _words_value(words: str) -> int:
    value = 0
    for word in re.findall(r"[a-z]+", words.lower()):
        if word == "hundred":
            value = (value or 1) * 100
        elif word != "and":
            value += NUMBER_WORDS[word]
    return value


def language(text: str) -> str:
    """The language by script: "ja", "zh", "latin", "other", or "" for too few letters to tell.

    "zh" is Chinese characters without kana, "other" any script beyond these.
    """
    kana = sum(map(len, _KANA.findall(text)))
    han = sum(map(len, _HAN.findall(text)))
    latin = sum(map(len, _LATIN.findall(text)))
    other = sum(map(len, _OTHER.findall(text)))
    # three Latin letters say about as much as one Japanese character
    total = kana + han + latin / 3 + other
    if total < 8:
        return ""
    if other > 0.3 * total:
        return "other"
    if kana + han < 0.3 * total:
        return "latin"
    if han > 20 and kana < 0.05 * han:
        return "zh"
    return "ja"


def sentences(text: str) -> list[str]:
    """The sentences and lines of a cleaned text, none empty."""
    return list(filter(None, map(str.strip, _SENTENCE_END.split(text))))


def trigrams(text: str) -> frozenset[str]:
    """The set of character trigrams of a text without white space and punctuation."""
    text = _NO_WORD.sub("", text).casefold()
    return frozenset(map("".join, zip(text, text[1:], text[2:], strict=False)))


def f1(a: frozenset[str], b: frozenset[str]) -> float:
    """Twice the shared n-grams over the n-grams of both (Dice coefficient), 0 to 1."""
    return 2 * len(a & b) / max(1, len(a) + len(b))


def foreign_letters(text: str, known: str = "") -> str:
    """Letters outside Japanese writing and `known`: simplified Chinese, Hangul, Thai, Arabic.

    They are recognised by their absence from JIS X 0208 with the vendors' additions (cp932).
    """
    if _in_cp932(text):
        return ""
    odd = [c for c in set(_ODD.findall(text)) if c.isalpha() and c not in known]
    return "".join(sorted(c for c in odd if not _is_in_cp932(c)))


def _in_cp932(text: str) -> bool:
    try:
        text.encode("cp932")
    except UnicodeEncodeError:
        return False
    return True


_is_in_cp932 = lru_cache(maxsize=8192)(_in_cp932)  # of single characters


def repetition(text: str, n: int = 10) -> float:
    """The share of character n-grams that repeat earlier ones: prose under 0.1, a loop over 0.5."""
    text = re.sub(r"[\s|\-=_.・*#]+", " ", text)  # tables and rules repeat by nature
    total = len(text) - n + 1
    if total < 2 * n:
        return 0.0
    return 1 - len({text[i : i + n] for i in range(total)}) / total


def count_items(text: str) -> int:
    """How many items a list in the text has: numbered ones, or else marked ones; 0 without a list.

    Only the least indented items count.
    """
    indents = []
    numbered = []
    for match in _ITEM_LINE.finditer(text):
        if not match.group(3):
            continue
        indent = len(match.group(1).replace("\n", ""))
        indents.append(indent)
        if match.group(2):
            numbered.append(indent)
    if len(numbered) >= 2:
        indents = numbered
    return indents.count(min(indents, default=0))


_NAMED_JA = re.compile(
    r"([0-9]{1,2}|[一二三四五六七八九十])\s*"
    r"(?:つ|個|点|冊|項目|種類|例|案|件|箇条|か条|選|本|曲|人|名|通り)[^。\n]{0,12}?"
    r"(?:挙げ|あげ|列挙|出し|教え|リスト|提案|考え|書い|作|述べ|紹介|選)"
)
_NAMED_EN = re.compile(
    r"\b(?:list|give|name|write|suggest|provide|propose|describe|mention|tell)\b"
    r"(?:\s++(?:me|us|the|a|at|least|your|top|out))*\s++"
    rf"([0-9]{{1,2}}|{_WORD})\b(?!\s*[-%])",
    re.IGNORECASE,
)


def named_count(task: str) -> int | None:
    """How many items a task asks for (「5つ挙げて」, "list three"); None unless it is 2 to 30."""
    match = _NAMED_JA.search(task) or _NAMED_EN.search(task)
    if match is None:
        return None
    token = match.group(1).lower()
    if token[0] in "一二三四五六七八九十":
        count = _kanji_value(token)
    elif token in NUMBER_WORDS:
        count = NUMBER_WORDS[token]
    else:
        count = int(token)
    return count if 2 <= count <= 30 else None
