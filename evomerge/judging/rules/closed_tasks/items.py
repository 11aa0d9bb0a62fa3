"""Closed tasks whose answer is yes or no, a lettered choice, or a list of words."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

from evomerge.judging.rules.closed_tasks.claims import HEDGE, MARKER, Finding, whole_word, abbreviated
from evomerge.text import CJK, LIST_MARK, bare

YES = {"はい", "yes", "true", "正しい", "真", "ok", "正", "yeah"}
NO = {"いいえ", "no", "false", "正しくない", "偽", "誤り", "誤"}


def judge_polarity(yes: bool, said: str) -> Finding:
    alternatives = sorted(YES | NO, key=len, reverse=True)
    words = re.compile(
        "|".join(rf"\b{w}\b" if w.isascii() else w for w in alternatives), re.IGNORECASE
    )
    marked = [m.end() for m in MARKER.finditer(said)]
    found = (words.search(said, marked[-1]) if marked else None) or words.search(said)
    if found is None:
        return Finding(False, 0.0, "says neither yes nor no")
    if re.match(rf"\s*(?:{HEDGE}|と|か)", said[found.end() :], re.IGNORECASE):
        return Finding(False, 0.4, "leaves it open")
    right = (found.group().lower() in YES) == yes
    return Finding(
        right,
        float(right),
        f"says {found.group()}"
        if right
        else f"says {found.group()}, the opposite of the expected answer",
    )


def judge_choice(expected: str, said: str) -> Finding:
    lead = re.match(r"\(?([A-Ja-j])(?:[).:]|\s*$|\s*\n)", said)
    marked = [m.end() for m in MARKER.finditer(said)]
    pattern = re.compile(r"(?<![A-Za-z])([A-J])(?![A-Za-z'])")
    after = pattern.search(said, marked[-1]) if marked else None
    letters = {m.group(1) for m in pattern.finditer(said)}
    chosen = (
        after.group(1)
        if after
        else lead.group(1).upper()
        if lead
        else letters.pop()
        if len(letters) == 1
        else ""
    )
    if chosen and lead and re.search(rf"\n\s*\(?[A-J][).]|^.{{0,40}}{HEDGE}\s*\(?[A-J]\b", said):
        chosen = ""
    if not chosen:
        return Finding(False, 0.4 * (expected in letters), "chooses no single option")
    return Finding(
        chosen == expected,
        float(chosen == expected),
        f"chooses {chosen}" + ("" if chosen == expected else f", not {expected}"),
    )


def split_items(text: str) -> list[str]:
    """The items of a list of words, each bare; single letters may stand with spaces alone."""
    if re.fullmatch(r"(?:\w )+\w", text):
        return text.casefold().split(" ")
    items = [bare(piece) for piece in re.split(r"[,、;・\n]|\s+and\s+", text.strip("[](){}"))]
    return [item for item in items if item]


def judge_pieces(question: str, expected: list[str], said: str) -> Finding:
    """A list: every expected piece, and no other item."""
    text = LIST_MARK.sub("", said).casefold()
    spans = [
        (m.start(), m.end(), piece)
        for piece in set(expected)
        for m in whole_word(piece).finditer(text)
    ]
    spans.sort()
    letters = all(re.fullmatch("[a-z0-9\u3041-\u30ff]", piece) for piece in expected)
    ordered = letters or re.search(
        r"\bsort|\border\b|\beach\b|順|並|それぞれ", question, re.IGNORECASE
    )
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
        near = SequenceMatcher(None, names[:50], expected, autojunk=False).ratio() * (
            0.8 if extra else 0.95
        )
        if near > best:
            best, why = (
                near,
                f"gives {abbreviated(', '.join(names))}{' and others' if extra else ''}, not {', '.join(expected)}",
            )
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
    after = re.match(
        rf"\s*(?:[,、・/\n]|\band\b|と)\s*(?:and\s*)?{short}\s*(?:$|[,、.。\n・])", text[end:]
    )
    before = re.search(rf"(?:^|[\s:は])(?:{short})\s*(?:[,、・/]|\band)\s*$", text[:start])
    spaced = letters and re.match(r"\s+\w(?:$|\W)", text[end:])
    return bool(after or before or spaced)
