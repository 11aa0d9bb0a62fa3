"""The runner to take along: its files, its merge and its answers are evomerge's, and it needs no
evomerge.
"""
# ruff: noqa: F401, F811  # family is a fixture

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from merging_tools import SLICES, random_recipe, same_bits
from runner_tools import (
    ALLOWED,
    FORBID,
    PROGRAM,
    ROOT,
    a_base,
    engine_of,
    evomerge_answers,
    family,
    finish,
    linear_recipe,
    loaded,
    merged,
    rows,
    run,
    task_file,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evomerge.errors import InputError, KnowledgeError
from evomerge.recipe import Recipe
from evomerge.reporting.runner import mergeable, write_runner
from evomerge.study import PromptSection


@pytest.mark.parametrize("path", PROGRAM, ids=lambda path: path.name)
def test_readable_files_of_few_packages(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    assert max(map(len, text.splitlines())) <= 100
    tree = ast.parse(text)
    found = {
        alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    found |= {
        node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
    }
    assert found <= ALLOWED


def test_the_ranges_are_those_of_the_project(family, tmp_path):
    write_runner(finish(family), tmp_path / "r", None)
    ours = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "dependencies"
        ]
    )
    wanted = (tmp_path / "r" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert set(wanted) <= ours
    assert [re.match(r"[\w-]+", line)[0] for line in wanted] == ["transformers", "scikit-learn"]


def test_the_folder(family, tmp_path):
    out = tmp_path / "r"
    written = write_runner(finish(family), out, a_base())
    assert sorted(written) == sorted(out.iterdir())
    assert {path.name for path in written} == {
        "answer.py",
        "answer_tools.py",
        "thoughts.py",
        "recipe.yaml",
        "settings.yaml",
        "knowledge.yaml",
        "README.md",
        "requirements.txt",
    }
    for path in PROGRAM:
        assert (out / path.name).read_bytes() == path.read_bytes()
    readme = (out / "README.md").read_text(encoding="utf-8")
    assert "| winner | 0.500 | 0.100 | 0% |" in readme
    assert str(family / "one") in readme
    with pytest.raises(InputError, match="already exists"):
        write_runner(finish(family), out, None)
    write_runner(finish(family), tmp_path / "plain", None)
    assert not (tmp_path / "plain" / "knowledge.yaml").exists()
    with pytest.raises(KnowledgeError, match="default class"):
        write_runner(
            finish(family, prompt=PromptSection(knowledge="b", default_class="無")),
            tmp_path / "bad",
            a_base(),
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("siblings", [("one",), ("one", "two")])
def test_the_merge_has_evomerges_bits(family, tmp_path, dtype, normalize, siblings):
    recipe = random_recipe(
        family, siblings, torch.Generator().manual_seed(1), dtype=dtype, normalize=normalize
    )
    finished = finish(family, recipe, dtype)
    write_runner(finished, tmp_path / "r", None)
    ours = engine_of(finished).model.state_dict()
    theirs = merged(
        tmp_path / "r", recipe.donor, getattr(torch, dtype), {ref: ref for ref in recipe.models}
    )
    assert len(theirs) > 30
    assert [name for name, tensor in theirs.items() if not same_bits(tensor, ours[name])] == []


@pytest.mark.parametrize("quantised", ["base", "one"])
def test_quantised_weights_are_refused_and_not_merged_as_they_are(family, tmp_path, quantised):
    recipe = random_recipe(family, ("one",), torch.Generator().manual_seed(1), dtype="bfloat16")
    write_runner(finish(family, recipe, "bfloat16"), tmp_path / "r", None)
    places = {ref: str(tmp_path / Path(ref).name) for ref in recipe.models}
    model = AutoModelForCausalLM.from_pretrained(recipe.donor, dtype=torch.bfloat16)
    model.requires_grad_(False)
    for ref, place in places.items():
        shutil.copytree(ref, place)
    tensors = load_file(tmp_path / quantised / "model.safetensors")
    for name in [name for name in tensors if "proj" in name]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        if quantised == "base":
            model.get_parameter(name).data = tensors[name]
    save_file(tensors, tmp_path / quantised / "model.safetensors")
    with pytest.raises(SystemExit, match=r"is quantised: evomerge export STUDY --model DIR"):
        loaded(tmp_path / "r").merge(model, recipe.donor, places)


@pytest.mark.parametrize("base", ["base", None])
def test_linear_merges_too(family, tmp_path, base):
    recipe = linear_recipe(family, base=base)
    finished = finish(family, recipe)
    write_runner(finished, tmp_path / "r", None)
    theirs = merged(
        tmp_path / "r", recipe.donor, torch.float32, {ref: ref for ref in recipe.models}
    )
    files = {
        ref: AutoModelForCausalLM.from_pretrained(ref, dtype=torch.float64).state_dict()
        for ref in recipe.models
    }
    for name, tensor in theirs.items():  # a plain formula in float64
        at = (
            0
            if "embed" in name
            else next(
                (
                    i
                    for i, (a, b) in enumerate(SLICES)
                    if re.search(r"layers\.(\d+)", name)
                    and a <= int(re.search(r"layers\.(\d+)", name)[1]) < b
                ),
                len(SLICES) - 1,
            )
        )
        weights = {s.model: s.parameters["weight"] for s in recipe.slices[at].sources}
        wanted = sum(w * files[ref][name] for ref, w in weights.items()) / sum(weights.values())
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-7)


def test_what_it_cannot_merge(family, tmp_path, monkeypatch, capsys):
    data = random_recipe(family, ("one",), torch.Generator(), dtype="float32").to_dict()
    odd = [data | {"merge_method": "ties"}, data | {"tokenizer_source": "union"}]
    odd.append(data | {"slices": data["slices"][::-1]})
    data["slices"][0]["sources"][0]["parameters"]["weight"] = [
        {"filter": "mlp", "value": 1.0},
        {"value": 0.5},
    ]
    assert [mergeable(Recipe.from_dict(d)) for d in (*odd, data)] == [False] * 4
    finished = finish(family, Recipe.from_dict(odd[0]))
    write_runner(finished, tmp_path / "r", None)
    assert "--model merged/" in (tmp_path / "r" / "README.md").read_text(encoding="utf-8")
    tasks, out = task_file(tmp_path, 3), tmp_path / "out.jsonl"
    with pytest.raises(SystemExit):
        run(tmp_path / "r", monkeypatch, "--tasks", tasks, "--out", out)
    assert "export STUDY --model DIR" in capsys.readouterr().err.splitlines()[-1]
    run(tmp_path / "r", monkeypatch, "--tasks", tasks, "--out", out, "--model", family / "base")
    assert [row["task_id"] for row in rows(out)] == ["t0", "t1", "t2"]


def test_every_form_of_task_file(family, tmp_path, monkeypatch, capsys):
    write_runner(finish(family, stop=("い",)), tmp_path / "r", None)
    path, out = tmp_path / "t.jsonl", tmp_path / "o.jsonl"
    path.write_bytes(
        '\ufeff\r\n{"task_id": 5, "input": "猫"}\r\n{\r\n "input":\r\n "犬\\u2028"}\r\n\r\n'
        '{"task_id": null, "input": "鳥"} '.encode()
    )
    run(tmp_path / "r", monkeypatch, "--tasks", path, "--out", out)
    assert [
        (row["task_id"], row["input"])
        for row in map(json.loads, out.read_text("utf-8").split("\n")[:-1])
    ] == [
        (5, "猫"),
        (1, "犬\u2028"),
        (2, "鳥"),
    ]
    assert [list(row)[:3] for row in map(json.loads, out.read_text("utf-8").split("\n")[:-1])] == [
        ["task_id", "input", "output"]
    ] * 3
    assert "い" not in "".join(
        json.loads(line)["output"] for line in out.read_text("utf-8").split("\n")[:-1]
    )
    for wrong in (
        '{"task_id": 1, "input": "a"}{"task_id": "1", "input": "b"}',
        '{"task_id": 1}',
        '{"input": " "}',
    ):
        path.write_text(wrong, encoding="utf-8")
        with pytest.raises(SystemExit):
            run(tmp_path / "r", monkeypatch, "--tasks", path, "--out", out)
        assert "t.jsonl, line 1: " in capsys.readouterr().err.splitlines()[-1]
    path.write_text('{"input": "\\ud800"}', encoding="utf-8")
    with pytest.raises(SystemExit, match="surrogate"):
        run(tmp_path / "r", monkeypatch, "--tasks", path, "--out", out)


def test_a_model_that_is_elsewhere(family, tmp_path, monkeypatch, capsys):
    data = yaml.safe_load(finish(family).recipe.to_yaml().replace(str(family), "/no/such"))
    finished = finish(family, Recipe.from_dict(data))
    write_runner(finished, tmp_path / "r", None)
    arguments = ["--tasks", task_file(tmp_path, 5), "--out", tmp_path / "a.jsonl"]
    with pytest.raises(SystemExit):
        run(tmp_path / "r", monkeypatch, *arguments)
    assert re.search(
        r"no folder .*--path /no/such/\w+=FOLDER", capsys.readouterr().err.splitlines()[-1]
    )
    paths = [f"/no/such/{name}={family / name}" for name in ("base", "one", "two")]
    run(tmp_path / "r", monkeypatch, *arguments, "--path", *paths)
    write_runner(finish(family), tmp_path / "here", None)
    run(tmp_path / "here", monkeypatch, *arguments[:2], "--out", tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


@pytest.mark.parametrize("based", [True, False])
def test_answers_are_evomerges(family, tmp_path, monkeypatch, based):
    knowledge = a_base() if based else None
    finished = finish(family, repetition_penalty=1.2)
    write_runner(finished, tmp_path / "r", knowledge)
    tasks = task_file(tmp_path, 24)
    run(tmp_path / "r", monkeypatch, "--tasks", tasks, "--out", tmp_path / "theirs.jsonl")
    wanted = evomerge_answers(finished, tasks, tmp_path / "ours.jsonl", knowledge)
    assert (tmp_path / "theirs.jsonl").read_bytes() == wanted
    assert len({row["output"] for row in rows(tmp_path / "theirs.jsonl")}) > 12
    assert not (tmp_path / "theirs.jsonl.part").exists()


def test_a_time_limit_and_what_comes_after_it(family, tmp_path, monkeypatch):
    write_runner(finish(family), tmp_path / "r", a_base())
    tasks, out = task_file(tmp_path, 24), tmp_path / "o.jsonl"
    arguments = ("--tasks", tasks, "--out", out)
    with pytest.raises(SystemExit, match="no task was answered within the time limit") as caught:
        run(tmp_path / "r", monkeypatch, *arguments, "--time-limit", "0.001s")
    assert caught.value.code == 1
    assert [row["task_id"] for row in rows(out)] == [f"t{i}" for i in range(24)]
    assert {(row["output"], row.get("unfinished")) for row in rows(out)} == {("", "time limit")}
    run(tmp_path / "r", monkeypatch, *arguments)
    assert not any("unfinished" in row for row in rows(out))


def test_without_evomerge_killed_and_resumed(family, tmp_path):
    """Nothing is answered twice: an answer that is changed in OUT.part stays so."""
    finished = finish(family, max_new_tokens=60)
    write_runner(finished, tmp_path / "r", a_base())
    tasks, out, part = task_file(tmp_path, 16), tmp_path / "o.jsonl", tmp_path / "o.jsonl.part"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [
        sys.executable,
        "-c",
        FORBID,
        str(tmp_path / "r" / "answer.py"),
        "--tasks",
        str(tasks),
        "--out",
        str(out),
    ]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    # whole at any time
    while not (part.exists() and len(json.loads(part.read_text("utf-8"))) >= 4):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    kept = json.loads(part.read_text("utf-8"))
    marked = {
        key: answer | {"output": f"marked {answer['output']}"} for key, answer in kept.items()
    }
    part.write_text(json.dumps(marked), encoding="utf-8")
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    marks = len(marked)
    assert re.match(r"(\d+) of 16 tasks", done.stdout)
    assert marks < int(done.stdout.split()[0]) <= marks + 4
    found = rows(out)
    assert sum(row["output"].startswith("marked ") for row in found) == marks
    plain = [row | {"output": row["output"].removeprefix("marked ")} for row in found]
    evomerge_answers(finished, tasks, tmp_path / "ours.jsonl", a_base())
    assert plain == rows(tmp_path / "ours.jsonl")
    assert not part.exists()
