"""Closed tasks whose answer is a word or a name.

It must be claimed, not mentioned in passing or as one of several.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher

from evomerge.judging.rules.closed_tasks.claims import (
    HEDGE,
    Finding,
    after_correction,
    denied,
    whole_word,
)
from evomerge.judging.rules.closed_tasks.places import without_region
from evomerge.text import bare, without_list_marks

_COPULA = re.compile(
    r"(?:\b(?:is|are|was|were|be|called|named|means|equals)\b|'s\b|[:=→]|(?<![でにと])は)"
    r"\s*+(?:[,、]\s*+)?",
    re.IGNORECASE,
)
_ASIDE = re.compile(
    r",\s*(?:of course|indeed|obviously|in fact|as you know|however)\s*,", re.IGNORECASE
)
_CLAUSE_END = re.compile(r"[,、;()]|\b(?:which|where|while|who|because|since)\b")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|。|\n+|(?<=[!?])")
_BUT = re.compile(
    r"(?:[,、]|(?<!\s))\s*+(?:\bbut\b|\bhowever\b|しかし|けれど|(?<=です)が[、,])", re.IGNORECASE
)
_REFERS_BACK = re.compile(r"(?:it|that|this)(?:'s| is)\b|それは", re.IGNORECASE)
_ITEM = r"[\"'「」(]*+\s*+"
_OR_AFTER = re.compile(rf"\A{_ITEM}(?:[^.。]{{0,4}}\s*{HEDGE}|か|や|/)", re.IGNORECASE)
_OR_BEFORE = re.compile(rf"(?:{HEDGE}|か、?|や|/)\s*+{_ITEM}(?:the\s++)?$", re.IGNORECASE)
_FILLER = r"(?:the|a|an|of|word|letter|city|simply|just|probably|usually|also)"
_LEAD = re.compile(rf"\A(?:[\"'「]|\b{_FILLER}\b\s*+)*+$", re.IGNORECASE)
_OPENING = re.compile(rf"(?:[\"']|\b{_FILLER}\b|\s|-)*", re.IGNORECASE)
_LIST_SEPARATOR = re.compile(r"[,、・;]|\band\b|と(?=[^い])")
_TERM = re.compile("[a-z]{3,}|[\u30a1-\u30ff]{2,}|[\u3400-\u9fff]{2,}")
_STOP = frozenset(
    re.findall(
        r"\S+",
        "the what which who how are for this that and answer name with one word was does",
    )
)
_COMMON = frozenset(
    re.findall(
        r"\S+",
        "the its this that sure yes answer here with republic city there today for and certainly",
    )
)


@dataclass(frozen=True)
class _Label:
    """An expected word or name, its occurrences in a text, and its question.

    `capital`: it is a name, so other names next to it are rivals. `terms` are the words that a
    sentence about the question holds.
    """

    question: str
    word: str
    pattern: re.Pattern[str]
    terms: list[str]
    capital: bool

    def passing(self) -> Finding:
        """A mention that claims nothing."""
        return Finding(False, 0.4, f"mentions {self.word} only in passing")


def judge_label(question: str, expected: str, said: str, *, capital: bool) -> Finding:
    """Judge a word or name as the answer's conclusion."""
    pattern = whole_word(expected)
    lines = []
    for line in without_region(said, pattern).split("\n"):
        if line.strip():
            lines.append(line)
    text = without_region(_ASIDE.sub("", after_correction(said)), pattern)
    if not pattern.search(text):
        claim = ""
        if lines:
            claim = bare(lines[0])[:80]
        near = SequenceMatcher(None, claim, expected, autojunk=False).ratio()
        value = 0.0
        if near >= 0.5:
            value = 0.8 * near
        return Finding(False, value, f"does not say {expected}")
    if len(lines) > 1:
        items = [bare(without_list_marks(line)) for line in lines]
        if items[0] == expected:
            if any(_is_rival_line(item, expected) for item in items[1:]):
                return Finding(False, 0.4, f"lists {expected} among other options")
            return Finding(True, 1.0, f"says {expected}")
        if not lines[0].endswith(":") and any(map(pattern.fullmatch, items)):
            return Finding(False, 0.4, f"lists {expected} among other options")
    return _judge_sentences(_Label(question, expected, pattern, _terms(question), capital), text)


def _is_rival_line(item: str, expected: str) -> bool:
    """Whether a bare line names another answer rather than explaining the first."""
    if not item or item == expected or ":" in item:
        return False
    return _is_short(item)


def _is_short(item: str) -> bool:
    return len(item.split()) <= 2 and len(item) <= 16


def _judge_sentences(label: _Label, text: str) -> Finding:
    """Judge by the first part of a sentence that names the label, unless a claim precedes it."""
    for sentence in map(str.strip, _SENTENCE_END.split(text)):
        if not sentence or sentence.endswith("?"):
            continue
        for part in reversed(_BUT.split(sentence)):
            if label.pattern.search(part):
                return _judge_part(label, part.strip())
            about = label.terms and all(term in part.lower() for term in label.terms)
            if _COPULA.search(part) and (about or _REFERS_BACK.match(part)):
                return label.passing()
    return label.passing()


def _judge_part(label: _Label, part: str) -> Finding:
    """Judge by the first mention in a part of a sentence that is not denied."""
    match = None
    for mention in label.pattern.finditer(part):
        if not denied(part, mention.start(), mention.end()):
            match = mention
            break
    if match is None:
        return Finding(False, 0.2, f"denies {label.word}")
    before = part[max(0, match.start() - 30) : match.start()]
    after = part[match.end() : match.end() + 30]
    if _OR_AFTER.match(after) or _OR_BEFORE.search(before):
        return Finding(False, 0.4, f"gives {label.word} only as one choice")
    if _is_listed(label.question, part, match):
        return Finding(False, 0.4, f"lists {label.word} among others")
    if _claims(label, part, match):
        return Finding(True, 1.0, f"says {label.word}")
    return label.passing()


def _claims(label: _Label, part: str, match: re.Match[str]) -> bool:
    """Whether a part of a sentence claims the label: it opens with it, or says that something is.

    A plain word must open or close what is claimed; it may not contain a rival name.
    """
    copula = _COPULA.search(part)
    if _LEAD.match(part[: match.start()]):
        return not _rivals(label, _second_claim(label, part))
    if not copula:
        return not _rivals(label, part)
    claim = _CLAUSE_END.split(part[copula.end() :].strip(), maxsplit=1)[0]
    hits = list(label.pattern.finditer(claim))
    if not hits or _rivals(label, claim):
        return False
    if label.capital or not re.search("[a-z]", label.word):
        return True
    if _OPENING.fullmatch(claim[: hits[0].start()]):
        return True
    return re.fullmatch(r"[\W_]*", claim[hits[-1].end() :]) is not None


def _second_claim(label: _Label, part: str) -> str:
    """ "Cairo is the largest city, and the capital is Alexandria" claims the second: Alexandria."""
    rest = ""
    for copula in _COPULA.finditer(part):
        subject = part[: copula.start()].lower().rstrip()
        if any(subject.endswith(f"the {term}") for term in label.terms):
            rest = part[copula.end() :]
    return rest


def _is_listed(question: str, part: str, match: re.Match[str]) -> bool:
    """Whether the expected word is one item of a list: "Cairo, Tripoli, Tunis".

    As the whole answer, "Cairo, Tripoli" is a list too.
    """
    expected = bare(match.group())
    around = part[max(0, match.start() - 60) : match.end() + 60]
    items = list(filter(None, map(bare, _LIST_SEPARATOR.split(around))))
    if not items:
        return False
    at = 0
    for i, item in enumerate(items):
        if expected in item:
            at = i
            break
    near = items[1:3]
    if at > 0:
        near = [items[at - 1], *items[at + 1 : at + 2]]
    known = question.lower()
    others = []
    for item in near:
        if _is_short(item) and item not in known:
            others.append(item)
    return len(others) > 1 or (bool(others) and items[at] == expected)


def _rivals(label: _Label, claim: str) -> list[str]:
    """Other names in a claim, recognised by their capital, which Japanese does not have."""
    if not label.capital:
        return []
    known = (label.question + " " + label.word).lower()
    names = re.findall(r"\b[A-Z][a-zà-ÿ]{2,}\b", claim)
    rivals = []
    for name in names:
        if name.lower() not in known and name.lower() not in _COMMON:
            rivals.append(name)
    return rivals


def _terms(question: str) -> list[str]:
    """The words that a sentence about the question must hold.

    They are those of its first sentence, without question words.
    """
    first = re.split(r"[?。\n]", question.strip(), maxsplit=1)[0].lower()
    terms = []
    for word in dict.fromkeys(_TERM.findall(first)):
        if word not in _STOP:
            terms.append(word)
    return terms
