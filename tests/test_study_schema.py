"""The study file's JSON Schema: what ships agrees with it, and it covers all of the sections."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from evomerge.cli import main
from evomerge.study import Study, read_study

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = ROOT / "search_spaces" / "study.schema.json"
SHIPPED = [*ROOT.glob("search_spaces/*.yaml"), *ROOT.glob("benchmarks/*.yaml")]
HINT = "# yaml-language-server: $schema="

# https://github.com/arcee-ai/mergekit/blob/main/docs/evolve.md
MERGEKIT_EVOLVE = """
genome:
  models:
    - NousResearch/Hermes-2-Pro-Mistral-7B
    - PocketDoc/Dans-AdventurousWinds-Mk2-7b
  merge_method: dare_ties
  base_model: mistralai/Mistral-7B-v0.1
  tokenizer_source: null
  layer_granularity: 8
  normalize: false
  allow_negative_weights: false
  smooth: false
  filters: [self_attn, mlp]
tasks:
  - name: alpaca_eval_dolphin
    weight: 1.0
    metric: "acc,none"
  - arc_challenge
limit: 100
num_fewshot: 0
shuffle: true
random_init: true
apply_chat_template: true
fewshot_as_multiturn: true
task_search_path: .
"""


@pytest.fixture(scope="module")
def schema():
    return json.loads(SCHEMA.read_text(encoding="utf-8"))


def errors(schema, data):
    return [error.json_path for error in jsonschema.Draft202012Validator(schema).iter_errors(data)]


def test_the_committed_file_is_what_the_command_prints(capsys, schema):
    assert main(["schema"]) == 0
    assert capsys.readouterr().out == SCHEMA.read_text(encoding="utf-8")
    jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_study_file_that_ships_names_the_schema_and_fits_it(path, schema):
    text = path.read_text(encoding="utf-8")
    assert text.startswith(HINT)
    named = text.splitlines()[0].removeprefix(HINT)
    assert (path.parent / named).resolve() == SCHEMA
    assert errors(schema, yaml.safe_load(text)) == []


def test_a_configuration_of_mergekit_evolve_fits(tmp_path, schema):
    assert errors(schema, yaml.safe_load(MERGEKIT_EVOLVE)) == []
    path = tmp_path / "evolve.yaml"
    path.write_text(MERGEKIT_EVOLVE, encoding="utf-8")
    study = read_study(path)
    assert [source.name for source in study.tasks] == ["alpaca_eval_dolphin", "arc_challenge"]
    assert study.task_search_path == (str(tmp_path),)
    assert errors(schema, study.to_dict()) == [], "nor does what a study remembers differ"


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"serch": {}}, "$"),
        ({"search": {"trails": 3}}, "$.search"),
        ({"search": {"trials": 0}}, "$.search.trials"),
        ({"search": {"trials": "many"}}, "$.search.trials"),
        ({"search": {"bounds": [1]}}, "$.search.bounds"),
        ({"split": {"held_out": 1.0}}, "$.split.held_out"),
        ({"judge": {"metric": "accuracy"}}, "$.judge.metric"),
        ({"engine": {"vllm": {"tensor_parallel_size": 0}}}, "$.engine.vllm.tensor_parallel_size"),
        ({"tasks": []}, "$.tasks"),
    ],
)
def test_the_schema_finds_what_reading_finds(schema, change, place):
    good = {"genome": {"base_model": "b", "models": ["a"]}, "tasks": [{"file": "t.jsonl"}]}
    assert errors(schema, good) == []
    assert errors(schema, good | change) == [place]


def test_every_key_has_a_description_a_type_and_its_default(schema):
    for name, section in [("Study", schema), *schema["$defs"].items()]:
        for key, entry in section["properties"].items():
            place = f"{name}.{key}"
            # a section's description stands at the key or, where both are the same, at the section
            section_of = schema["$defs"].get(entry.get("$ref", "").removeprefix("#/$defs/"), {})
            assert (section_of | entry)["description"].endswith("."), place
            assert entry.keys() & {"type", "anyOf", "$ref"}, place
            assert "default" in entry or key in section["required"], place


def test_limits_are_those_of_the_sections(schema):
    held_out = schema["$defs"]["SplitSection"]["properties"]["held_out"]
    assert (held_out["exclusiveMinimum"], held_out["exclusiveMaximum"]) == (0, 1)
    assert Study.model_fields["split"].default.held_out == held_out["default"] == 0.5
