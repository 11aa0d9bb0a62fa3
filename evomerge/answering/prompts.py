"""How a task's text becomes the whole text that the model sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from evomerge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from evomerge.study import PromptSection

# The competition's template; it is tokenised without special tokens.
COMPETITION = "### 指示\n{input}\n### 回答\n"


@dataclass(frozen=True)
class Prompter:
    """Renders prompts; special tokens stand in the text, so engines add none."""

    tokenizer: PreTrainedTokenizerBase
    section: PromptSection

    def render(self, text: str, system: str | None = None) -> str:
        """The prompt for one task. `system` overrides the study file's. Text is put in as it is: braces stay braces."""
        if self.section.format == "competition":
            return COMPETITION.replace("{input}", text)
        if self.section.template is not None:
            return self.section.template.replace("{input}", text)
        system = system or self.section.system
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": text})
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def make_prompter(tokenizer: PreTrainedTokenizerBase, section: PromptSection) -> Prompter:
    """Raises InputError when the chat format is asked of a tokenizer without a chat template."""
    if section.format == "chat" and not tokenizer.chat_template:
        raise InputError(
            "the base model's tokenizer has no chat template",
            where="prompt.format",
            found="chat",
            remedy="Use `format: competition`, or `format: template` with a `template` that holds {input}.",
        )
    return Prompter(tokenizer, section)
