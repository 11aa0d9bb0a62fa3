import re

import pytest

from evomerge.errors import StudyFileError
from evomerge.genome.genome import make_genome
from evomerge.study import Study, changed_keys, read_study
from evomerge.study.section import Section

MINIMAL = """
genome:
  base_model: ./base
  models: [./instruct]
  merge_method: task_arithmetic
  layer_granularity: 2
tasks:
  - file: tasks.jsonl
"""


def genome(**keys):
    """A study file of this genome; two models and no base unless told otherwise."""
    keys = {"models": "[./a, ./b]"} | keys
    return (
        "genome: {"
        + ", ".join(f"{key}: {value}" for key, value in keys.items())
        + "}\ntasks: [{file: t.jsonl}]\n"
    )


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


def test_several_objectives_are_named_and_stored(tmp_path):
    text = MINIMAL + "objective: {maximize: [correct, 'group:1'], minimize: [answer_tokens]}\n"
    study = read_study(write(tmp_path, text))
    assert study.objective.several == ("correct", "group:1", "answer_tokens")
    assert study.metric == study.judge.metric
    assert Study.from_dict(study.to_dict()) == study


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MINIMAL + "serch: {}\n", ["unknown key `serch`", "`search`"]),
        (MINIMAL + "search: {trails: 3}\n", ["`search.trails`", "`search.trials`"]),
        (MINIMAL + "search: {trials: many}\n", ["`search.trials`", "'many'"]),
        (MINIMAL + "search: {trials: 0}\n", ["`search.trials`", "at least 1"]),
        (MINIMAL + "search: {sigma: .nan}\n", ["`search.sigma`", "finite"]),
        (MINIMAL + "search: {start: 3}\n", ["`search.start`", "bounds"]),
        (MINIMAL + "search: {bounds: [1, 0]}\n", ["`search.bounds`"]),
        (MINIMAL + "split: {held_out: 1.0}\n", ["`split.held_out`"]),
        (MINIMAL + "judge: {metric: accuracy}\n", ["grade or correct", "'accuracy'"]),
        (MINIMAL + "prompt: {format: template, template: no slot}\n", ["{input}"]),
        (MINIMAL + "limit: 50\n", ["`limit`", "lm-eval"]),
        (
            MINIMAL.replace("task_arithmetic", "passthru"),
            ["merge_method", "dare_linear", "'passthru'"],
        ),
        (
            MINIMAL.replace("  base_model: ./base\n", ""),
            ["`genome.base_model` is missing", "task_arithmetic"],
        ),
        (MINIMAL.replace("[./instruct]", "[./a, ./x/../a]"), ["twice"]),
        (MINIMAL.replace("[./instruct]", "[./base]"), ["`genome.models`", "at least two models"]),
        (
            MINIMAL + "---\n" + MINIMAL,
            ["small.yaml", "several YAML documents", "one study per file"],
        ),
        (
            genome(merge_method="linear", tokenizer_source="'model:./a'"),
            ["`genome.tokenizer_source`", "'model:./a'", "Write ./a, without `model:`"],
        ),
        (genome(merge_method="linear", models="[{model: {paht: x}}, b]"), ["genome.models[0]"]),
        (genome(merge_method="linear", models="[./a]"), ["two models"]),
        (genome(merge_method="slerp", models="[./a]"), ["two models"]),
        (genome(merge_method="slerp", smooth="true"), ["smooth"]),
        (genome(merge_method="slerp", filters="[mlp]"), ["filters"]),
        (genome(merge_method="slerp") + "search: {bounds: [0, 1]}\n", ["search.bounds"]),
        (
            genome(merge_method="slerp", models="[./a, ./b, ./c]", tokenizer_source="union"),
            ["union"],
        ),
        (
            genome(merge_method="linear", filters="[attn, self_attn]"),
            ["'self_attn'", "has no effect"],
        ),
        (genome(merge_method="linear", filters="['*']"), ["has no effect"]),
        (
            genome(merge_method="linear") + "search: {density_bounds: [0.1, 0.9]}\n",
            ["no densities"],
        ),
        (genome(merge_method="linear") + "search: {start_density: 0.9}\n", ["no densities"]),
        (
            genome(merge_method="ties", base_model="./base") + "search: {density_bounds: [0, 1]}\n",
            ["`search.density_bounds`", "above 0"],
        ),
        (
            genome(merge_method="ties", base_model="./base") + "search: {start_density: 0.05}\n",
            ["`search.start_density`", "0.1 to 1.0"],
        ),
        *(
            (
                genome(merge_method=method, base_model="./base")
                + f"search: {{parameter_bounds: {given}}}\n",
                [f"`search.parameter_bounds{key}`", *words],
            )
            for method, given, key, *words in (
                ("breadcrumbs", "{gamma: [0, 1.5]}", ".gamma", "from 0 to 1"),
                ("breadcrumbs", "{gamma: [-0.1, 0.1]}", ".gamma", "from 0 to 1"),
                ("breadcrumbs", "{gamma: [0.1, 0.1]}", ".gamma", "[0.1, 0.1]"),
                ("breadcrumbs", "{gamma: [0.2, 0.1]}", ".gamma", "[0.2, 0.1]"),
                ("breadcrumbs", "{epsilon: [0, 1]}", ".epsilon", "sets gamma"),
                ("della", "{epsilon: [0, 1]}", ".epsilon", "from 0 to 0.95"),
                ("ramplus_tl", "{r: [0, 1000000]}", ".r", "from 0 to 1000"),
                ("ties", "{gamma: [0, 1]}", ".gamma", "has no effect", "none"),
                ("breadcrumbs", "{gamma: 0.1}", "", "gamma", "0.1"),
                ("breadcrumbs", "{gamma: [0]}", "", "gamma"),
                ("breadcrumbs", "{gamma: [0, true]}", "", "gamma"),
                ("breadcrumbs", "{gamma: [0, .nan]}", "", "gamma"),
                ("breadcrumbs", "{gamma: [0, x]}", "", "gamma"),
                ("breadcrumbs", "{3: [0, 1]}", "", "`3`"),
                ("breadcrumbs", "[0, 0.1]", "", "not a mapping"),
            )
        ),
        (MINIMAL.replace("granularity: 2", "granularity: -2"), ["layer_granularity"]),
        (
            MINIMAL.replace("./base", "${NO_SUCH_VARIABLE}/base"),
            ["NO_SUCH_VARIABLE", "genome.base_model"],
        ),
        (MINIMAL.replace("  models: [./instruct]\n", ""), ["`genome.models` is missing"]),
        (MINIMAL.replace("[./instruct]", "[]"), ["`genome.models` is empty", "at least one"]),
        (MINIMAL.replace("[./instruct]", "./a"), ["`genome.models` must be a list", "'./a'"]),
        (MINIMAL + "judge: {1: x}\n", ["unknown key `judge.1`"]),
        (
            MINIMAL + "engine: {vllm: {tensor_paralel_size: 1}}\n",
            ["`engine.vllm.tensor_parallel_size`"],
        ),
        (MINIMAL + "engine: {vllm: 3}\n", ["`engine.vllm` is not a mapping", "found: 3"]),
        (MINIMAL + "search: {bounds: [1]}\n", ["`search.bounds`", "list of 2", "found: [1]"]),
        (MINIMAL + "search: {uniform: [1, x]}\n", ["`search.uniform[1]`", "number", "'x'"]),
        (MINIMAL + "search: {trials: true}\n", ["`search.trials`", "whole number", "True"]),
        (MINIMAL + "search: {time_limit: soon}\n", ["`search.time_limit`", "'soon'", "55m"]),
        (MINIMAL + "search: {max_cost: 3}\n", ["`search.max_cost`", "3.0", "hourly_price"]),
        (MINIMAL + "search: {source_study: small}\n", ["`search.source_study`", "another"]),
        (MINIMAL + "search: {subset: 8, ranking: all}\n", ["`search.subset`", "8", "race"]),
        (
            MINIMAL + "search: {population: 4, vectors: [[1], [2], [3], [4], [5]]}\n",
            ["`search.population`", "4", "at least 5"],
        ),
        (
            MINIMAL + "search: {ranking: race}\nengine: {population: true}\n",
            ["`engine.population`", "race", "Remove it"],
        ),
        (
            MINIMAL + "search: {start: 0.5}\nrandom_init: true\n",
            ["`search.start`", "random_init", "0.5", "Remove it"],
        ),
        (
            MINIMAL + "search: {warm_start: likelihood}\nrandom_init: true\n",
            ["`random_init`", "search.warm_start", "Remove it"],
        ),
        (MINIMAL + "judge: {kind: learned}\n", ["`judge.file` is missing", "judge fit"]),
        (MINIMAL + "judge: {kind: local}\n", ["`judge.model` is missing"]),
        (MINIMAL + "judge: {file: x.json}\n", ["`judge.file`", "x.json", "`kind: learned`"]),
        (
            MINIMAL + "judge: {kind: llm, template: 'no {input}'}\n",
            ["`judge.template`", "{answer}"],
        ),
        (MINIMAL + "judge: {kind: llm, max_cost: 5}\n", ["`judge.max_cost`", "judge.input_price"]),
        (MINIMAL + "judge: {kind: llm, metric: correct}\n", ["`judge.metric`", "Use grade"]),
        (MINIMAL + "prompt: {template: '{input}'}\n", ["`prompt.template`", "`format: template`"]),
        (MINIMAL + "prompt: {default_class: x}\n", ["`prompt.default_class`", "prompt.knowledge"]),
        (MINIMAL + "generation: {stop: ['']}\n", ["`generation.stop`", "['']", "empty"]),
        (MINIMAL + "objective: {grade: 0}\n", ["`objective`", "weight"]),
        (
            MINIMAL + "engine: {kind: vllm}\nobjective: {likelihood: 1}\n",
            ["`objective.likelihood`", "engine.kind: transformers"],
        ),
        (
            MINIMAL + "objective: {maximize: [grade], minimize: [grade]}\n",
            ["`objective`", "twice", "'grade'", "Remove one"],
        ),
        (
            MINIMAL + "objective: {maximize: [correct], minimize: [answer_token]}\n",
            ["`objective`", "'answer_token'", "Did you mean answer_tokens?"],
        ),
        (MINIMAL + "objective: {maximize: [grade]}\n", ["`objective`", "2 to 4", "['grade']"]),
        (
            MINIMAL + "objective: {grade: 1, maximize: [grade, correct]}\n",
            ["`objective`", "both weights and objectives", "Keep one"],
        ),
        (
            MINIMAL + "objective: {maximize: [correct, tasks:x]}\n",
            ["`objective`", "'tasks:x'", "tasks:"],
        ),
        (
            MINIMAL + "objective: {maximize: [grade, correct]}\nsearch: {ranking: race}\n",
            ["`search.ranking`", "several objectives"],
        ),
        (
            MINIMAL + "objective: {maximize: [grade, likelihood]}\nengine: {kind: vllm}\n",
            ["`objective.likelihood`", "engine.kind: transformers"],
        ),
        (MINIMAL + "    dataset: x\n", ["`tasks[0]`", "exactly one", "'file'"]),
        (MINIMAL + "study: a b\n", ["`study`", "'a b'", "letters"]),
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
    study = read_study(
        path, ["search.trials=24", "generation.max_new_tokens=7"], {"PAIR": "/models"}
    )
    assert (study.search.trials, study.generation.max_new_tokens, study.genome.base_model) == (
        24,
        7,
        "/models/base",
    )


def test_only_stopping_keys_may_change(tmp_path):
    path = write(tmp_path, MINIMAL)
    old = read_study(path).to_dict()
    assert changed_keys(old, read_study(path, ["search.trials=99"]).to_dict()) == []
    assert changed_keys(old, read_study(path, ["search.seed=1"]).to_dict()) == ["search.seed"]


def test_a_file_of_mergekit_evolve_is_read_whole(tmp_path):
    text = genome(
        merge_method="dare_ties",
        base_model="./base",
        tokenizer_source="./b",
        layer_granularity=0,
        normalize="false",
        allow_negative_weights="true",
        smooth="true",
        filters="[self_attn, mlp]",
    )
    study = read_study(write(tmp_path, text))
    g = study.genome
    assert (g.merge_method, g.layer_granularity, g.normalize, g.smooth, g.filters) == (
        "dare_ties",
        0,
        False,
        True,
        ("self_attn", "mlp"),
    )
    assert g.tokenizer_source == str(tmp_path / "b")
    assert (study.bounds, study.density_bounds, study.start_density) == (
        (-2.0, 2.0),
        (0.1, 1.0),
        0.8,
    )
    assert g.all_models == tuple(str(tmp_path / name) for name in ("base", "a", "b"))
    assert Study.from_dict(study.to_dict()) == study


def test_an_adapter_is_a_path_of_its_own(tmp_path):
    study = read_study(
        write(tmp_path, genome(merge_method="linear", models="[./a+./lora, org/b+org/lora, ./c]"))
    )
    assert study.genome.models == (
        f"{tmp_path}/a+{tmp_path}/lora",
        "org/b+org/lora",
        f"{tmp_path}/c",
    )


def test_a_study_from_before_the_newer_keys_goes_on(tmp_path):
    study = read_study(write(tmp_path, MINIMAL)).to_dict()
    old = {
        section: dict(keys) if isinstance(keys, dict) else keys for section, keys in study.items()
    }
    for key in ("start_density", "density_bounds", "parameter_bounds"):
        del old["search"][key]
    assert changed_keys(old, study) == []


def test_bounds_of_a_method_s_own_numbers_are_part_of_a_study(tmp_path):
    text = MINIMAL.replace("task_arithmetic", "breadcrumbs")
    study = read_study(write(tmp_path, text))
    assert study.search.parameter_bounds == {}
    bounded = read_study(write(tmp_path, text), ["search.parameter_bounds={gamma: [0, 0.1]}"])
    assert changed_keys(study.to_dict(), bounded.to_dict()) == ["search.parameter_bounds.gamma"]
    assert Study.from_dict(bounded.to_dict()) == bounded


def test_slices_must_divide_the_layers(tmp_path):
    with pytest.raises(StudyFileError, match="does not divide"):
        make_genome(read_study(write(tmp_path, MINIMAL)), 5)


def limited():
    """(dotted key, a value out of its range) for every limit of every section."""
    for name, field in Study.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            for key, entry in section.model_fields.items():
                for limit in entry.metadata:
                    for kind, step in (("gt", 0), ("ge", -1), ("lt", 0), ("le", 1)):
                        if hasattr(limit, kind):
                            yield f"{name}.{key}", getattr(limit, kind) + step


@pytest.mark.parametrize(("key", "value"), limited())
def test_every_limit_is_told_with_its_key_the_value_and_what_to_write(tmp_path, key, value):
    with pytest.raises(StudyFileError) as caught:
        read_study(write(tmp_path, MINIMAL), [f"{key}={value}"])
    text = rf"small\.yaml: `{key}` is out of range \(found: {value}\)\. Use .*\d.*"
    assert re.fullmatch(f".*{text}", str(caught.value))


def test_the_base_among_the_models_is_left_out_as_its_weight_has_no_effect(tmp_path, caplog):
    """mergekit-evolve takes such a genome; linear and slerp give their base a weight."""
    written = MINIMAL.replace("[./instruct]", "[./x/../base, ./instruct]")
    study = read_study(write(tmp_path, written))
    assert study.genome.models == (str(tmp_path / "instruct"),)
    assert [f"{tmp_path}/base" in line for line in caplog.messages] == [True]
    assert study == read_study(write(tmp_path, MINIMAL))
    assert Study.from_dict(study.to_dict()) == study
    assert len(caplog.messages) == 1
    linear = genome(merge_method="linear", base_model="./a")
    assert len(read_study(write(tmp_path, linear)).genome.models) == 2


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("{model: {path: ./a, revision: null}, lora: null}", "DIR/a"),
        ("{model: ./a, lora: {path: ./b}, override_architecture: null}", "DIR/a+DIR/b"),
        ("{path: owner/name, revision: v2}", "owner/name@v2"),
        ("./a@main", "DIR/a"),
        ("a@main", "DIR/a"),
        ("owner/name@v2+./b@v3", "owner/name@v2+DIR/b"),
    ],
)
def test_models_are_named_as_in_mergekit(tmp_path, written, meant):
    """A mapping, or a revision, which a folder does not have."""
    for name in "ab":
        (tmp_path / name).mkdir()
    study = read_study(write(tmp_path, MINIMAL.replace("./instruct", written)))
    assert study.genome.models == (meant.replace("DIR", str(tmp_path)),)
