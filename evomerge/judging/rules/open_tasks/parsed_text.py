"""The conclusion of a text: its final sentence, the words and quotations in it, yes or no."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from evomerge.text import QUOTED, TERM, sentences

_CONCLUDES = re.compile(
    r"よって|従って|したがって|ゆえに|つまり|以上(?:より|から|のこと)|結論"
    r"|(?:答え?|正解|解答|回答|結果)[はが:]|そのため、|適切|最終的|ふさわし|相応し"
    r"|\b(?:therefore|thus|hence|so the|the answer)\b",
    re.IGNORECASE,
)
_THEREFORE = re.compile(
    r"よって|従って|したがって|ゆえに|結論|\b(?:therefore|thus|hence)\b", re.IGNORECASE
)
_ANNOUNCES = re.compile(
    r"(?:考えます|考えてみます|整理します|示します|以下の(?:よう|通り|とおり)|説明します|想像します"
    r"|してみます|行います|あげます|次のよう)|^(?:わかり|分かり|かしこまり|承知)"
)
YES_OR_NO = re.compile(
    r"(?<![ぁ-ん])(?:いいえ|いえ、|はい(?![ぁ-ん]))|違います|そうです|\b(?:yes|no)\b", re.IGNORECASE
)
_NO_WORDS = frozenset(["いいえ", "いえ、", "違います", "no"])
_DENIES = re.compile(
    r"(?:ません|ないです|ない|ずに)"
    r"(?:でした|でしょう|と(?:考え|思|い|言)|ん|という|こと|もの|ため|が、|。|、|」|$)"
    r"|不適切|正しくない|誤り|間違|不可能"
    r"|\b(?:not|cannot|never)\b|n't\b"
)
_COMMON = frozenset(
    re.findall(
        r"\S+",
        "場合 以下 考慮 適切 意味 選択肢 文章 理由 回答 正解 答 文中 可能性 内容 言葉 表現 "
        "次 上記 質問 説明 以上 一般的 最 必要 対応 相応",
    )
)


@dataclass(frozen=True, eq=False)
class ParsedText:
    """A cleaned text and its parts, each computed when it is first needed."""

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
        """The places of answers: first sentence, last two conclusions, last sentence."""
        return " ".join([*self.body[:1], *self.conclusions[-2:], *self.sentences[-1:]])

    @cached_property
    def compact(self) -> str:
        """The text without white space, × and ÷ as * and /."""
        return compact(self.text)

    def polarity(self, verb: str) -> int:
        """1 for yes, -1 for no, 0 when neither is said.

        はい or いいえ decides; without them, whether the first claim about `verb` is a negation.
        """
        opening = self.body[:2]
        for sentence in opening:
            word = YES_OR_NO.search(sentence)
            if word:
                if word.group().lower() in _NO_WORDS:
                    return -1
                return 1
        claim = self._claim_about(verb, [s for s in opening if len(s) >= 4])
        if claim is None:
            return 0
        if _DENIES.search(claim):
            return -1
        return 1

    def _claim_about(self, verb: str, opening: list[str]) -> str | None:
        """The last conclusion about a verb, or else the opening sentence about it, or any."""
        if verb:
            for sentence in reversed(self.conclusions):
                if verb in sentence and _THEREFORE.search(sentence):
                    return sentence
        for sentence in opening:
            if verb in sentence:
                return sentence
        if opening:
            return opening[0]
        return None

    @property
    def conclusion(self) -> str:
        """The last conclusion, or else the first sentence that says something, or any first."""
        found = self.conclusions[-1:] or self.body[:1] or self.sentences[:1]
        if found:
            return found[0]
        return ""


# (-1 to 1, why): made by a check, which is made once for a task and looks at each answer
CheckResult = tuple[float, str]
Check = Callable[[ParsedText], CheckResult]


def compact(text: str) -> str:
    """`text` without white space, × and ÷ as * and /."""
    return re.sub(r"\s", "", text).replace("×", "*").replace("÷", "/")


def key_words(sentence: str, question: str) -> dict[str, float]:
    """The content words of a sentence with their weights.

    A quotation weighs 2, a word that the question lacks 1, and one that it has 0.4.
    """
    weights = dict.fromkeys(QUOTED.findall(sentence), 2.0)
    for word in TERM.findall(sentence):
        if word not in _COMMON:
            weights.setdefault(word, 0.4 if word in question else 1.0)
    return weights


def weighted_share(words: dict[str, float], text: str) -> float:
    """The weighted share of the words that a text holds; 0.5 without any words to look for."""
    total = sum(words.values())
    if not total:
        return 0.5
    return sum(weight for word, weight in words.items() if word in text) / total
