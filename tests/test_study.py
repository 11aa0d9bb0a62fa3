import pytest

from evomerge.errors import StudyFileError
from evomerge.genome import make_genome
from evomerge.study import Study, changed_keys, read_study

MINIMAL = """
genome:
  base_model: ./base
  models: [./instruct]
  merge_method: task_arithmetic
  layer_granularity: 2
tasks:
  - file: tasks.jsonl
"""


def write(tmp_path, text):
    path = tmp_path / "small.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_minimal_file_gets_defaults_and_absolute_paths(tmp_path):
    study = read_study(write(tmp_path, MINIMAL))
    assert study.study == "small"
    assert study.genome.base_model == str(tmp_path / "base")
    assert study.tasks[0].file == str(tmp_path / "tasks.jsonl")
    assert study.bounds == (0.0, 2.0)
    assert Study.from_dict(study.to_dict()) == study


def test_a_hub_name_stays_a_hub_name(tmp_path):
    study = read_study(write(tmp_path, MINIMAL.replace("./base", "llm-jp/llm-jp-3-13b")))
    assert study.genome.base_model == "llm-jp/llm-jp-3-13b"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MINIMAL + "serch: {}\n", ["unknown key `serch`", "`search`"]),
        (MINIMAL + "search: {trails: 3}\n", ["`search.trails`", "`search.trials`"]),
        (MINIMAL + "search: {trials: many}\n", ["`search.trials`", "'many'"]),
        (MINIMAL + "search: {trials: 0}\n", ["`search.trials`", "At least 1"]),
        (MINIMAL + "search: {sigma: .nan}\n", ["`search.sigma`", "finite"]),
        (MINIMAL + "search: {start: 3}\n", ["`search.start`", "bounds"]),
        (MINIMAL + "search: {bounds: [1, 0]}\n", ["`search.bounds`"]),
        (MINIMAL + "split: {held_out: 1.0}\n", ["`split.held_out`"]),
        (MINIMAL + "judge: {metric: accuracy}\n", ["grade or correct", "'accuracy'"]),
        (MINIMAL + "prompt: {format: template, template: no slot}\n", ["{input}"]),
        (MINIMAL + "limit: 50\n", ["`limit`", "lm-eval"]),
        (MINIMAL.replace("task_arithmetic", "ties"), ["merge_method", "'ties'"]),
        (MINIMAL.replace("./base", "${NO_SUCH_VARIABLE}/base"), ["NO_SUCH_VARIABLE", "genome.base_model"]),
        (MINIMAL.replace("  models: [./instruct]\n", ""), ["`genome.models` is missing"]),
        ("just a text", ["not a mapping"]),
        ("a: [1", ["not valid YAML"]),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, text, words):
    with pytest.raises(StudyFileError) as caught:
        read_study(write(tmp_path, text), environ={})
    assert "\n" not in str(caught.value)
    for word in [*words, "small.yaml"]:
        assert word in str(caught.value)


def test_overrides_and_environment(tmp_path):
    path = write(tmp_path, MINIMAL.replace("./base", "${PAIR}/base"))
    study = read_study(path, ["search.trials=24", "generation.max_new_tokens=7"], {"PAIR": "/models"})
    assert (study.search.trials, study.generation.max_new_tokens, study.genome.base_model) == (24, 7, "/models/base")


def test_only_stopping_keys_may_change(tmp_path):
    path = write(tmp_path, MINIMAL)
    old = read_study(path).to_dict()
    assert changed_keys(old, read_study(path, ["search.trials=99"]).to_dict()) == []
    assert changed_keys(old, read_study(path, ["search.seed=1"]).to_dict()) == ["search.seed"]


def test_genome_is_one_to_one(tmp_path):
    study = read_study(write(tmp_path, MINIMAL.replace("[./instruct]", "[./a, ./b]")))
    genome = make_genome(study, 4)
    assert genome.dimensions == 4
    one, two = genome.decode([0.1, 0.2, 0.3, 0.4]), genome.decode([0.1, 0.2, 0.3, 0.5])
    assert one.to_dict() != two.to_dict()
    assert [s["parameters"]["weight"] for s in one.to_dict()["slices"][1]["sources"] if "parameters" in s] == [0.3, 0.4]
    with pytest.raises(StudyFileError, match="does not divide"):
        make_genome(study, 5)
