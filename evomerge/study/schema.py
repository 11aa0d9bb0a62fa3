"""The study file's JSON Schema, for editors and other programs."""

from __future__ import annotations

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from evomerge.study.study_file import Study


class _Schema(GenerateJsonSchema):
    """Leaves out the title of each key, which would only repeat its name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def study_schema() -> str:
    """The JSON Schema (draft 2020-12) of a study file, as JSON.

    Rules between keys, such as a start within the bounds, are checked when a file is read.
    """
    schema = Study.model_json_schema(schema_generator=_Schema)
    whole = {"$schema": GenerateJsonSchema.schema_dialect, **schema, "title": "evomerge study file"}
    return json.dumps(whole, indent=2, ensure_ascii=False)
