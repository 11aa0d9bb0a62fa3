"""How a task's text becomes the whole text that the model sees.

What a prompt takes from tasks and from a knowledge base is text and nothing else: braces are not
filled in a second time, and what the tokenizer would read as a control token is broken up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from evomerge.answering.chat_template import render_chat
from evomerge.errors import InputError
from evomerge.knowledge.records import Document, Example, KnowledgeClass, render
from evomerge.study import GenerationSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from evomerge.knowledge.chooser import Chooser, TaskKnowledge
    from evomerge.study import PromptSection

# The competition's template; it is tokenised without special tokens.
COMPETITION = "### 指示\n{input}\n### 回答\n"
# Control tokens of common chat templates, for a server, whose tokenizer is unknown.
COMMON = re.compile(
    r"<\|[^<>|]{1,40}\|>|</?s>|\[/?INST\]|<<\/?SYS>>"
    r"|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk|mask)>"
)
TRIED = "1+1は？"  # the task of a prompt that is rendered to see whether it can be
# what an added token that controls looks like; runs of blanks are added tokens too
TOKEN = re.compile(r"\A[<\[].{2,}+(?<=[>\]])")


@dataclass(frozen=True)
class Prompt:
    """The prompt of one task: the whole `text`, its settings, and what comes from the base.

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
    """Renders prompts; special tokens are part of the text, so engines add none.

    With a `chooser`, a task's class gives system text, template, examples and settings, which
    override those of `section` and `generation`; `longest` limits the answers of every class.
    `context` is the engine's.
    """

    tokenizer: PreTrainedTokenizerBase
    section: PromptSection
    generation: GenerationSection = field(default_factory=GenerationSection)
    chooser: Chooser | None = None
    context: int | None = None
    longest: int | None = None
    # every candidate of a search gets the same ones
    _known: dict[str, Prompt] = field(default_factory=dict, repr=False)

    def prepare(self, texts: Sequence[str]) -> list[Prompt]:
        """The prompts of tasks.

        If one leaves no room for its answer, examples are dropped, the least similar first, then
        documents; whether the task itself is refused or cut is up to the engine.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        choices: Sequence[TaskKnowledge | None] = [None] * len(new)
        if self.chooser is not None:
            choices = self.chooser.choose_all(new)
        found = [self._prompt(text, choice) for text, choice in zip(new, choices, strict=True)]
        self._known.update(zip(new, self._fitted(found), strict=True))
        return [self._known[text] for text in texts]

    def render(self, text: str) -> str:
        """The whole prompt of one task."""
        return self.prepare([text])[0].text

    def try_each_kind(self) -> None:
        """Render a prompt of each class, with its examples, or of the plain kind.

        Raises ModelError: the chat template cannot take one of them.
        """
        if self.chooser is None:
            self.render(TRIED)
            return
        for choice in self.chooser.of_each_class():
            self._prompt(TRIED, choice)

    def settings(self, prompts: Sequence[Prompt]) -> list[GenerationSection] | None:
        """Each prompt's own settings; None if all are the run's, so that the engine's apply."""
        settings = [prompt.settings for prompt in prompts]
        if all(own == self.generation for own in settings):
            return None
        return settings

    def shorter(self, prompt: Prompt) -> Prompt | None:
        """The prompt without its least similar example, or else its least similar document.

        None if there is nothing left to drop.
        """
        if prompt.choice is None or not (prompt.examples or prompt.documents):
            return None
        examples, documents = prompt.examples, prompt.documents
        if examples:
            examples = examples[1:]
        else:
            documents = documents[:-1]
        text = self._class_text(prompt.task, prompt.choice.kind, examples, documents)
        return replace(prompt, text=text, examples=examples, documents=documents)

    def noted(self, prompt: Prompt, note: str) -> Prompt:
        """The prompt with one more line of system text, or above the task if it has none."""
        kind = None if prompt.choice is None else prompt.choice.kind
        system = "\n".join(filter(None, (self._system(kind), note)))
        if kind is None:
            return replace(prompt, text=self._whole(self._plain(prompt.task), system))
        kind = replace(kind, system=system)
        text = self._class_text(prompt.task, kind, prompt.examples, prompt.documents)
        return replace(prompt, text=text)

    def _prompt(self, text: str, choice: TaskKnowledge | None) -> Prompt:
        if choice is None:
            return Prompt(text, self._whole(self._plain(text), self._system(None)), self.generation)
        documents: tuple[Document, ...] = ()
        if "{documents}" in choice.kind.template:
            documents = choice.documents
        whole = self._class_text(text, choice.kind, choice.examples, documents)
        return Prompt(text, whole, self._settings(choice.kind), choice, choice.examples, documents)

    def _class_text(
        self,
        text: str,
        kind: KnowledgeClass,
        examples: Sequence[Example],
        documents: Sequence[Document],
    ) -> str:
        """The class's template filled in; examples replace {examples}, or are earlier turns."""
        asked = self._plain(render(kind.template, text, examples, documents))
        turns = []
        if "{examples}" not in kind.template:
            for example in examples:
                question = self._plain(render(kind.template, example.input, ()))
                turns.append((question, self._plain(example.output)))
        return self._whole(asked, self._system(kind), turns)

    def _whole(self, asked: str, system: str, shots: Sequence[tuple[str, str]] = ()) -> str:
        """The format's text of system, earlier (user, assistant) turns and the last user turn."""
        if self.section.format == "chat":
            turns = []
            if system:
                turns.append({"role": "system", "content": system})
            for question, answer in shots:
                turns.append({"role": "user", "content": question})
                turns.append({"role": "assistant", "content": answer})
            turns.append({"role": "user", "content": asked})
            return render_chat(self.tokenizer, turns, self.section.chat_template_kwargs)
        template = self.section.template or COMPETITION
        text = f"{system}\n\n" if system else ""
        for question, answer in shots:
            text += f"{template.replace('{input}', question)}{answer}\n\n"
        return text + template.replace("{input}", asked)

    def _system(self, kind: KnowledgeClass | None) -> str:
        """The class's system text, or else the section's, which is for chat alone."""
        if kind is not None and kind.system.strip():
            return self._plain(kind.system)
        if self.section.format != "chat":
            return ""
        return self.section.system or ""

    def _settings(self, kind: KnowledgeClass) -> GenerationSection:
        """The run's settings with the class's own."""
        own = self.generation
        if kind.max_new_tokens is not None:
            most = kind.max_new_tokens
            if self.longest is not None:
                most = min(most, self.longest)
            if self.context is not None:  # half of a small context is for the prompt
                most = min(most, max(1, self.context // 2))
            own = own.replace(max_new_tokens=most)
        if kind.repetition_penalty is not None:
            own = own.replace(repetition_penalty=kind.repetition_penalty)
        if kind.temperature is not None:
            own = own.replace(
                do_sample=kind.temperature > 0, temperature=kind.temperature or own.temperature
            )
        return own

    def _fitted(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts with room for their answers, as far as there is something to drop."""
        if self.context is None or self.chooser is None:
            return list(prompts)
        lengths = self._lengths([prompt.text for prompt in prompts])
        fitted = []
        for prompt, length in zip(prompts, lengths, strict=True):
            while length + prompt.settings.max_new_tokens > self.context:
                less = self.shorter(prompt)
                if less is None:
                    break
                prompt = less
                (length,) = self._lengths([prompt.text])
            fitted.append(prompt)
        return fitted

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        if not texts:
            return []
        rows = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return list(map(len, rows))

    def _plain(self, text: str) -> str:
        """The text with a space after the first character of whatever reads as a control token."""
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
    """A prompter. Raises InputError for the chat format if the tokenizer has no chat template."""
    if section.format == "chat" and not tokenizer.chat_template:
        raise InputError(
            "the base model's tokenizer has no chat template",
            where="prompt.format",
            found="chat",
            remedy="Use `format: competition`, "
            "or `format: template` with a `template` that contains {input}.",
        )
    return Prompter(
        tokenizer, section, generation or GenerationSection(), chooser, context, longest
    )


def control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """What the tokenizer reads as a special token, or as an added one that looks like it.

    The longest come first.
    """
    added = getattr(tokenizer, "added_tokens_decoder", None)
    if added is None:
        return COMMON
    tokens = {str(token) for token in tokenizer.all_special_tokens}
    for token in added.values():
        if token.special or TOKEN.fullmatch(token.content):
            tokens.add(token.content)
    longest_first = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
