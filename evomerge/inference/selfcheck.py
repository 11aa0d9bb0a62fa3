"""Faults of an answer that show without any knowledge of its subject, and how to ask again.

Everything here prefers to miss a fault over reporting one that is not there: docs/INFERENCE.md has
the rates on graded answers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from evomerge.answering.engine import Answer
from evomerge.text import CJK, clean, foreign_letters, language, repetition, without_list_marks

if TYPE_CHECKING:
    from evomerge.answering.prompts import Prompt
    from evomerge.inference.run import Run
    from evomerge.study import GenerationSection

Faults = tuple[str, ...]
# The most serious first, by what an answer with the fault is worth: GPT-4 turbo grades loops 2.0 of
# 5 and English answers to Japanese tasks 3.2 on average; an answer that is cut has at least begun
# well.
SERIOUS = {"empty": 8, "repetitive": 4, "language": 2, "cut": 1}

LONGEST = 20_000  # characters that are examined, from the end: loops are there
# The share of character n-grams that have occurred before, in the whole answer or in its last TAIL
# characters.
LOOPS, TAIL = 0.5, 400
# Lists and tables repeat their 10-grams but not their 20-grams; a short answer has too few of them.
GRAMS, SHORT_GRAMS, SHORT = 20, 10, 100
# An English answer has a smaller share of Japanese than FOREIGN, and as prose at least PROSE
# different lower-case words.
FOREIGN, PROSE = 0.1, 8
SAMPLING = 0.7  # temperature
MOST_PENALTY, PENALTY_STEP = 1.3, 0.1
LONGEST_ANSWER = 10**7  # tokens, as a study file may set
SEED_STEP = 7919  # farther apart than seeds that users set

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
    r"|translat|japan|\bkan(?:ji|a)\b|haiku|\bcode\b|program|function|script|command"
    r"|regex|\bsql\b|html|css|python|java|json|xml|yaml|latex"
    r"|\bin (?:english|german|french|spanish|italian|chinese|korean|russian|portuguese)\b|language",
    re.IGNORECASE,
)


def faults(answer: Answer, task: str) -> Faults:
    """Which of "empty", "cut", "repetitive" and "language" the answer has; empty excludes others.

    But thoughts that are cut leave no answer and need more room: "empty" and "cut". `task` is the
    task's text.
    """
    raw = _MARKS.sub(" ", answer.text[-LONGEST:])
    text = clean(raw)
    if _NOTHING.fullmatch(text):
        if answer.truncated and answer.thoughts:
            return ("empty", "cut")
        return ("empty",)
    found = {
        "cut": answer.truncated,
        "repetitive": _loops(text, task),
        "language": _is_foreign(clean(_NO_PROSE.sub(" ", raw)), task),
    }
    return tuple(name for name, has in found.items() if has)


def retry_settings(fault: Faults, settings: GenerationSection, attempt: int) -> GenerationSection:
    """The settings to ask again with, always with a new seed; the first `attempt` is 1.

    empty, language: sampling. cut: room for twice as much, unless a loop caused the cut.
    repetitive: a repetition_penalty 0.1 higher with each attempt, at most 1.3, and sampling from
    the second attempt on.
    """
    new = settings.replace(seed=((settings.seed or 0) + SEED_STEP * attempt) % 2**32)
    if "cut" in fault and "repetitive" not in fault:
        longer = settings.max_new_tokens * 2**attempt
        new = new.replace(max_new_tokens=min(longer, LONGEST_ANSWER))
    if "repetitive" in fault:
        own = max(1.0, settings.repetition_penalty)
        raised = min(MOST_PENALTY, round(own + PENALTY_STEP * attempt, 4))
        new = new.replace(repetition_penalty=max(own, raised))
    if "empty" in fault or "language" in fault or ("repetitive" in fault and attempt > 1):
        temperature = settings.temperature if settings.do_sample else SAMPLING
        new = new.replace(do_sample=True, temperature=temperature)
    return new


def retry_system(fault: Faults, task: str) -> str | None:
    """A request for the task's language, for the system text, if the answer is not in it."""
    if "language" not in fault:
        return None
    if _KANA.search(task):
        return "必ず日本語で回答してください。"
    return "Answer in English."


def seriousness(fault: Faults) -> int:
    """How serious the faults are, 0 for none: a more serious one outweighs all lesser ones."""
    return sum(SERIOUS[name] for name in fault)


def asked_for(fault: Faults, kinds: frozenset[str]) -> Faults:
    """The faults for which a task is asked again. A loop that is cut needs no more room."""
    wanted = tuple(name for name in fault if name in kinds)
    if wanted == ("cut",) and "repetitive" in fault:
        return ()
    return wanted


def better(first: Answer, second: Answer, task: str) -> Answer:
    """The answer with the less serious faults, the first of equals."""
    return min(first, second, key=lambda answer: seriousness(faults(answer, task)))


@dataclass(frozen=True)
class SelfCheck:
    """Asks again, at most `attempts` times, where an answer has a fault of `kinds`.

    The better of the two answers is kept.
    """

    kinds: frozenset[str]
    attempts: int = 1

    def __call__(self, run: Run, chosen: dict[int, Answer]) -> str:
        """See Refining in run.py. When the time is up, the first answers are kept."""
        flagged = len(self._flagged(run, chosen))
        for attempt in range(1, self.attempts + 1):
            asked = {}
            for i, fault in self._flagged(run, chosen).items():
                prompt = _again(run, run.prompts[i], fault, attempt)
                if prompt is not None:
                    asked[i] = prompt
            if not asked:
                continue
            for i, answer in run.ask(asked, f"check {attempt}").items():
                chosen[i] = better(chosen[i], answer, run.tasks[i].input)
        left = len(self._flagged(run, chosen))
        kinds = ", ".join(sorted(self.kinds))
        return (
            f"self-check ({kinds}): {flagged} of {len(chosen)} answers had a fault, "
            f"{left} still have one"
        )

    def _flagged(self, run: Run, chosen: dict[int, Answer]) -> dict[int, Faults]:
        """The faults of the answers that are asked again, by task index."""
        flagged = {}
        for i, answer in chosen.items():
            fault = asked_for(faults(answer, run.tasks[i].input), self.kinds)
            if fault:
                flagged[i] = fault
        return flagged


def _again(run: Run, prompt: Prompt, fault: Faults, attempt: int) -> Prompt | None:
    """The prompt to ask again with, its answer cut to the room that the context has.

    None where the context has no room for a longer answer.
    """
    settings = retry_settings(fault, prompt.settings, attempt)
    note = retry_system(fault, prompt.task)
    noted = prompt
    if note:
        noted = run.prompter.noted(prompt, note)
    new = replace(noted, settings=settings)
    if run.engine.context is None:
        return new
    length = len(run.engine.tokenizer([new.text], add_special_tokens=False)["input_ids"][0])
    wanted, before = settings.max_new_tokens, prompt.settings.max_new_tokens
    room = min(wanted, run.engine.context - length)
    if room < 1 or room <= before < wanted:
        return None
    return replace(new, settings=settings.replace(max_new_tokens=room))


def _loops(text: str, task: str) -> bool:
    """Whether a cleaned text repeats itself in a loop without being asked to."""
    if _ASKS_REPEATS.search(task):
        return False
    text = without_list_marks(text)  # a list's numbers differ even where its items repeat
    n = GRAMS if len(text) >= SHORT else SHORT_GRAMS
    return repetition(text, n) > LOOPS or repetition(text[-TAIL:], n) > LOOPS


def _is_foreign(prose: str, task: str) -> bool:
    """Whether a cleaned text without code is clearly not in the language of its task.

    False where the task requests another language.
    """
    if _OTHER_LANGUAGE.search(task):
        return False
    asked, said = _japanese_share(task), _japanese_share(prose)
    if _KANA.search(task) and asked > 0.8:
        if said < FOREIGN:
            return len(set(_WORD.findall(prose))) >= PROSE or language(prose) == "other"
        return language(prose) == "zh" and len(foreign_letters(prose, task)) >= 3
    asked_in_english = asked == 0 and len(_WORD.findall(task)) >= 3
    return asked_in_english and said > 0.8 and len(_KANA.findall(prose)) >= PROSE


def _japanese_share(text: str) -> float:
    """The share of a text's letters; three Latin ones count as one Japanese, as in text.py."""
    japanese, latin = len(_JAPANESE.findall(text)), len(_LETTER.findall(text))
    if japanese + latin == 0:
        return 0.0
    return japanese / (japanese + latin / 3)
