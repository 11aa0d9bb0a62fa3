"""Reads a knowledge base: classes of tasks with their prompts and settings, examples, documents.

It is an Excel file with the sheets `classes`, `examples` and `documents`, a YAML file with the same
contents, or CSV exports of them: a folder of classes.csv and examples.csv, or one file of examples.
`evomerge knowledge new` writes a starter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from evomerge.errors import KnowledgeError
from evomerge.knowledge.formats.csv_format import read_csv
from evomerge.knowledge.formats.excel_reader import read_excel
from evomerge.knowledge.formats.tables import Tables, no_such_base
from evomerge.knowledge.formats.yaml_format import read_yaml
from evomerge.knowledge.from_tables import knowledge_from
from evomerge.knowledge.records import Knowledge


@dataclass(frozen=True)
class Checked:
    """A base or its mistakes (those of the reading first), and notes that are not mistakes."""

    knowledge: Knowledge | None
    mistakes: tuple[KnowledgeError, ...]
    notes: tuple[str, ...]


def read_knowledge(path: str | Path) -> Knowledge:
    """Read a base. Raises KnowledgeError, the first of what `check_knowledge` finds."""
    checked = check_knowledge(path)
    if checked.knowledge is None:
        raise checked.mistakes[0]
    return checked.knowledge


def check_knowledge(path: str | Path) -> Checked:
    """Read a base and find every mistake, each with its sheet, row and column (YAML: line and key).

    The first row of a sheet names its columns, in any order; other columns and empty rows are
    skipped. Mistakes are: a missing or hidden sheet, a missing column, a column whose name is
    nearly right, an empty cell (only `system` and settings may be empty), merged cells, formulas,
    dates and error values where a text belongs, a class given twice, a template without `{input}`,
    a setting out of its range, an example of an unknown class, a class without examples (unless its
    settings say 0), no rows. Raises KnowledgeError where the file cannot be read at all.
    """
    path = Path(path)
    tables = Tables(path)
    try:
        _reader(path)(path, tables)
    except OSError as error:
        raise KnowledgeError(
            f"cannot be read: {error.strerror or error}",
            where=path,
            remedy="Check its permissions.",
        ) from error
    knowledge = knowledge_from(tables)
    return Checked(knowledge, tuple(tables.mistakes), tuple(tables.notes))


def _reader(path: Path) -> Callable[[Path, Tables], None]:
    suffix = path.suffix.casefold()
    if path.is_dir() or suffix in (".csv", ".tsv"):
        return read_csv
    if not path.is_file():
        raise no_such_base(path)
    return read_yaml if suffix in (".yaml", ".yml") else read_excel
