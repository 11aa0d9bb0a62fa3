"""Closed tasks whose answer is a word or a name: is it claimed, rather than mentioned in passing or
as one of several?
"""

from __future__ import annotations

import re
from difflib import SequenceMatcher

from evomerge.judging.rules.closed_tasks.claims import HEDGE, Finding, after_correction, whole_word, denied
from evomerge.judging.rules.closed_tasks.places import without_region
from evomerge.text import LIST_MARK, bare

_COPULA = re.compile(
    r"(?:\b(?:is|are|was|were|be|called|named|means|equals)\b|'s\b|[:=→]|(?<![でにと])は)\s*[,、]?\s*",
    re.IGNORECASE,
)
_ASIDE = re.compile(
    r",\s*(?:of course|indeed|obviously|in fact|as you know|however)\s*,", re.IGNORECASE
)
_CLAUSE_END = re.compile(r"[,、;()]|\b(?:which|where|while|who|because|since)\b")
_FILLER = r"(?:the|a|an|of|word|letter|city|simply|just|probably|usually|also)"
_STOP = {
    "the",
    "what",
    "which",
    "who",
    "how",
    "are",
    "for",
    "this",
    "that",
    "and",
    "answer",
    "name",
    "with",
    "one",
    "word",
    "was",
    "does",
}
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


def judge_label(question: str, expected: str, said: str, *, capital: bool) -> Finding:
    """A word or name as the answer's conclusion."""
    pattern = whole_word(expected)
    lines = [line for line in without_region(said, pattern).split("\n") if line.strip()]
    text = without_region(_ASIDE.sub("", after_correction(said)), pattern)
    if not pattern.search(text):
        claim = bare(lines[0])[:80] if lines else ""
        near = SequenceMatcher(None, claim, expected, autojunk=False).ratio()
        return Finding(False, 0.8 * near if near >= 0.5 else 0.0, f"does not say {expected}")
    if len(lines) > 1 and bare(LIST_MARK.sub("", lines[0])) == expected:
        others = [bare(LIST_MARK.sub("", line)) for line in lines[1:]]
        if any(
            other
            and other != expected
            and ":" not in other
            and len(other.split()) <= 2
            and len(other) <= 16
            for other in others
        ):
            return Finding(False, 0.4, f"lists {expected} among other options")
        return Finding(True, 1.0, f"says {expected}")
    if (
        len(lines) > 1
        and sum(pattern.fullmatch(bare(LIST_MARK.sub("", line))) is not None for line in lines)
        and not lines[0].endswith(":")
    ):
        return Finding(False, 0.4, f"lists {expected} among other options")
    return _judge_sentences(question, expected, pattern, text, capital=capital)


def _judge_sentences(
    question: str, expected: str, pattern: re.Pattern[str], text: str, *, capital: bool
) -> Finding:
    passing = Finding(False, 0.4, f"mentions {expected} only in passing")
    terms = _terms(question)
    for sentence in re.split(r"(?<=[.!?])\s+|。|\n+|(?<=[!?])", text):
        sentence = sentence.strip()
        if not sentence or sentence.endswith("?"):
            continue
        parts = re.split(
            r"[,、]?\s*(?:\bbut\b|\bhowever\b|しかし|けれど|(?<=です)が[、,])",
            sentence,
            flags=re.IGNORECASE,
        )
        for part in reversed(parts):
            if pattern.search(part):
                return _judge_part(question, expected, pattern, part.strip(), capital=capital)
            about = terms and all(term in part.lower() for term in terms)
            if _COPULA.search(part) and (
                about or re.match(r"(?:it|that|this)(?:'s| is)\b|それは", part, re.IGNORECASE)
            ):
                return passing
    return passing


def _judge_part(
    question: str, expected: str, pattern: re.Pattern[str], part: str, *, capital: bool
) -> Finding:
    matches = [m for m in pattern.finditer(part) if not denied(part, m.start(), m.end())]
    if not matches:
        return Finding(False, 0.2, f"denies {expected}")
    passing = Finding(False, 0.4, f"mentions {expected} only in passing")
    match = matches[0]
    around = part[max(0, match.start() - 30) : match.start()], part[match.end() : match.end() + 30]
    item = r"[\"'「」(]*\s*"
    if re.match(
        rf"{item}(?:[^.。]{{0,4}}\s*{HEDGE}|か|や|/)", around[1], re.IGNORECASE
    ) or re.search(rf"(?:{HEDGE}|か、?|や|/)\s*{item}(?:the\s+)?$", around[0], re.IGNORECASE):
        return Finding(False, 0.4, f"gives {expected} only as one choice")
    if _is_listed(question, part, match):
        return Finding(False, 0.4, f"lists {expected} among others")
    lead = re.match(rf"(?:[\"'「]|\b{_FILLER}\b\s*)*$", part[: match.start()], re.IGNORECASE)
    slot = _COPULA.search(part)
    if lead or not slot:
        # "Cairo is the largest city, and the capital is Alexandria" claims the second
        claims = [
            m
            for m in _COPULA.finditer(part)
            if any(
                part[: m.start()].lower().rstrip().endswith(f"the {t}") for t in _terms(question)
            )
        ]
        rest = (part[claims[-1].end() :] if claims else "") if lead else part
        rivals = _rivals(question, expected, rest, capital=capital)
        return Finding(True, 1.0, f"says {expected}") if not rivals else passing
    claim = _CLAUSE_END.split(part[slot.end() :].strip(), maxsplit=1)[0]
    hits = list(pattern.finditer(claim))
    if not hits or _rivals(question, expected, claim, capital=capital):
        return passing
    # a plain word must open or close what is claimed
    if not capital and re.search("[a-z]", expected):
        opens = re.fullmatch(
            rf"(?:[\"']|\b{_FILLER}\b|\s|-)*", claim[: hits[0].start()], re.IGNORECASE
        )
        closes = re.fullmatch(r"[\W_]*", claim[hits[-1].end() :])
        if not opens and not closes:
            return passing
    return Finding(True, 1.0, f"says {expected}")


def _is_listed(question: str, part: str, match: re.Match[str]) -> bool:
    """Whether the expected word is one item of a list: "Cairo, Tripoli, Tunis" or, as the whole
    answer, "Cairo, Tripoli".
    """
    items = [
        bare(item)
        for item in re.split(
            r"[,、・;]|\band\b|と(?=[^い])", part[max(0, match.start() - 60) : match.end() + 60]
        )
    ]
    items = [item for item in items if item]
    if not items:
        return False
    at = next((i for i, item in enumerate(items) if bare(match.group()) in item), 0)
    near = items[at + 1 : at + 3] if at == 0 else [items[at - 1], *items[at + 1 : at + 2]]
    others = [
        item
        for item in near
        if len(item.split()) <= 2 and len(item) <= 16 and item not in question.lower()
    ]
    whole = items[at] == bare(match.group())
    return bool(others) and (whole or len(others) > 1)


def _rivals(question: str, expected: str, claim: str, *, capital: bool) -> list[str]:
    """Other names in a claim, known by their capital; Japanese names none."""
    if not capital:
        return []
    known = (question + " " + expected).lower()
    names = re.findall(r"\b[A-Z][a-zà-ÿ]{2,}\b", claim)
    return [name for name in names if name.lower() not in known and name.lower() not in _COMMON]


def _terms(question: str) -> list[str]:
    """The words a sentence must hold to be about the question: of its first sentence, without
    question words.
    """
    first = re.split(r"[?。\n]", question.strip(), maxsplit=1)[0].lower()
    return [
        w
        for w in re.findall("[a-z]{3,}|[\u30a1-\u30ff]{2,}|[\u3400-\u9fff]{2,}", first)
        if w not in _STOP
    ]
