"""Write docs/STUDY_FILE.md and the JSON Schema from the descriptions of the study file's keys."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evomerge.study import study_schema

DOCS = Path(__file__).parent
SCHEMA = DOCS.parent / "search_spaces" / "study.schema.json"
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
HEAD = """\
# Study file

Every key of a study file, as `evomerge/study/` describes it. `make docs` writes this page and
[study.schema.json](../search_spaces/study.schema.json), with which editors complete and check study
files. `evomerge schema` prints the same schema.

Paths are relative to the file, `${NAME}` is replaced by an environment variable (a study stores and
shows it as it is written, and notices when its value changes), and
`--set search.trials=24` overrides a key. A mergekit-evolve configuration is a study file:
[MERGEKIT_EVOLVE.md](MERGEKIT_EVOLVE.md).
"""


class Page:
    """The sections of the study file, each as a table of its keys."""

    def __init__(self) -> None:
        self.schema = json.loads(study_schema())
        self.headings: dict[str, str] = {}  # definition -> the dotted key that holds it

    def text(self) -> str:
        """The whole page."""
        parts = [HEAD, *self.section("", self.schema)]
        written: set[str] = set()
        while written != self.headings.keys():  # a section may hold further ones
            definition = next(name for name in self.headings if name not in written)
            written.add(definition)
            parts += self.section(self.headings[definition], self.schema["$defs"][definition])
        return "\n".join(parts) + "\n"

    def section(self, path: str, schema: Mapping[str, Any]) -> Iterator[str]:
        """A heading and the table of a section's keys."""
        yield f"## {f'`{path}`' if path else 'Top level'}\n\n{schema.get('description', '')}\n"
        yield "| key | type | default | |\n|---|---|---|---|"
        for key, value in schema["properties"].items():
            dotted = f"{path}.{key}" if path else key
            kind = self.type_name(dotted, value)
            default = "required" if key in schema.get("required", ()) else ""
            if not isinstance(value.get("default", {}), dict):
                default = f"`{json.dumps(value['default'], ensure_ascii=False)}`"
            cells = [f"`{key}`", kind, default, value.get("description", "")]
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
        yield ""

    def type_name(self, path: str, key: Mapping[str, Any]) -> str:
        """A key's type in words, with its limits; a section as a link."""
        if "enum" in key:
            return ", ".join(f"`{value}`" for value in key["enum"])
        if "const" in key:
            return f"`{key['const']}`"
        if "$ref" in key:
            definition = key["$ref"].rpartition("/")[2]
            heading = self.headings.setdefault(definition, path)
            return f"[section](#{heading.replace('.', '').replace('[]', '')})"
        if "anyOf" in key:
            options = [option for option in key["anyOf"] if option.get("type") != "null"]
            return " or ".join(dict.fromkeys(self.type_name(path, option) for option in options))
        if "items" in key:
            return f"list of {self.type_name(f'{path}[]', key['items'])}"
        shown = [f"{sign} {key[name]:g}" for name, sign in LIMITS.items() if name in key]
        return " ".join([str(key.get("type", "any")), *shown])


def study_file_page() -> str:
    """The text of docs/STUDY_FILE.md."""
    return Page().text()


def schema_text() -> str:
    """The text of search_spaces/study.schema.json, as `evomerge schema` prints it."""
    return study_schema() + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), encoding="utf-8")
    (DOCS / "STUDY_FILE.md").write_text(study_file_page(), encoding="utf-8")
