"""How a task's text becomes the whole text that the model sees.

What a prompt holds of tasks and of a knowledge base is text and nothing else: braces are not filled
a second time, and what the tokenizer would read as a control token is broken up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from evomerge.errors import InputError
from evomerge.knowledge.records import Document, Example, KnowledgeClass, render
from evomerge.study import GenerationSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from evomerge.knowledge.chooser import Chooser, TaskKnowledge
    from evomerge.study import PromptSection

# The competition's template; it is tokenised without special tokens.
COMPETITION = "### 指示\n{input}\n### 回答\n"
# Control tokens of common chat templates, for a server, whose tokenizer nobody sees.
COMMON = re.compile(
    r"<\|[^<>|]{1,40}\|>|</?s>|\[/?INST\]|<<\/?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk|mask)>"
)
# what an added token that steers looks like; runs of blanks are added tokens too
TOKEN = re.compile(r"[<\[].+[>\]]")


@dataclass(frozen=True)
class Prompt:
    """The prompt of one task: the whole `text`, how it is answered, and what a knowledge base gave
    to it.

    `examples` and `documents` are those that had room, in the order of the choice.
    """

    task: str
    text: str
    settings: GenerationSection
    choice: TaskKnowledge | None = None
    examples: tuple[Example, ...] = ()
    documents: tuple[Document, ...] = ()


@dataclass(frozen=True)
class Prompter:
    """Renders prompts; special tokens stand in the text, so engines add none.

    With a `chooser`, a task's class gives system text, template, examples and settings, which go
    before those of `section` and `generation`; `longest` is the most that any class may answer.
    `context` is the engine's.
    """

    tokenizer: PreTrainedTokenizerBase
    section: PromptSection
    generation: GenerationSection = field(default_factory=GenerationSection)
    chooser: Chooser | None = None
    context: int | None = None
    longest: int | None = None
    # every candidate of a search asks the same ones
    _known: dict[str, Prompt] = field(default_factory=dict, repr=False)

    def prepare(self, texts: Sequence[str]) -> list[Prompt]:
        """The prompts of tasks. Where one leaves no room for its answer, examples are dropped, the
        least similar first, then documents; the task itself is the engine's to refuse or to cut.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        choices: Sequence[TaskKnowledge | None] = (
            [None] * len(new) if self.chooser is None else self.chooser.choose_all(new)
        )
        found = [self._prompt(text, choice) for text, choice in zip(new, choices, strict=True)]
        self._known.update(zip(new, self._fitted(found), strict=True))
        return [self._known[text] for text in texts]

    def render(self, text: str) -> str:
        """The whole prompt of one task."""
        return self.prepare([text])[0].text

    def settings(self, prompts: Sequence[Prompt]) -> list[GenerationSection] | None:
        """Each prompt's own settings; None where none differ from the run's, so that the engine's
        hold.
        """
        return (
            None
            if all(p.settings == self.generation for p in prompts)
            else [p.settings for p in prompts]
        )

    def shorter(self, prompt: Prompt) -> Prompt | None:
        """Without the least similar example, or else without the least similar document; None:
        there is nothing to drop.
        """
        if prompt.choice is None or not (prompt.examples or prompt.documents):
            return None
        examples, documents = prompt.examples, prompt.documents
        examples, documents = (examples[1:], documents) if examples else (examples, documents[:-1])
        return replace(
            prompt,
            text=self._class_text(prompt.task, prompt.choice.kind, examples, documents),
            examples=examples,
            documents=documents,
        )

    def noted(self, prompt: Prompt, note: str) -> Prompt:
        """The prompt with one more line of system text, or above the task where there is none."""
        kind = None if prompt.choice is None else prompt.choice.kind
        if kind is None:
            return replace(
                prompt,
                text=self._whole(
                    self._plain(prompt.task), "\n".join(filter(None, (self._system(None), note)))
                ),
            )
        kind = replace(kind, system="\n".join(filter(None, (self._system(kind), note))))
        return replace(
            prompt, text=self._class_text(prompt.task, kind, prompt.examples, prompt.documents)
        )

    def _prompt(self, text: str, choice: TaskKnowledge | None) -> Prompt:
        if choice is None:
            return Prompt(text, self._whole(self._plain(text), self._system(None)), self.generation)
        documents = choice.documents if "{documents}" in choice.kind.template else ()
        whole = self._class_text(text, choice.kind, choice.examples, documents)
        return Prompt(text, whole, self._settings(choice.kind), choice, choice.examples, documents)

    def _class_text(
        self,
        text: str,
        kind: KnowledgeClass,
        examples: Sequence[Example],
        documents: Sequence[Document],
    ) -> str:
        """By the class's template; its examples stand in it where it says {examples}, else they are
        turns before the task.
        """
        asked = self._plain(render(kind.template, text, examples, documents))
        shots = [] if "{examples}" in kind.template else examples
        turns = [
            (self._plain(render(kind.template, e.input, ())), self._plain(e.output)) for e in shots
        ]
        return self._whole(asked, self._system(kind), turns)

    def _whole(self, asked: str, system: str, shots: Sequence[tuple[str, str]] = ()) -> str:
        """The format's text of system, earlier (user, assistant) turns and the last user turn."""
        if self.section.format == "chat":
            turns = [{"role": "system", "content": system}] if system else []
            for question, answer in shots:
                turns += [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
            turns.append({"role": "user", "content": asked})
            return self._chat(turns)
        template = self.section.template or COMPETITION
        blocks = [f"{system}\n\n"] if system else []
        blocks += [
            f"{template.replace('{input}', question)}{answer}\n\n" for question, answer in shots
        ]
        return "".join(blocks) + template.replace("{input}", asked)

    def _chat(self, turns: list[dict[str, str]]) -> str:
        """By the model's template; one that knows no system turn gets the text above the first user
        turn.
        """
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=True
                )
            )
        except TemplateError:
            if turns[0]["role"] != "system":
                raise
            first = {"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
            return str(
                self.tokenizer.apply_chat_template(
                    [first, *turns[2:]], tokenize=False, add_generation_prompt=True
                )
            )

    def _system(self, kind: KnowledgeClass | None) -> str:
        """The class's system text, or else the section's, which stands for chat alone."""
        if kind is not None and kind.system.strip():
            return self._plain(kind.system)
        return (self.section.system or "") if self.section.format == "chat" else ""

    def _settings(self, kind: KnowledgeClass) -> GenerationSection:
        """The run's settings with the class's own."""
        own = self.generation
        if kind.max_new_tokens is not None:
            most = [
                kind.max_new_tokens,
                self.longest,
                None if self.context is None else max(1, self.context // 2),
            ]
            # half of a small context is for the prompt
            own = own.replace(max_new_tokens=min(n for n in most if n is not None))
        if kind.repetition_penalty is not None:
            own = own.replace(repetition_penalty=kind.repetition_penalty)
        if kind.temperature is not None:
            own = own.replace(
                do_sample=kind.temperature > 0, temperature=kind.temperature or own.temperature
            )
        return own

    def _fitted(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Each with room for its answer, as far as there is something to drop."""
        if self.context is None or self.chooser is None:
            return list(prompts)
        lengths = self._lengths([prompt.text for prompt in prompts])
        fitted = []
        for prompt, length in zip(prompts, lengths, strict=True):
            while (
                length + prompt.settings.max_new_tokens > self.context
                and (less := self.shorter(prompt)) is not None
            ):
                prompt, (length,) = less, self._lengths([less.text])
            fitted.append(prompt)
        return fitted

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        return (
            [len(row) for row in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
            if texts
            else []
        )

    def _plain(self, text: str) -> str:
        """The text with a space behind the first character of what would be read as a control
        token.
        """
        return self._control.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        return control_tokens(self.tokenizer)


def make_prompter(
    tokenizer: PreTrainedTokenizerBase,
    section: PromptSection,
    generation: GenerationSection | None = None,
    chooser: Chooser | None = None,
    context: int | None = None,
    longest: int | None = None,
) -> Prompter:
    """Raises InputError when the chat format is asked of a tokenizer without a chat template."""
    if section.format == "chat" and not tokenizer.chat_template:
        raise InputError(
            "the base model's tokenizer has no chat template",
            where="prompt.format",
            found="chat",
            remedy="Use `format: competition`, or `format: template` with a `template` that holds {input}.",
        )
    return Prompter(
        tokenizer, section, generation or GenerationSection(), chooser, context, longest
    )


def control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """What the tokenizer reads as one of its special tokens, or as an added one that looks like it,
    longest first.
    """
    added = getattr(tokenizer, "added_tokens_decoder", None)
    if added is None:
        return COMMON
    tokens = {str(token) for token in tokenizer.all_special_tokens}
    tokens |= {
        token.content for token in added.values() if token.special or TOKEN.fullmatch(token.content)
    }
    tokens = {token for token in tokens if len(token) > 1}
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")
