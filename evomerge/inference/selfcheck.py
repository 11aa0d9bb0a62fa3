"""What is wrong with an answer as anybody sees who knows nothing of the task's subject, and with
which settings to ask again.

Everything here would rather miss a fault than see one that is none: docs/INFERENCE.md has the rates
on graded answers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from evomerge.answering.engine import Answer
from evomerge.text import CJK, LIST_MARK, clean, foreign_letters, language, repetition

if TYPE_CHECKING:
    from evomerge.answering.prompts import Prompt
    from evomerge.inference.run import Run
    from evomerge.study import GenerationSection

Faults = tuple[str, ...]
# The most serious first: what an answer is worth that has the fault (GPT-4 turbo grades loops 2.0
# of 5 and English answers to Japanese tasks 3.2 on average); an answer that is cut has at least
# begun well.
SERIOUS = {"empty": 8, "repetitive": 4, "language": 2, "cut": 1}

LONGEST = 20_000  # characters that are looked at, from the end: loops are there
# share of character n-grams that have occurred before, in all of an answer or in its last
# characters
LOOPS, TAIL = 0.5, 400
# n; lists and tables repeat their 10-grams but not their 20-grams, a short answer has too few
GRAMS, SHORT_GRAMS, SHORT = 20, 10, 100
# share of Japanese in an answer in English, different words in small letters that make it prose
FOREIGN, PROSE = 0.1, 8
SAMPLING = 0.7  # temperature
MOST_PENALTY, PENALTY_STEP = 1.3, 0.1
SEED_STEP = 7919  # no seed that somebody sets is this far from another

_NOTHING = re.compile(r"[\s\u200b-\u200f\ufeff。、.,…・:;\"'`「」|*#_~-]*")
_MARKS = re.compile(r"<\|[^<>|]{1,40}\|>|</?s>")  # turn marks that a model has written out
_NO_PROSE = re.compile(r"```.*?(?:```|$)|`[^`\n]*`|https?://\S+", re.DOTALL)
_JAPANESE = re.compile(f"[{CJK}]")
_KANA = re.compile(r"[\u3041-\u30ff]")
_LETTER = re.compile(r"[A-Za-z]")
_WORD = re.compile(r"(?<![A-Za-z])[a-z]{2,}(?![A-Za-z])")
_ASKS_REPEATS = re.compile(
    r"繰り?返|くり返|連呼|回書|回言|\brepeat|\btimes\b|\bover and over\b", re.IGNORECASE
)
# Tasks whose answer may be in another language than they are: translations, foreign words, code.
_OTHER_LANGUAGE = re.compile(
    r"英[語訳文単作会字和検]|和英|[一-龠ァ-ヿ]{1,6}(?<!日本)語[でにへをのと]|翻訳|[和直意仏独]訳|訳[しすせをはで]|ローマ字|アルファベット|多言語|言語"
    r"|コード|コマンド|プログラ|関数|スクリプト|正規表現|クエリ|数式|ソース|変換"
    r"|translat|japan|\bkan(?:ji|a)\b|haiku|\bcode\b|program|function|script|command|regex|\bsql\b|html|css|python|java|json|xml|yaml|latex"
    r"|\bin (?:english|german|french|spanish|italian|chinese|korean|russian|portuguese)\b|language",
    re.IGNORECASE,
)


def faults(answer: Answer, task: str) -> Faults:
    """Of "empty", "cut", "repetitive" and "language", those that the answer to a task's text has;
    an empty one has no other.
    """
    raw = _MARKS.sub(" ", answer.text[-LONGEST:])
    text = clean(raw)
    if _NOTHING.fullmatch(text):
        return ("empty",)
    found = {
        "cut": answer.truncated,
        "repetitive": _loops(text, task),
        "language": _is_foreign(clean(_NO_PROSE.sub(" ", raw)), task),
    }
    return tuple(name for name, has in found.items() if has)


def retry_settings(fault: Faults, settings: GenerationSection, attempt: int) -> GenerationSection:
    """How to ask again, `attempt` 1 for the first time; always with another seed than before.

    empty, language: sampling. cut: room for twice as much, unless it is cut because it goes round
    in a loop. repetitive: a repetition_penalty 0.1 higher with each attempt, at most 1.3, and from
    the second on also sampling.
    """
    new = settings.replace(seed=(settings.seed or 0) + SEED_STEP * attempt)
    if "cut" in fault and "repetitive" not in fault:
        new = new.replace(max_new_tokens=settings.max_new_tokens * 2**attempt)
    if "repetitive" in fault:
        own = max(1.0, settings.repetition_penalty)
        new = new.replace(
            repetition_penalty=max(own, min(MOST_PENALTY, round(own + PENALTY_STEP * attempt, 4))),
        )
    if "empty" in fault or "language" in fault or ("repetitive" in fault and attempt > 1):
        new = new.replace(
            do_sample=True,
            temperature=settings.temperature if settings.do_sample else SAMPLING,
        )
    return new


def retry_system(fault: Faults, task: str) -> str | None:
    """A sentence for the system text that asks for the task's language, where the answer was in
    another.
    """
    if "language" not in fault:
        return None
    return "必ず日本語で回答してください。" if _KANA.search(task) else "Answer in English."


def seriousness(fault: Faults) -> int:
    """0 for none; a more serious fault counts more than all lesser ones together."""
    return sum(SERIOUS[name] for name in fault)


def asked_for(fault: Faults, kinds: frozenset[str]) -> Faults:
    """Those of an answer's faults for which it is asked again. A loop that is cut needs no more
    room.
    """
    wanted = tuple(name for name in fault if name in kinds)
    return () if wanted == ("cut",) and "repetitive" in fault else wanted


def better(first: Answer, second: Answer, task: str) -> Answer:
    """The answer with the less serious faults, the first of equals."""
    return second if seriousness(faults(second, task)) < seriousness(faults(first, task)) else first


@dataclass(frozen=True)
class SelfCheck:
    """Asks again, `attempts` times at most, for answers that have one of `kinds` of faults, and
    keeps the better ones.
    """

    kinds: frozenset[str]
    attempts: int = 1

    def __call__(self, run: Run, chosen: dict[int, Answer]) -> str:
        """As inference/run.py's Refining. An answer for which the time was too short stays the
        first one.
        """
        flagged = len(self._flagged(run, chosen))
        for attempt in range(1, self.attempts + 1):
            asked = {
                i: new
                for i, fault in self._flagged(run, chosen).items()
                if (new := _again(run, run.prompts[i], fault, attempt))
            }
            answers = run.ask(asked, f"check {attempt}") if asked else {}
            for i, answer in answers.items():
                chosen[i] = better(chosen[i], answer, run.tasks[i].input)
        left = len(self._flagged(run, chosen))
        return f"self-check ({', '.join(sorted(self.kinds))}): {flagged} of {len(chosen)} answers had a fault, {left} still have"

    def _flagged(self, run: Run, chosen: dict[int, Answer]) -> dict[int, Faults]:
        found = {
            i: asked_for(faults(answer, run.tasks[i].input), self.kinds)
            for i, answer in chosen.items()
        }
        return {i: fault for i, fault in found.items() if fault}


def _again(run: Run, prompt: Prompt, fault: Faults, attempt: int) -> Prompt | None:
    """The prompt to ask again with, cut to the room that the context has; None where there is none
    for a longer answer.
    """
    settings = retry_settings(fault, prompt.settings, attempt)
    note = retry_system(fault, prompt.task)
    new = replace(run.prompter.noted(prompt, note) if note else prompt, settings=settings)
    if run.engine.context is None:
        return new
    length = len(run.engine.tokenizer([new.text], add_special_tokens=False)["input_ids"][0])
    wanted, before = settings.max_new_tokens, prompt.settings.max_new_tokens
    room = min(wanted, run.engine.context - length)
    if room < 1 or room <= before < wanted:
        return None
    return replace(new, settings=settings.replace(max_new_tokens=room))


def _loops(text: str, task: str) -> bool:
    """Whether a cleaned text goes round in a loop, and was not asked to."""
    if _ASKS_REPEATS.search(task):
        return False
    text = LIST_MARK.sub("", text)  # a list's numbers go on while its items are the same
    n = GRAMS if len(text) >= SHORT else SHORT_GRAMS
    return repetition(text, n) > LOOPS or repetition(text[-TAIL:], n) > LOOPS


def _is_foreign(prose: str, task: str) -> bool:
    """Whether a cleaned text without code is plainly in another language than its task, which asks
    for none.
    """
    if _OTHER_LANGUAGE.search(task):
        return False
    asked, said = _japanese_share(task), _japanese_share(prose)
    if _KANA.search(task) and asked > 0.8:
        if said < FOREIGN:
            return len(set(_WORD.findall(prose))) >= PROSE or language(prose) == "other"
        return language(prose) == "zh" and len(foreign_letters(prose, task)) >= 3
    return (
        asked == 0
        and len(_WORD.findall(task)) >= 3
        and said > 0.8
        and len(_KANA.findall(prose)) >= PROSE
    )


def _japanese_share(text: str) -> float:
    """Of a text's letters, three Latin ones counting as one Japanese, as in judging/text.py."""
    japanese, latin = len(_JAPANESE.findall(text)), len(_LETTER.findall(text))
    return japanese / (japanese + latin / 3) if japanese or latin else 0.0
