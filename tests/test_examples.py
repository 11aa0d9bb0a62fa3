"""The examples run as their docstrings say, on the tiny pair."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_says_how_to_run_it(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert f"python examples/{path.name} " in ast.get_docstring(ast.parse(text))
    shown = subprocess.run(
        [sys.executable, path, "--help"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.startswith("usage:")


def test_search_own_pair(pair, tmp_path, monkeypatch, capsys):
    arguments = [pair / "base", pair / "instruct", pair / "tasks.jsonl", "--out", tmp_path / "o"]
    run(
        monkeypatch,
        "search_own_pair.py",
        *arguments,
        "--max-new-tokens",
        "16",
        "--trials",
        4,
        "--layers",
        2,
    )
    shown = capsys.readouterr().out
    assert "merge_method: task_arithmetic" in shown
    assert "winner" in shown
    assert (tmp_path / "o/my-pair/report.html").is_file()
    run(
        monkeypatch,
        "search_own_pair.py",
        *arguments,
        "--max-new-tokens",
        "16",
        "--trials",
        8,
        "--layers",
        2,
    )
    assert (tmp_path / "o/my-pair/trials.csv").read_text().count(",candidate,") == 8


def test_merge_and_chat(pair, tmp_path, monkeypatch, capsys):
    config = tmp_path / "best.yaml"
    config.write_text(
        f"merge_method: task_arithmetic\nbase_model: {pair / 'base'}\ndtype: bfloat16\n"
        f"models: [{{model: {pair / 'instruct'}, parameters: {{weight: 0.5}}}}]\n"
    )
    arguments = [config, tmp_path / "merged", "--say", "あい", "--say", "う"]
    run(monkeypatch, "merge_and_chat.py", *arguments, "--max-new-tokens", 4)
    assert (tmp_path / "merged/model.safetensors").is_file()
    first = capsys.readouterr().out
    run(monkeypatch, "merge_and_chat.py", *arguments, "--max-new-tokens", 4)
    assert capsys.readouterr().out == first


def test_judge_answers(pair, monkeypatch, capsys):
    models = [pair / "base", pair / "instruct"]
    run(monkeypatch, "judge_answers.py", pair / "tasks.jsonl", *models, "--max-new-tokens", 8)
    lines = capsys.readouterr().out.splitlines()
    means = [float(line.split("mean grade ")[1].split(" ")[0]) for line in lines[:2]]
    difference = float(lines[2].split(" ")[1])
    assert difference == pytest.approx(means[0] - means[1], abs=2e-3)
