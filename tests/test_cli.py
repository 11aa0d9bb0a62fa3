"""The commands as a user calls them, on the tiny pair."""

import itertools
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from evomerge.cli import main


@pytest.fixture(scope="module")
def searched(pair, tmp_path_factory):
    """A finished study: (folder, storage URL)."""
    folder = tmp_path_factory.mktemp("searched")
    url = f"sqlite:///{folder}/studies.db"
    assert (
        main(
            [
                "search",
                str(pair / "study.yaml"),
                "--storage",
                url,
                "--results",
                str(folder / "results"),
            ]
        )
        == 0
    )
    return folder, url


def shown(capsys, url):
    capsys.readouterr()
    assert main(["show", "tiny", "--json", "--storage", url]) == 0
    return json.loads(capsys.readouterr().out)


def fails(capsys, argv, code, *words):
    assert main(argv) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.strip().splitlines()[-1]
    assert line.startswith("evomerge: ")
    for word in words:
        assert word in line
    return line


def test_show_json_is_the_stable_form(searched, capsys):
    data = shown(capsys, searched[1])
    assert set(data) == {"study", "winner", "best", "unbeaten", "trials", "verdict"}
    assert {frozenset(t) for t in data["trials"]} == {
        frozenset(
            {
                "number",
                "generation",
                "index",
                "role",
                "state",
                "weights",
                "score",
                "stderr",
                "n",
                "truncated",
            }
        )
    }
    roles = [t["role"] for t in data["trials"]]
    assert roles == ["parent", "parent", "uniform", *["candidate"] * 12, "mean"]
    assert [t["weights"] for t in data["trials"][:2]] == [[0.0] * 4, [1.0] * 4]
    assert [(t["generation"], t["index"]) for t in data["trials"][3:]] == [
        *itertools.product((1, 2, 3), (1, 2, 3, 4)),
        (3, None),  # the mean after three generations
    ]
    assert len({t["score"] for t in data["trials"]}) > 8
    verdict = data["verdict"]
    assert verdict["n"] == 20
    # a reference wins here, and the search's own merge is tested beside it
    names = {"base", "instruct", "uniform", "found"}
    assert data["unbeaten"] is not None
    assert set(verdict["candidates"]) == {"winner", *names}
    assert data["trials"][data["best"]]["role"] in ("parent", "uniform")
    assert set(verdict["paired"]) < {f"winner-{name}" for name in names}
    assert len(verdict["paired"]) == 3
    assert json.loads((searched[0] / "results/tiny/verdict.json").read_text()) == verdict


def test_all_results_are_there(searched):
    assert {p.name for p in (searched[0] / "results/tiny").iterdir()} == {
        "best.yaml",
        "README.md",
        "verdict.json",
        "report.html",
        "trials.csv",
    }


def test_the_same_command_again_does_nothing_twice(pair, searched, capsys):
    before = shown(capsys, searched[1])
    assert (
        main(
            [
                "search",
                str(pair / "study.yaml"),
                "--storage",
                searched[1],
                "--results",
                str(searched[0] / "results"),
            ]
        )
        == 0
    )
    assert shown(capsys, searched[1]) == before


def test_more_trials_go_on(pair, searched, capsys, tmp_path):
    copy = tmp_path / "copy.db"
    shutil.copy(searched[0] / "studies.db", copy)
    url = f"sqlite:///{copy}"
    before = shown(capsys, url)["trials"]
    assert (
        main(
            [
                "search",
                str(pair / "study.yaml"),
                "--storage",
                url,
                "--results",
                str(tmp_path),
                "--trials",
                "16",
            ]
        )
        == 0
    )
    after = shown(capsys, url)["trials"]
    assert after[: len(before)] == before
    assert [t["role"] for t in after[len(before) :]] == ["candidate"] * 4 + ["mean"]


def test_export_and_merge_are_the_same_bits_as_the_live_model(pair, searched, capsys, tmp_path):
    assert main(["export", "tiny", "--storage", searched[1]]) == 0
    text = capsys.readouterr().out
    assert text == (searched[0] / "results/tiny/best.yaml").read_text()
    (tmp_path / "best.yaml").write_text(text)
    assert main(["merge", str(tmp_path / "best.yaml"), str(tmp_path / "merged")]) == 0
    assert (
        main(["export", "tiny", "--storage", searched[1], "--model", str(tmp_path / "model")]) == 0
    )
    merged, model = (
        load_file(tmp_path / "merged/model.safetensors"),
        load_file(tmp_path / "model/model.safetensors"),
    )
    assert merged.keys() == model.keys()
    assert all(torch.equal(merged[name], model[name]) for name in merged)
    # the formula itself, for one tensor: b + r(r(x - b) * r(w)), all in bf16
    best = shown(capsys, searched[1])
    weight = best["trials"][best["best"]]["weights"][2]
    base, instruct = (
        load_file(pair / m / "model.safetensors")["model.layers.2.mlp.up_proj.weight"]
        for m in ("base", "instruct")
    )
    assert torch.equal(
        merged["model.layers.2.mlp.up_proj.weight"],
        base + (instruct - base) * torch.tensor(weight).bfloat16(),
    )


def test_inference_by_study_and_by_folder_agree(searched, pair, tmp_path):
    storage = ["--storage", searched[1]]
    assert main(["export", "tiny", *storage, "--model", str(tmp_path / "model")]) == 0
    tasks = ["--tasks", str(pair / "tasks.jsonl"), "--max-new-tokens", "12", "--batch-size", "8"]
    assert (
        main(["infer", "--study", "tiny", *storage, *tasks, "--out", str(tmp_path / "a.jsonl")])
        == 0
    )
    assert (
        main(
            [
                "infer",
                "--model",
                str(tmp_path / "model"),
                *tasks,
                "--out",
                str(tmp_path / "b.jsonl"),
            ]
        )
        == 0
    )
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["task_id"] for line in lines] == list(range(40))
    keys = ["task_id", "input", "output"]
    assert all(list(line) in (keys, [*keys, "truncated"]) for line in lines)


def test_judge_grade_writes_json_lines(pair, tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"task_id": 0, "output": "あいあおかきくけ", "model": "m"}\n'
        '{"task_id": 1, "output": "", "model": "m"}\n'
    )
    out = tmp_path / "g.jsonl"
    assert (
        main(
            [
                "judge",
                "grade",
                "--tasks",
                str(pair / "tasks.jsonl"),
                "--answers",
                str(tmp_path / "a.jsonl"),
                "--judge",
                "rules",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["task_id"], r["judge"], r["model"]) for r in rows] == [
        (0, "rules", "m"),
        (1, "rules", "m"),
    ]
    assert rows[0]["grade"] > rows[1]["grade"] == 1.0


def test_check_works_without_the_hub(tmp_path, capsys):
    config = {
        "model_type": "llama",
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    }
    config |= {
        "intermediate_size": 13824,
        "vocab_size": 99584,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (
        main(
            [
                "check",
                "search_spaces/llm-jp-3-13b.yaml",
                "--base-config",
                str(tmp_path / "config.json"),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    # Llama by hand: 40 layers of 4 h² + 3 h f + 2 h, two embeddings and a norm
    parameters = 40 * (4 * 5120**2 + 3 * 5120 * 13824 + 2 * 5120) + 2 * 99584 * 5120 + 5120
    assert f"{parameters / 1e9:.2f} B parameters" in out
    assert "20 of 2 layers" in out
    assert "llm-jp/llm-jp-3-13b-instruct" in out


def test_a_changed_study_is_refused_and_named(pair, searched, capsys, tmp_path):
    url = searched[1]
    fails(
        capsys,
        ["search", str(pair / "study.yaml"), "--storage", url, "--set", "search.sigma=0.5"],
        2,
        "search.sigma",
        "changed",
    )
    copy = tmp_path / "pair"
    shutil.copytree(pair, copy)
    run = [
        "search",
        str(copy / "study.yaml"),
        "--storage",
        f"sqlite:///{tmp_path}/s.db",
        "--results",
        str(tmp_path / "r"),
        "--trials",
        "4",
    ]
    assert main(run) == 0
    tasks = (copy / "tasks.jsonl").read_text()
    (copy / "tasks.jsonl").write_text(tasks.replace("あ", "い"))
    capsys.readouterr()
    fails(capsys, run, 2, "the tasks")
    (copy / "tasks.jsonl").write_text(tasks)
    shutil.copy(copy / "base/model.safetensors", copy / "instruct/model.safetensors")
    fails(capsys, run, 2, "the model", "instruct")


def test_errors_of_the_user_are_one_line(pair, capsys, tmp_path):
    url = f"sqlite:///{tmp_path}/none.db"
    fails(capsys, ["show", "nobody", "--storage", url], 2, "no study 'nobody'")
    fails(
        capsys, ["search", str(tmp_path / "none.yaml"), "--storage", url], 2, "no such study file"
    )
    fails(
        capsys,
        [
            "search",
            str(pair / "study.yaml"),
            "--storage",
            url,
            "--set",
            "genome.base_model=./nothing",
        ],
        2,
        "nothing",
    )
    fails(
        capsys,
        [
            "infer",
            "--model",
            str(tmp_path / "none"),
            "--tasks",
            str(pair / "tasks.jsonl"),
            "--out",
            str(tmp_path / "o"),
        ],
        2,
        "none",
    )
    fails(
        capsys,
        [
            "infer",
            "--study",
            "tiny",
            "--storage",
            url,
            "--tasks",
            str(tmp_path / "t"),
            "--out",
            str(tmp_path / "o"),
        ],
        2,
        "no such task file",
    )


def test_several_siblings_and_a_device_map(pair, capsys, tmp_path):
    shutil.copytree(pair, tmp_path / "pair")
    shutil.copytree(pair / "instruct", tmp_path / "pair/math")
    study = (
        (tmp_path / "pair/study.yaml").read_text().replace("[./instruct]", "[./instruct, ./math]")
    )
    (tmp_path / "pair/study.yaml").write_text(study)
    url = f"sqlite:///{tmp_path}/s.db"
    run = [
        "search",
        str(tmp_path / "pair/study.yaml"),
        "--storage",
        url,
        "--results",
        str(tmp_path / "r"),
        "--trials",
        "8",
    ]
    assert main([*run, "--set", "engine.device_map=auto", "--set", "genome.normalize=true"]) == 0
    data = shown(capsys, url)
    assert [t["weights"] for t in data["trials"][:3]] == [[0.0] * 8, [1.0, 0.0] * 4, [0.0, 1.0] * 4]
    names = {"winner", "base", "sibling:instruct", "sibling:math", "uniform"}
    if data["unbeaten"] is not None:
        names.add("found")
    assert set(data["verdict"]["candidates"]) == names
    assert main(["merge", str(tmp_path / "r/tiny/best.yaml"), str(tmp_path / "merged")]) == 0


def test_correct_needs_closed_tasks(pair, capsys, tmp_path):
    shutil.copytree(pair, tmp_path / "pair")
    long = (
        "これは長い参照解答であり、単語や数字や一覧ではない。自由な文章として書かれているので、正誤は決まらない。"
        * 3
    )
    rows = [{"task_id": i, "input": "あ" * (i + 1), "output": long} for i in range(8)]
    (tmp_path / "pair/tasks.jsonl").write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    )
    run = [
        "search",
        str(tmp_path / "pair/study.yaml"),
        "--storage",
        f"sqlite:///{tmp_path}/s.db",
        "--set",
        "judge.metric=correct",
    ]
    fails(capsys, run, 2, "judge.metric", "closed")


def test_a_study_in_use_is_refused(pair, capsys, tmp_path):
    from evomerge.searching.ledger import only_worker

    url = f"sqlite:///{tmp_path}/s.db"
    with only_worker(url, "tiny"):
        fails(capsys, ["search", str(pair / "study.yaml"), "--storage", url], 2, "another process")


def test_a_damaged_storage_is_one_line(pair, searched, capsys, tmp_path):
    data = (searched[0] / "studies.db").read_bytes()
    (tmp_path / "cut.db").write_bytes(data[: len(data) // 2])
    fails(
        capsys,
        ["show", "tiny", "--storage", f"sqlite:///{tmp_path}/cut.db"],
        1,
        "is damaged or cut short",
    )


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["search"],
        ["check"],
        ["show"],
        ["export"],
        ["merge"],
        ["infer"],
        ["judge"],
        ["judge", "grade"],
        ["judge", "validate"],
        ["judge", "fit"],
        ["knowledge"],
        ["knowledge", "new"],
        ["knowledge", "check"],
        ["knowledge", "from-tasks"],
        ["report"],
        ["cache"],
        ["demo"],
        ["schema"],
    ],
)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: evomerge")
    assert re.search(r"\nexamples?:\n  evomerge ", out)


def test_help_is_printed_without_the_heavy_libraries():
    code = "import sys, runpy; sys.argv = ['evomerge', '--help']; runpy.run_module('evomerge')"
    heavy = "{'torch', 'transformers', 'optuna', 'pandas', 'numpy', 'yaml', 'jinja2'}"
    check = f"import atexit; atexit.register(lambda: print(sorted({heavy} & set(sys.modules))))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {check}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("usage: evomerge")
    assert done.stdout.splitlines()[-1] == "[]"
