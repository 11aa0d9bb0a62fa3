"""Writes a knowledge base as Excel or YAML, from which reading restores it exactly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evomerge.errors import KnowledgeError
from evomerge.files import replace_file
from evomerge.knowledge.formats.excel_writer import write_excel
from evomerge.knowledge.formats.yaml_format import to_yaml
from evomerge.knowledge.records import Knowledge


def write_knowledge(
    knowledge: Knowledge, path: str | Path, readme: Sequence[tuple[str, str]] = ()
) -> Path:
    """Write .xlsx, .yaml or .yml, by the suffix, completely or not at all.

    `readme` are the (heading, text) rows of a first sheet. Raises KnowledgeError: another suffix, a
    text that Excel cannot hold. OutputError: the file cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.casefold()
    if suffix == ".xlsx":
        return write_excel(knowledge, path, readme)
    if suffix not in (".yaml", ".yml"):
        raise KnowledgeError(
            "unknown type of knowledge base",
            where=path,
            found=path.suffix,
            remedy="Name it .xlsx or .yaml.",
        )
    text = _comments(readme) + to_yaml(knowledge)
    return replace_file(path, lambda file: file.write_text(text, encoding="utf-8", newline="\n"))


def _comments(readme: Sequence[tuple[str, str]]) -> str:
    lines = []
    for title, text in readme:
        paragraph = text
        if title:
            paragraph = f"{title}: {text}"
        lines += [f"# {line}\n" for line in paragraph.split("\n")]
    return "".join(lines)
