"""Reads and writes the YAML form of a base: the sheets are lists, the columns keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from evomerge.errors import KnowledgeError
from evomerge.knowledge.formats.tables import OPTIONAL, REQUIRED, Row, Tables
from evomerge.knowledge.records import Knowledge, KnowledgeClass
from evomerge.yaml_json import LARGEST_YAML, compose_yaml, read_text

# PyYAML folds the line breaks among them where they are not escaped
ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff]")
NULL, TEXT = "tag:yaml.org,2002:null", "tag:yaml.org,2002:str"


def read_yaml(path: Path, tables: Tables) -> None:
    """Fill `tables`; a place is a line and a key. Raises KnowledgeError for what is not YAML."""
    root = _root(path)
    seen: set[str] = set()
    for key, value in root.value:
        where = f"{path}, line {key.start_mark.line + 1}"
        sheet = str(key.value)
        if sheet not in REQUIRED or sheet in seen:
            what = "is given twice" if sheet in seen else "is unknown"
            tables.wrong(f"the key {sheet} {what}", where, None, f"Use {', '.join(REQUIRED)}.")
        elif not isinstance(value, yaml.SequenceNode):
            tables.wrong(f"{sheet} is not a list", where, None, "Begin each entry with a dash.")
            tables.missing.add(sheet)
        else:
            rows = [_read_row(sheet, i, node, path, tables) for i, node in enumerate(value.value)]
            tables.rows[sheet] = list(filter(None, rows))
        seen.add(sheet)
    for sheet in ("classes", "examples"):
        if sheet not in seen:
            tables.wrong(
                f"has no key {sheet}",
                path,
                sorted(seen),
                f"Add it, a list of {', '.join(REQUIRED[sheet])}.",
            )
            tables.missing.add(sheet)


def _root(path: Path) -> yaml.MappingNode:
    root = compose_yaml(read_text(path, LARGEST_YAML, KnowledgeError), path, KnowledgeError)
    if not isinstance(root, yaml.MappingNode):
        raise KnowledgeError(
            "is not a mapping of keys", where=path, remedy=f"Write the keys {', '.join(REQUIRED)}."
        )
    return root


def _read_row(sheet: str, i: int, node: yaml.Node, path: Path, tables: Tables) -> Row | None:
    place = EntryPlace(path, f"{sheet}[{i}]", node.start_mark.line + 1)
    if not isinstance(node, yaml.MappingNode):
        tables.wrong(
            "is not a mapping of keys",
            place("").rstrip("."),
            None,
            f"Write {', '.join(REQUIRED[sheet])}.",
        )
        return None
    known = (*REQUIRED[sheet], *OPTIONAL[sheet])
    cells: dict[str, str] = {}
    reported: set[str] = set()
    for key, value in node.value:
        name = str(key.value)
        place.lines[name] = key.start_mark.line + 1
        if name not in known or name in cells:
            what = "is given twice" if name in cells else "is unknown"
            tables.wrong(f"the key {name} {what}", place(name), None, f"Use {', '.join(known)}.")
            continue
        cells[name] = ""
        if not isinstance(value, yaml.ScalarNode):
            tables.wrong(
                f"{name} is not text",
                place(name),
                None,
                "Quote it, or write it as a block after a |.",
            )
            reported.add(name)
        elif value.tag != NULL:
            cells[name] = str(value.value)  # kept as written: yes stays yes
    return Row(i + 2, cells, place, frozenset(reported))


class EntryPlace:
    """Names a key of one entry by its line; `lines` are those of its keys."""

    def __init__(self, path: Path, entry: str, line: int) -> None:
        self.path = path
        self.entry = entry
        self.line = line
        self.lines: dict[str, int] = {}

    def __call__(self, column: str) -> str:
        return f"{self.path}, line {self.lines.get(column, self.line)}, {self.entry}.{column}"


def to_yaml(knowledge: Knowledge) -> str:
    """The base as YAML, texts of several lines as blocks; settings that are None are left out."""
    examples = []
    for e in knowledge.examples:
        examples.append(
            {"class": e.class_name, "input": e.input, "output": e.output, "weight": e.weight}
        )
    data: dict[str, Any] = {"classes": list(map(_entry, knowledge.classes)), "examples": examples}
    if knowledge.documents:
        data["documents"] = [{"title": d.title, "text": d.text} for d in knowledge.documents]
    return yaml.dump(data, Dumper=KnowledgeDumper, allow_unicode=True, sort_keys=False, width=10**9)


def _entry(c: KnowledgeClass) -> dict[str, str | float]:
    entry = {
        "class": c.name,
        "description": c.description,
        "system": c.system,
        "template": c.template,
        "max_new_tokens": c.max_new_tokens,
        "temperature": c.temperature,
        "repetition_penalty": c.repetition_penalty,
        "examples": c.shots,
        "documents": c.quotes,
    }
    given = {}
    for key, value in entry.items():
        if value is not None:
            given[key] = value
    return given


class KnowledgeDumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, which people can edit."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None
    if ODD.search(text):
        style = '"'
    elif "\n" in text:
        style = "|"
    return dumper.represent_scalar(TEXT, text, style=style)


KnowledgeDumper.add_representer(str, _represent_text)
