"""`evomerge check` finds what `evomerge search` would refuse, and takes its options."""

import io
import json
import shutil
import socket

import pytest
import torch
import yaml
from chat_server import Server, status
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

import evomerge
from evomerge.cli import main
from evomerge.console import Console
from evomerge.errors import EvomergeError, ModelError
from evomerge.merging.checkpoints.config_fault import check_config
from evomerge.study import read_study


def quiet():
    return Console(io.StringIO())


@pytest.fixture
def place(pair, tmp_path, monkeypatch):
    """A copy of the pair to change, as the working directory."""
    shutil.copytree(pair, tmp_path / "pair")
    monkeypatch.chdir(tmp_path / "pair")
    return tmp_path / "pair"


def wrong(place, *settings, **options):
    """The findings that are wrong."""
    found = evomerge.check(place / "study.yaml", overrides=list(settings), **options)
    return [finding for finding in found if finding.level == "wrong"]


def rewrite(place, **fields):
    """The tasks with other fields."""
    path = place / "tasks.jsonl"
    rows = [json.loads(line) | fields for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def free_port():
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


REFUSED = {
    "a context that is too small": ["generation.max_new_tokens=64"],
    "a folder that is not there": ["genome.models=[./nothing]"],
    "a folder beside others that is not there": ["genome.models=[nothing]"],
    "a knowledge base that is not there": ["prompt.knowledge=nothing.xlsx"],
    "a learned judge's file that is not there": ["judge.kind=learned", "judge.file=nothing.json"],
    "a local judge that is not there": ["judge.kind=local", "judge.model=./nothing"],
    "a recipe that is not there": ["search.recipes=[nothing.yaml]"],
    "a filter that matches nothing": ["genome.filters=[nothing]"],
    "slices that do not fit": ["genome.layer_granularity=3"],
    "a vector of another length": ["search.vectors=[[1.0]]"],
    "no closed task": ["judge.metric=correct"],
    "no room in a template of one's own": [
        "prompt.format=template",
        "prompt.template='{input}'",
        "generation.max_new_tokens=63",
    ],
    "a package that is missing": ["engine.quantization=4bit"],
}


@pytest.mark.parametrize("settings", REFUSED.values(), ids=REFUSED)
def test_what_search_refuses_check_finds(place, settings):
    with pytest.raises(EvomergeError) as refused:
        evomerge.search(
            place / "study.yaml", storage=place / "s.db", results=place / "r",
            overrides=settings, console=quiet(),
        )  # fmt: skip
    texts = " ".join(finding.text for finding in wrong(place, *settings))
    if "package" in refused.value.what or "bitsandbytes" in refused.value.what:
        assert "4bit" in texts
    else:
        assert texts
    arguments = [part for setting in settings for part in ("--set", setting)]
    assert main(["check", str(place / "study.yaml"), *arguments]) == 2


def set_in_configs(**keys):
    """A change of both models' config.json."""

    def change(place):
        for name in ("base", "instruct"):
            path = place / name / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return change


def change_tensors(change, *names):
    """A change of the tensors that some of the models have."""

    def rewritten(place):
        for name in names:
            path = place / name / "model.safetensors"
            tensors = load_file(path)
            change(tensors)
            save_file(tensors, path, metadata={"format": "pt"})

    return rewritten


def without_one(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def with_one_more(tensors):
    tensors["model.layers.1.mlp.more.weight"] = tensors["model.layers.1.mlp.up_proj.weight"] + 1


def with_another_shape(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.norm.weight"].clone()


UNFIT = {
    "a sibling that lacks a tensor": change_tensors(without_one, "instruct"),
    "models that lack a tensor": change_tensors(without_one, "base", "instruct"),
    "models with a tensor too many": change_tensors(with_one_more, "base", "instruct"),
    "models with a tensor of another shape": change_tensors(with_another_shape, "base", "instruct"),
    "a type that transformers does not know": set_in_configs(model_type="unheard"),
    "more layers than there are": set_in_configs(num_hidden_layers=6),
    "fewer layers than there are": set_in_configs(num_hidden_layers=2),
    "another width": set_in_configs(hidden_size=48),
    "another vocabulary": set_in_configs(vocab_size=999),
}


@pytest.mark.parametrize("change", UNFIT.values(), ids=UNFIT)
def test_models_that_cannot_be_merged_are_found(place, change):
    assert not wrong(place)
    change(place)
    (found,) = wrong(place)
    assert found.subject in ("fit", "slices", "search")
    with pytest.raises(EvomergeError):
        evomerge.search(
            place / "study.yaml", storage=place / "s.db", results=place / "r", console=quiet()
        )


def test_check_writes_nothing(place):
    before = sorted(place.rglob("*"))
    assert not wrong(place, storage=place / "new" / "s.db", results=place / "out")
    assert sorted(place.rglob("*")) == before


def test_check_takes_the_options_of_search(place, capsys):
    options = ["--study", "mine", "--storage", "sqlite:///s.db", "--results", "r"]
    options += ["--trials", "33", "--seed", "5"]
    assert main(["check", str(place / "study.yaml"), *options]) == 0
    assert "33 candidates" in capsys.readouterr().out


def test_a_study_that_has_changed_is_found(place):
    where = {"storage": place / "s.db", "results": place / "r"}
    file = place / "study.yaml"
    evomerge.search(file, trials=4, overrides=["search.dtype=float32"], console=quiet(), **where)
    found = evomerge.check(file, overrides=["search.dtype=float32"], **where)
    (advice,) = [finding for finding in found if finding.level != "ok"]
    assert "fewer than five generations of 4" in advice.text
    assert any("tell parents and uniform weights apart" in finding.text for finding in found)
    assert "4 of 12 candidates" in next(f.text for f in found if f.subject == "storage")
    changed = wrong(place, "search.dtype=float32", "search.sigma=0.1", **where)
    assert "search.sigma" in changed[0].text
    assert not wrong(place, "search.sigma=0.1", study="another", **where)


def test_places_that_cannot_be_written_are_found(place):
    (place / "file").write_text("")
    (found,) = wrong(place, results=place / "file" / "results")
    assert found.subject == "--results"
    (found,) = wrong(place, storage=place / "file" / "s.db")
    assert found.subject == "--storage"


def test_outputs_that_would_overwrite_inputs_are_found(place):
    found = wrong(place, storage=place / "tasks.jsonl")
    assert "outputs" in {finding.subject for finding in found}


def test_the_judges_server_is_asked(place):
    settings = ["judge.kind=llm", f"judge.base_url=http://127.0.0.1:{free_port()}/v1"]
    (found,) = wrong(place, *settings)
    assert (found.subject, "cannot be reached" in found.text) == ("judge", True)
    server = Server()
    with server.running() as url:
        settings[1] = f"judge.base_url={url}"
        assert not wrong(place, *settings)
    assert not server.answered, "no answer is graded"
    knowing = Server(known=(["m"], status(404, "no such model")))
    with knowing.running() as url:
        settings[1] = f"judge.base_url={url}"
        (found,) = wrong(place, *settings, "judge.model=other")
    assert "refuses this model" in found.text


@pytest.mark.parametrize(("fields", "told"), [({"output": ""}, True), ({}, False)])
def test_tasks_that_rules_cannot_grade_are_told(place, fields, told):
    rewrite(place, **fields)
    found = evomerge.check(place / "study.yaml")
    warned = [f for f in found if f.subject == "judge" and f.level == "low"]
    assert bool(warned) == told
    assert all("would mean nothing" in finding.text for finding in warned)


def test_the_longest_prompt_of_every_part_is_measured(place):
    rows = [json.loads(line) for line in (place / "tasks.jsonl").read_text().splitlines()]
    for number in (0, 5, 39):
        changed = [row | {"input": "あ" * 60} if row["task_id"] == number else row for row in rows]
        (place / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
        (found,) = wrong(place)
        assert (found.subject, "context" in found.text) == ("context", True), number


def test_a_mergekit_evolve_file_of_a_missing_folder_is_wrong(place):
    data = yaml.safe_load((place / "study.yaml").read_text())
    data["genome"]["base_model"] = "./gone"
    (place / "other.yaml").write_text(yaml.safe_dump(data))
    assert read_study(place / "other.yaml").genome.base_model == str(place / "gone")
    assert main(["check", str(place / "other.yaml")]) == 2


def test_a_length_that_no_file_names_leaves_room_for_prompts(place):
    data = yaml.safe_load((place / "study.yaml").read_text(encoding="utf-8"))
    data.pop("generation", None)
    (place / "study.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    config = json.loads((place / "base" / "config.json").read_text(encoding="utf-8"))
    assert config["max_position_embeddings"] <= 256  # the default length fills it
    assert not wrong(place)
    half = config["max_position_embeddings"] // 2
    found = evomerge.search(
        place / "study.yaml", storage=f"sqlite:///{place}/s.db", results=place / "r",
        overrides=["search.trials=2"], console=quiet(),
    )  # fmt: skip
    assert found.study.generation.max_new_tokens == half
    # a length that is named stays, and is refused
    assert wrong(place, "generation.max_new_tokens=256")


BAD_VALUES = {
    "no heads": ("num_attention_heads", 0),
    "a text as a number": ("num_attention_heads", "four"),
    "heads that do not divide": ("num_attention_heads", 3),
    "no heads of keys": ("num_key_value_heads", 0),
    "a rope setting of the wrong type": ("rope_parameters", 3),
    "an older rope setting of the wrong type": ("rope_scaling", "x"),
    "an unknown kind of rope": ("rope_scaling", {"type": "nothing"}),
    "a rope setting without its factor": ("rope_parameters", {"rope_type": "linear"}),
    "an unknown activation": ("hidden_act", "nothing"),
    "an unknown dtype": ("dtype", "nothing"),
    "a pad token that is none": ("pad_token_id", 99999),
    "no layers": ("num_hidden_layers", -1),
}


@pytest.mark.parametrize("command", ["check", "infer"])
@pytest.mark.parametrize(("key", "value"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_a_bad_value_in_config_json_is_named_there(place, capsys, key, value, command):
    for name in ("base", "instruct"):
        path = place / name / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(config | {key: value}), encoding="utf-8")
    if command == "infer":
        if key == "num_hidden_layers":
            pytest.skip("said otherwise")
        options = ["--tasks", "tasks.jsonl", "--out", "answers.jsonl"]
        assert main(["infer", "--model", "base", *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
    else:
        (found,) = wrong(place)
        assert found.subject == "config.json"
        line = found.text
    assert f"`{key}` in config.json" in line
    assert str(place / "base") in line or "base" in line
    assert f"(found: {value!r})" in line
    assert "tokenizer" not in line
    assert "\n" not in line
    assert len(line) < 600


def test_a_bad_value_in_a_part_of_config_json():
    config = {"model_type": "gemma3", "text_config": {"hidden_activation": "nothing"}}
    with pytest.raises(ModelError, match=r"`text_config.hidden_activation` in config.json") as at:
        check_config(config, "folder")
    assert at.value.where == "folder"
    check_config({"model_type": "gemma3", "text_config": {"num_hidden_layers": 1}})


def test_the_search_says_as_check_does_which_shape_config_json_asks_for(place, capsys):
    """transformers speaks of a report above and of an option that nobody has set."""
    for name in ("base", "instruct"):
        path = place / name / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(config | {"intermediate_size": 80}), encoding="utf-8")
    (found,) = wrong(place)
    assert "has the shape" in found.text
    assert main(["search", "study.yaml"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"evomerge: {found.text}"


def test_a_study_of_encoder_decoders_is_refused_by_their_class(place, capsys):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4}
    for name in ("base", "instruct"):
        model = T5ForConditionalGeneration(T5Config(vocab_size=100, **sizes))
        model.to(torch.bfloat16).save_pretrained(place / name)
    lines = [found.text for found in wrong(place)]
    assert main(["search", "study.yaml"]) == 2
    for line in (*lines, capsys.readouterr().err.splitlines()[-1]):
        assert "models that write text with a decoder alone" in line
        assert "(found: 'T5ForConditionalGeneration'). mergekit may merge it" in line
