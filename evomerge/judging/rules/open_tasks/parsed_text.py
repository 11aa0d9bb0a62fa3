"""ParsedText a text for what it concludes: its final sentence, the words and quotations in it, yes or
no.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from evomerge.text import QUOTED, TERM, sentences

_CONCLUDES = re.compile(
    r"よって|従って|したがって|ゆえに|つまり|以上(?:より|から|のこと)|結論|(?:答え?|正解|解答|回答|結果)[はが:]|そのため、|適切|最終的|ふさわし|相応し"
    r"|\b(?:therefore|thus|hence|so the|the answer)\b",
    re.IGNORECASE,
)
_THEREFORE = re.compile(
    r"よって|従って|したがって|ゆえに|結論|\b(?:therefore|thus|hence)\b", re.IGNORECASE
)
_ANNOUNCES = re.compile(
    r"(?:考えます|考えてみます|整理します|示します|以下の(?:よう|通り|とおり)|説明します|想像します|してみます|行います|あげます|次のよう)|^(?:わかり|分かり|かしこまり|承知)"
)
YES_OR_NO = re.compile(
    r"(?<![ぁ-ん])(?:いいえ|いえ、|はい(?![ぁ-ん]))|違います|そうです|\b(?:yes|no)\b", re.IGNORECASE
)
_NO_WORDS = frozenset(["いいえ", "いえ、", "違います", "no"])
_DENIES = re.compile(
    r"(?:ません|ないです|ない|ずに)(?:でした|でしょう|と(?:考え|思|い|言)|ん|という|こと|もの|ため|が、|。|、|」|$)|不適切|正しくない|誤り|間違|不可能"
    r"|\b(?:not|cannot|never)\b|n't\b"
)
_COMMON = frozenset(
    re.findall(
        r"\S+",
        "場合 以下 考慮 適切 意味 選択肢 文章 理由 回答 正解 答 文中 可能性 内容 言葉 表現 次 上記 質問 説明 以上 一般的 最 必要 対応 相応",
    )
)


@dataclass(frozen=True, eq=False)
class ParsedText:
    """A cleaned text and its parts, each worked out when it is first asked for."""

    text: str

    @cached_property
    def sentences(self) -> list[str]:
        """Sentences and lines."""
        return sentences(self.text)

    @cached_property
    def body(self) -> list[str]:
        """The sentences that say something rather than announce what follows."""
        return [s for s in self.sentences if not _ANNOUNCES.search(s)]

    @cached_property
    def conclusions(self) -> list[str]:
        """The sentences that draw a conclusion."""
        return [s for s in self.sentences if _CONCLUDES.search(s)]

    @cached_property
    def head(self) -> str:
        """The first two sentences that say something."""
        return " ".join(self.body[:2])

    @cached_property
    def ends(self) -> str:
        """Where an answer stands: the first sentence, the last two conclusions, the last sentence."""
        return " ".join([*self.body[:1], *self.conclusions[-2:], *self.sentences[-1:]])

    @cached_property
    def compact(self) -> str:
        """The text without white space, × and ÷ as * and /."""
        return compact(self.text)

    def polarity(self, verb: str) -> int:
        """1 for yes, -1 for no, 0 when nothing is said: はい or いいえ first, else whether what is said
        of `verb` denies.
        """
        for sentence in self.body[:2]:
            word = YES_OR_NO.search(sentence)
            if word:
                return -1 if word.group().lower() in _NO_WORDS else 1
        claims = (
            [s for s in self.conclusions[::-1] if verb in s and _THEREFORE.search(s)]
            if verb
            else []
        )
        claims += [s for s in self.body[:2] if len(s) >= 4 and verb in s] + [
            s for s in self.body[:2] if len(s) >= 4
        ]
        if not claims:
            return 0
        return -1 if _DENIES.search(claims[0]) else 1

    @property
    def conclusion(self) -> str:
        """The last sentence that concludes, else the first that says something, else the first."""
        found = self.conclusions[-1:] or self.body[:1] or self.sentences[:1]
        return found[0] if found else ""


def compact(text: str) -> str:
    """`text` without white space, × and ÷ as * and /."""
    return re.sub(r"\s", "", text).replace("×", "*").replace("÷", "/")


def key_words(sentence: str, question: str) -> dict[str, float]:
    """The words that carry a sentence with their weights: a quotation 2, a word that the question
    lacks 1, one it has 0.4.
    """
    weights = dict.fromkeys(QUOTED.findall(sentence), 2.0)
    for word in TERM.findall(sentence):
        if word not in _COMMON:
            weights.setdefault(word, 0.4 if word in question else 1.0)
    return weights


def weighted_share(words: dict[str, float], text: str) -> float:
    """The weighted weighted_share of the words that a text holds; a half when there are no words to look
    for.
    """
    total = sum(words.values())
    return sum(weight for word, weight in words.items() if word in text) / total if total else 0.5
