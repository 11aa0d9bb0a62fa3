"""What a knowledge base consists of, whatever file it came from, and how a template is filled."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256

PLACEHOLDER = re.compile(r"\{(input|examples|documents)\}")


@dataclass(frozen=True)
class KnowledgeClass:
    """A kind of task with its prompt and settings.

    `system` may be empty; `template` holds `{input}` and optionally `{examples}` and `{documents}`.
    Settings that the base leaves open are None: then those of the run apply. `shots` is the number
    of examples, `quotes` that of documents.
    """

    name: str
    system: str
    template: str
    description: str = ""
    max_new_tokens: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    shots: int | None = None
    quotes: int | None = None


@dataclass(frozen=True)
class Example:
    """A task with a good answer.

    `row` is its row in the sheet, as Excel shows it, and serves as its id. In YAML, the first
    example is row 2, as it would be in a sheet.
    """

    row: int
    class_name: str
    input: str
    output: str
    weight: float = 1.0


@dataclass(frozen=True)
class Document:
    """A text to quote; `row` is as in an example."""

    row: int
    title: str
    text: str


@dataclass(frozen=True)
class Knowledge:
    """A whole base; class names are unique, and every example belongs to one of the classes."""

    classes: tuple[KnowledgeClass, ...]
    examples: tuple[Example, ...]
    documents: tuple[Document, ...] = ()

    def __getitem__(self, name: str) -> KnowledgeClass:
        return next(c for c in self.classes if c.name == name)

    def digest(self) -> str:
        """A SHA-256 over every cell that is used."""
        return sha256(repr(asdict(self)).encode("utf-8", "surrogatepass")).hexdigest()


def render(
    template: str, text: str, examples: Sequence[Example], documents: Sequence[Document] = ()
) -> str:
    """Fill a template in one pass, so that braces in tasks, examples and documents stay text."""
    shown = "\n\n".join(f"指示: {example.input}\n回答: {example.output}" for example in examples)
    quoted = "\n\n".join(f"{document.title}\n{document.text}" for document in documents)
    values = {"input": text, "examples": shown, "documents": quoted}
    return PLACEHOLDER.sub(lambda match: values[match[1]], template)
