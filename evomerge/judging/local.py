"""The local judge: a model in this process, for users without a server.

The grade is the expectation of the digits 1 to 5 under the softmax of their log-likelihoods: even a
weak model that would always write 3 shows by its uncertainty which of two answers is better.
Nothing is sampled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from evomerge.answering.servers.openai_protocol import whole
from evomerge.errors import EngineError, JudgeError, ModelError, StudyFileError
from evomerge.judging.grade import Grade
from evomerge.judging.llm.judge_prompt import EXAMPLE, GRADES, RUBRIC, Rubric
from evomerge.tasks import Task

if TYPE_CHECKING:
    from evomerge.answering.engine import Answer
    from evomerge.study import EngineSection, JudgeSection

VERSION = "1"
_ASKED = "上の回答を採点してください。"
# the rubric without its request for a reason and JSON, because the digit has to come first
TEMPLATE = (
    RUBRIC.partition(_ASKED)[0]
    + _ASKED
    + "説明や記号を付けず、点数を表す1から5の数字を一つだけ返してください。"
)
# the judge's turn begins with it; a full-width colon, which no tokenizer merges with a digit
LEAD = "点数："
ROOM = 8  # tokens kept free for the digit
AT_ONCE = 256  # answers whose tokens are in memory together
_VISIBLE = re.compile(r"[^\s\u200b\ufeff]")


class DigitModel(Protocol):
    """What the judge needs from an engine."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def context(self) -> int | None: ...

    @property
    def fingerprint(self) -> str: ...

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[float]: ...

    def length(self, prompt: str) -> int: ...

    def can_write(self, prompt: str, continuation: str) -> bool: ...


class LocalJudge:
    """Grades 1.0 to 5.0 by the engine that it is given; `correct` is always None."""

    def __init__(self, engine: DigitModel, model: str, template: str | None = None) -> None:
        """Check that the model can judge; `model` is its name.

        Raises ModelError: no digits in the vocabulary, or a context or chat template that does not
        take the rubric.
        """
        self.engine = engine
        self.model = model
        self.rubric = Rubric(template or TEMPLATE)
        self.name = f"local:{Path(model).name}"
        parts = [VERSION, LEAD, engine.fingerprint, self.rubric.digest]
        self.version = sha256("\n".join(parts).encode()).hexdigest()[:12]
        prompt = self._prompt(EXAMPLE, "2", False)
        if not self._fits(prompt):
            raise ModelError(
                f"cannot judge: the rubric and the shortest task are {engine.length(prompt)} "
                "tokens, more than its context",
                where=model,
                found=engine.context,
                remedy="Use another model as the judge.",
            )
        lacking = [digit for digit in map(str, GRADES) if not engine.can_write(prompt, digit)]
        if lacking:
            raise ModelError(
                "cannot judge: its vocabulary lacks digits",
                where=model,
                found=" ".join(lacking),
                remedy="Use another model as the judge.",
            )

    def grade(self, task: Task, answer: Answer) -> Grade:
        """Grade one answer. Raises as `grade_all`."""
        return self.grade_all([task], [answer])[0]

    def grade_all(self, tasks: Sequence[Task], answers: Sequence[Answer]) -> list[Grade]:
        """Grade answers in batches of similar length.

        Raises JudgeError: out of memory, or a task too long for the judge's context.
        """
        pairs = list(zip(tasks, answers, strict=True))
        grades = [Grade(1.0, None, "answer without a word")] * len(pairs)
        spoken = [i for i, (_, answer) in enumerate(pairs) if _VISIBLE.search(answer.text)]
        try:
            for start in range(0, len(spoken), AT_ONCE):
                self._grade_some(pairs, spoken[start : start + AT_ONCE], grades)
        except EngineError as error:  # the judge fails, not the candidate
            raise JudgeError(
                f"the local judge failed: {error.what}", where=self.model, remedy=error.remedy
            ) from error
        return grades

    def prompt(self, task: Task, answer: Answer) -> str:
        """The whole text before the digit.

        An answer that does not fit the context is cut, and the prompt says so.
        """
        text = whole(answer.text)
        prompt = self._prompt(task, text, answer.truncated)
        if self._fits(prompt):
            return prompt
        if not self._fits(self._prompt(task, "", True)):
            raise JudgeError(
                f"task {task.task_id} with its reference does not fit the judge's context of "
                f"{self.engine.context} tokens",
                where=self.model,
                remedy="Use a judge with a longer context.",
            )
        low = 0  # a length that fits
        high = len(text)  # one that does not
        while high - low > 1:
            middle = (low + high) // 2
            if self._fits(self._prompt(task, text[:middle], True)):
                low = middle
            else:
                high = middle
        return self._prompt(task, text[:low], True)

    def _grade_some(
        self, answered: Sequence[tuple[Task, Answer]], part: Sequence[int], grades: list[Grade]
    ) -> None:
        """Put the grades of the answers at the places `part` into `grades`."""
        pairs = []
        for i in part:
            prompt = self.prompt(*answered[i])
            pairs += [(prompt, str(digit)) for digit in GRADES]
        found = self.engine.loglikelihood(pairs)
        for place, i in enumerate(part):
            first = place * len(GRADES)
            grades[i] = self._grade(found[first : first + len(GRADES)])

    def _fits(self, prompt: str) -> bool:
        context = self.engine.context
        return context is None or self.engine.length(prompt) + ROOM <= context

    def _prompt(self, task: Task, text: str, truncated: bool) -> str:
        messages = self.rubric.messages(task, text, truncated)
        return as_prompt(self.engine.tokenizer, messages, self.model) + LEAD

    def _grade(self, logs: Sequence[float]) -> Grade:
        """The mean of the digits under the softmax of their five log-likelihoods."""
        top = max(logs)
        if not math.isfinite(top):
            raise JudgeError(
                "the model's likelihoods are not numbers",
                where=self.model,
                found=top,
                remedy="Check the model's weights.",
            )
        odds = [math.exp(value - top) for value in logs]
        shares = [value / sum(odds) for value in odds]
        by_grade = dict(zip(GRADES, shares, strict=True))
        value = sum(grade * share for grade, share in by_grade.items())
        told = ", ".join(f"{grade}: {share:.3f}" for grade, share in by_grade.items())
        held = sum(map(math.exp, logs))
        return Grade(
            round(min(5.0, max(1.0, value)), 6),
            None,
            f"probabilities {told} (all five: {held:.3g} of what may come next)",
        )


def make_local_judge(section: JudgeSection, engine: EngineSection | None = None) -> LocalJudge:
    """The judge of `section.model`, a folder or hub name.

    `engine` says how it is loaded (device, 4 bits, batches); its kind is ignored. Raises
    StudyFileError without a model, ModelError, EngineError.
    """
    if section.model is None:
        raise StudyFileError(
            "the local judge needs a model", where="judge.model", remedy="Name a model folder."
        )
    from evomerge.answering.hf.likelihood import open_likelihood_engine

    return LocalJudge(
        open_likelihood_engine(section.model, engine), section.model, section.template
    )


def as_prompt(tokenizer: Any, messages: Sequence[dict[str, str]], where: str) -> str:
    """The turns in the tokenizer's chat template, up to the beginning of the judge's turn.

    Without a chat template they follow each other as plain text. Where the template has no system
    turn, its text opens the user's. Raises ModelError.
    """
    joined = "\n\n".join(message["content"] for message in messages)
    if not tokenizer.chat_template:
        return _first_token(tokenizer) + joined + "\n\n"
    reason = "it leaves out what it is given"
    for turns in (list(messages), [{"role": "user", "content": joined}]):
        try:
            text = str(
                tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
                )
            )
        except Exception as error:  # raise_exception, and whatever an expression can raise
            reason = str(error) or type(error).__name__
            continue
        if all(message["content"].strip() in text for message in messages):
            if text.rstrip().endswith("<think>"):
                text += "\n</think>\n\n"
            return text
    raise ModelError(
        f"its chat template does not take the rubric: {reason[:300]}",
        where=where,
        remedy="Use another model as the judge.",
    )


def _first_token(tokenizer: Any) -> str:
    """The token, as text, that the tokenizer puts at the start of every text, if any."""
    first = tokenizer("")["input_ids"][:1]
    if first and first[0] == tokenizer.bos_token_id:
        return str(tokenizer.bos_token)
    return ""
