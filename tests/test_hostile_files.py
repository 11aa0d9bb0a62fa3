"""YAML, JSON and names that were made to do harm are one line each, in no time; good ones work."""

import json
import time

import pytest
import yaml

from evomerge.api.inputs import results_folder, setting_texts, storage_url
from evomerge.cli import main
from evomerge.errors import InputError, KnowledgeError, ModelError, StudyError, StudyFileError
from evomerge.files import is_there
from evomerge.knowledge.read_base import read_knowledge
from evomerge.merging.checkpoints.hub import find_folder
from evomerge.recipe import read_recipe
from evomerge.study import Study, read_setting, read_study
from evomerge.study.reading import study_from_mapping
from evomerge.yaml_json import parse_json, parse_yaml, read_json_object

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
)
BAD_YAML = {
    "bomb": BOMB,
    "merge bomb": MERGES,
    "long text, often": "t: &t " + "x" * 10_000 + "\nl: [" + ", ".join(["*t"] * 9000) + "]\n",
    "itself": "a: &a [*a]\n",
    "itself in a mapping": "&a {b: *a}\n",
    "itself as a key": "&a {*a : 1}\n",
    "nested lists": "[" * 5000,
    "closed nested lists": "a: " + "[" * 150 + "]" * 150,
    "nested mappings": "{a: " * 5000,
    "nested blocks": "".join(" " * i + "a:\n" for i in range(1500)),
    "5,000 digits": "n: " + "9" * 5000,
    "hexadecimal": "n: 0x" + "f" * 100_000,
    "sexagesimal": "n: 1" + ":59" * 100_000,
    "long float": "n: " + "9" * 100_000 + ".0",
    "impossible date": "d: 2026-13-45\n",
    "impossible time": "d: 2026-01-01 25:61:61\n",
    "NUL": "a: b\x00c\n",
    "escaped NUL": 'a: "b\\0c"\n',
    "lone surrogate": 'a: "\\ud800"\n',
    "twice": "study: a\nstudy: b\n",
    "twice, deeper": "search: {seed: 1, seed: 2}\n",
    "unknown anchor": "a: *b\n",
    "Python object": "a: !!python/object/apply:os.system ['true']\n",
    "odd tags": "a: !!bool maybe\n",
    "a tag without a value": "a: !!timestamp now\n",
    "binary": "a: !!binary '***'\n",
    "a list as a key": "? [a]\n: 1\n",
    "two documents": "a: 1\n---\nb: 2\n",
    "tab": "a:\n\t- b\n",
    "directive": "%YAML 9.9\n---\na: 1\n",
    "control": "a: \x1b[31m\n",
}


@pytest.fixture(params=list(BAD_YAML))
def bad(request, tmp_path):
    path = tmp_path / "file.yaml"
    path.write_bytes(BAD_YAML[request.param].encode("utf-8", "surrogatepass"))
    return path


def line_of(caught):
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 1000
    return line


def test_bad_yaml_is_one_line_wherever_it_is_read(bad, capsys):
    began = time.process_time()
    for read in (read_study, read_recipe, read_knowledge):
        with pytest.raises(InputError) as caught:
            read(bad)
        assert "file.yaml" in line_of(caught)
    text = bad.read_bytes().decode("utf-8", "surrogatepass")
    with pytest.raises(InputError) as caught:
        study_from_mapping({"x": 1}, bad.parent, [f"genome={text}"], {})
    line_of(caught)
    assert time.process_time() - began < 8
    for argv in (["check", str(bad)], ["merge", str(bad), str(bad.parent / "out")]):
        assert main(argv) == 2
        assert capsys.readouterr().err.count("\n") == 1


GOOD_YAML = """
shared: &weights {weight: 0.5}
common: &common
  base_model: /b
  merge_method: task_arithmetic
  dtype: bfloat16
all:
  <<: *common
  models:
    - {model: /b}
    - {model: /m, parameters: *weights}
    - {model: /n, parameters: {<<: *weights, density: 0.5}}
  when: 2026-01-31
  dtype: float16
"""


def test_anchors_and_merge_keys_mean_what_pyyaml_says():
    assert parse_yaml(GOOD_YAML, "x") == yaml.safe_load(GOOD_YAML)


def test_a_recipe_may_use_anchors_under_its_own_keys(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "merge_method: linear\nmodels:\n- {model: /m, parameters: &p {weight: 0.5}}\n"
        "- {model: /n, parameters: *p}\n"
    )
    assert [s.parameters["weight"] for s in read_recipe(path).slices[0].sources] == [0.5, 0.5]


def test_values_of_set_are_still_yaml():
    assert read_setting("a.b=[1, {c: d}]") == ("a.b", [1, {"c": "d"}])
    assert read_setting("a=") == ("a", None)


BAD_JSON = {
    "nested": "[" * 100_000,
    "nested objects": '{"a":' * 500 + "1" + "}" * 500,
    "5,000 digits": '{"n": ' + "9" * 5000 + "}",
    "not an object": "[1]",
    "cut": '{"a": ',
    "Latin-1": '{"a": "é"}'.encode("latin-1"),
    "empty": "",
    "a text": '"x"',
}


@pytest.mark.parametrize("kind", list(BAD_JSON))
def test_bad_json_is_one_line(tmp_path, kind):
    path = tmp_path / "config.json"
    text = BAD_JSON[kind]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModelError) as caught:
        read_json_object(path, ModelError)
    assert "config.json" in line_of(caught)


def test_json_that_models_have_is_read(tmp_path):
    """Infinity stands in Mamba's configurations, a mark before the text in files from Windows."""
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": [0.0, Infinity], "a b": "\\u0000\\ud83d\\ude00"}')
    found = read_json_object(path, ModelError)
    assert found == {"a": [0.0, float("inf")], "a b": "\x00\U0001f600"}
    assert parse_json('{"a": 1, "a": 2}', "x", ModelError, "") == {"a": 2}


@pytest.mark.parametrize("make", ["folder", "fifo", "missing", "long", "device"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, make):
    import os
    from pathlib import Path

    path = tmp_path / "s.yaml"
    if make == "folder":
        path.mkdir()
    elif make == "fifo":
        os.mkfifo(path)
    elif make == "long":
        path = tmp_path / ("n" * 300)
    elif make == "device":
        path = Path("/dev/zero")
    with pytest.raises(StudyFileError) as caught:
        read_study(path)
    line_of(caught)
    with pytest.raises(InputError) as caught:
        read_recipe(path)
    line_of(caught)


MINIMAL = {"genome": {"base_model": "a/b", "models": ["a/c"]}, "tasks": [{"file": "t.jsonl"}]}
PATHS = ["~nouser/x", "n" * 300, "a/" + "n" * 300, "a\x00b", "/" + "n/" * 3000, "~nouser"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ascii(path)[:20])
@pytest.mark.parametrize("key", ["base_model", "models", "file", "knowledge", "recipes"])
def test_impossible_paths_are_one_line_or_left_for_later(tmp_path, path, key):
    data = json.loads(json.dumps(MINIMAL))
    if key == "file":
        data["tasks"][0]["file"] = path
    elif key == "knowledge":
        data["prompt"] = {"knowledge": path}
    elif key == "recipes":
        data["search"] = {"recipes": [path]}
    else:
        data["genome"][key] = path if key == "base_model" else [path]
    try:
        study_from_mapping(data, tmp_path, environ={})
    except StudyFileError as error:
        line = str(error)
    else:
        line = ""
    assert "\n" not in line
    with pytest.raises(ModelError, match=r"no such model folder|cannot be fetched"):
        find_folder(path, "model", "Name one.")
    assert not is_there(tmp_path / path)


NAMES = [
    "..",
    ".",
    ".x",
    "-x",
    "_x",
    "a/b",
    "a\\b",
    "a b",
    "a\nb",
    "a\x1bb",
    "",
    "x" * 151,
    "あ" * 60,
]
NAMES += ["a\x00b", "/", "../x", "~", "a:b", "a*", "\u202ea"]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:20])
def test_a_study_cannot_have_the_name(tmp_path, name):
    path = tmp_path / "s.yaml"
    path.write_text(json.dumps({"study": name, **MINIMAL}))
    with pytest.raises(InputError) as caught:
        read_study(path, environ={})
    line_of(caught)
    with pytest.raises(InputError):
        study_from_mapping(MINIMAL, tmp_path, setting_texts({"study": name}), {})
    source = {"search": {"source_study": name}, **MINIMAL}
    with pytest.raises(InputError):
        study_from_mapping(source, tmp_path, environ={})
    folder = results_folder(tmp_path / "results", name)
    assert folder.name != name


@pytest.mark.parametrize("name", ["a", "0", "demo-1.2_x", "学習", "x" * 150, "2026.01"])
def test_a_study_can_have_the_name(tmp_path, name):
    study = study_from_mapping({"study": name, **MINIMAL}, tmp_path, environ={})
    assert (study.study, results_folder("r", name).name) == (name, name)


@pytest.mark.parametrize("name", ["..", "-x", "_x", "x" * 200])
def test_studies_of_0_1_with_odd_names_can_be_read(tmp_path, name):
    data = study_from_mapping(MINIMAL, tmp_path, environ={}).to_dict()
    stored = Study.from_dict(data | {"study": name})
    assert stored.study == name
    assert stored.replace(limit=None).study == name
    assert storage_url(None, name).endswith(f"storage/{name}.db")
    folder = results_folder(tmp_path, name)
    assert folder.parent == tmp_path
    assert folder.name not in ("..", ".")


@pytest.mark.parametrize("command", ["show", "export", "report", "cache"])
@pytest.mark.parametrize("name", ["../x", "a/b", "", "a b", "x" * 300])
def test_no_study_has_the_name(tmp_path, monkeypatch, capsys, command, name):
    monkeypatch.chdir(tmp_path)
    assert main([command, "--", name]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(StudyError):
        storage_url(None, name)


def test_a_file_whose_name_is_no_study_name_says_what_to_do(tmp_path):
    path = tmp_path / "my study.yaml"
    path.write_text(json.dumps(MINIMAL))
    with pytest.raises(StudyFileError, match="`study` is not a study's name"):
        read_study(path, environ={})
    assert read_study(path, ["study=mine"], {}).study == "mine"


def test_knowledge_may_repeat_texts_by_anchors(tmp_path):
    path = tmp_path / "k.yaml"
    path.write_text(
        "classes:\n- {class: a, system: &s Answer., template: '{input}'}\n"
        "- {class: b, system: *s, template: '{input}'}\n"
        "examples:\n- {class: a, input: i, output: o}\n- {class: b, input: j, output: o}\n"
    )
    assert [kind.system for kind in read_knowledge(path).classes] == ["Answer.", "Answer."]
    path.write_text("classes: &c\n- *c\n")
    with pytest.raises(KnowledgeError, match="alias"):
        read_knowledge(path)
