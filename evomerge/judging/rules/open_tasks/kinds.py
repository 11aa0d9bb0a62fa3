"""What kind of task an input is, by its wording: that decides which checks apply."""

from __future__ import annotations

import re

from evomerge.text import sentences

# In this order: the first pattern that the input contains names the kind. What has to be invented
# comes before what has a right answer, because a story's setting may contain questions.
_PATTERNS = {
    "translation": r"翻訳|英訳|和訳して|英語に(?:し|直|訳)|日本語に(?:し|訳)|\btranslate\b",
    "summary": (r"要約して|要約を?(?:より|書|作)|まとめて(?:ください|下さい|$)|\bsummari[sz]e\b"),
    "rewriting": (
        r"言い換えて|書き換えて|パラフレーズ"
        r"|(?:自然な|正しい)[^。\n]{0,8}(?:に|へ)直して|向けて説明して"
        r"|\b(?:rewrite|paraphrase)\b"
    ),
    "creative": (
        r"(?:小説|物語|台本|脚本|詩|広告|セリフ|キャッチコピー|文)を[^。\n]{0,12}(?:書い|書く|考え|作)"
        r"|大喜利|展開を予想|企画|\bwrite an? (?:story|poem|essay)\b"
    ),
    "role play": (
        r"(?:^|\n)[^\s:]{1,12}:\s*$|会話をして|返信して|どのような返事|演じて|なりきって"
    ),
    "order": r"並[びべ]替え|順番に(?:並|し)|昇順|降順|\b(?:sort|reorder|rank)\b",
    "matching": r"ペアを|それぞれの選択肢|対応する(?:数字|意味|記号)|\bmatch each\b",
    "choice": (r"選択肢|選[びんべ]|どちら|どれ(?:です|で|が|を)|いずれ|\b(?:choose|which of)\b"),
    "extraction": r"抽出|書き出し|抜き出|リストアップ|\bextract\b",
    "calculation": (
        r"計算|何[個回分人円本匹枚秒歳冊日]|数式|長さを求め|いくつ|合計"
        r"|\b(?:calculate|how many|how much)\b"
    ),
    "list": r"(?:挙げ|あげ|列挙)て|いくつか|\b(?:list|name) (?:\w+ )?\w+",
}
_KINDS = [(kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _PATTERNS.items()]
_POLAR = re.compile(
    r"(?:ます|です|ました|でしょう|ません|でした|る|い)か[?」。]*$|はいか?.{0,4}いいえ"
)
_POLAR_VERB = re.compile(r"\b(?:is|are|does|do|can|was|will) ", re.IGNORECASE)
_OPEN_WORD = re.compile(
    r"何|なに|どこ|だれ|誰|どの|どち|いつ|なぜ|どう|どれ|いくつ|どんな|とは"
    r"|\b(?:what|which|who|how|why|where|when)\b",
    re.IGNORECASE,
)


_QUESTION = re.compile(r"[?]$|か[。」]?$|いいえで")


def kind_of(question: str) -> str:
    """The kind of a cleaned input: a name of _PATTERNS, "yes or no", or "question" for the rest."""
    kind = ""
    for name, pattern in _KINDS:
        if pattern.search(question):
            kind = name
            break
    if kind in ("", "choice") and is_polar(question):
        return "yes or no"
    return kind or "question"


def is_polar(question: str) -> bool:
    """Whether an input's first question takes yes or no, or any says so (「はいかいいえで」)."""
    asked = [sentence for sentence in sentences(question) if _QUESTION.search(sentence)]
    if not asked:
        return False
    first = asked[0]
    polar = _POLAR.search(first) or (first.endswith("?") and _POLAR_VERB.search(first))
    if polar and not _OPEN_WORD.search(first):
        return True
    return any("いいえ" in sentence for sentence in asked)
