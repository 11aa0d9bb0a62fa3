"""The public API: what it returns, that the commands do the same, that importing is cheap."""

import inspect
import io
import json
import os
import subprocess
import sys

import pandas
import pytest
import yaml

import evomerge
from evomerge.cli import main
from evomerge.console import Console
from evomerge.errors import InputError, RecipeError, StudyError, StudyFileError, TaskError
from evomerge.recipe import Recipe
from evomerge.study import read_study

FUNCTIONS = ("search", "check", "merge", "infer", "load_study")


def quiet():
    return Console(io.StringIO())


@pytest.fixture(scope="module")
def searched(pair, tmp_path_factory):
    """(folder, what search returned)."""
    folder = tmp_path_factory.mktemp("api")
    found = evomerge.search(
        pair / "study.yaml",
        storage=folder / "studies.db",
        results=folder / "results",
        trials=8,
        overrides={"search.dtype": "float32"},
        console=quiet(),
    )
    return folder, found


def test_importing_is_cheap():
    heavy = {"torch", "transformers", "optuna", "pydantic", "pandas", "numpy", "yaml", "jinja2"}
    code = (
        "import sys, time; at = time.process_time(); import evomerge; "
        f"print(time.process_time() - at); print(sorted({heavy} & set(sys.modules)))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        for _ in range(3)
    ]
    assert [modules for _, modules in runs] == ["[]"] * 3
    assert min(float(seconds) for seconds, _ in runs) < 0.1


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_is_typed_and_documented(name):
    function = getattr(evomerge, name)
    assert name in evomerge.__all__
    signature = inspect.signature(function)
    assert all(p.annotation is not p.empty for p in signature.parameters.values())
    assert signature.return_annotation is not signature.empty
    text = inspect.getdoc(function)
    for parameter in signature.parameters:
        assert parameter in text.split("Parameters", 1)[1], parameter
    for part in ("Returns\n", "Raises", ">>> "):
        assert part in text, part


def test_search_returns_what_load_study_loads(searched):
    folder, found = searched
    again = evomerge.load_study("tiny", storage=folder / "studies.db")
    assert again.to_json() == found.to_json()
    assert {path.name for path in found.written} == {
        "best.yaml", "README.md", "verdict.json", "report.html", "trials.csv",
    }  # fmt: skip
    assert again.name == found.name == "tiny"
    assert again.verdict.to_dict() == json.loads((folder / "results/tiny/verdict.json").read_text())
    assert again.recipe_yaml == (folder / "results/tiny/best.yaml").read_text()
    assert again.recipe.to_yaml() == again.recipe_yaml
    assert again.study.search.trials == 8
    assert repr(again) == "<study tiny, finished, 12 trials>"


def test_trials_are_the_table_of_trials(searched):
    folder, found = searched
    frame = found.trials
    written = pandas.read_csv(folder / "results/tiny/trials.csv")
    assert list(frame.columns) == list(written.columns)
    assert frame["score"].tolist() == pytest.approx(written["score"].tolist())
    assert frame["generation"].isna().tolist() == written["generation"].isna().tolist()
    candidates = frame[frame.role == "candidate"]
    assert (candidates["generation"].min(), candidates["index"].min()) == (1, 1)
    assert found.best.score == candidates.score.max()
    assert found.winner.number in frame.number.tolist()
    assert [tuple(row) for row in frame.filter(like="weight ").to_numpy()] == [
        r.vector for r in found.records
    ]


def test_search_continues_and_accepts_a_mapping_and_a_study(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(pair)
    content = yaml.safe_load((pair / "study.yaml").read_text())
    where = {"storage": tmp_path / "s.db", "results": tmp_path, "console": quiet()}
    first = evomerge.search(content, trials=4, **where)
    study = read_study(pair / "study.yaml")
    more = evomerge.search(study, overrides={"search.trials": 8}, **where)
    assert more.to_json()["trials"][:8] == first.to_json()["trials"]
    assert sum(r.role == "candidate" for r in more.records) == 8
    assert content == yaml.safe_load((pair / "study.yaml").read_text())
    with pytest.raises(StudyError, match=r"search\.sigma"):
        evomerge.search(content, overrides={"search.sigma": 0.5}, **where)


def test_a_running_study_is_loaded(pair, tmp_path):
    class Stop(io.StringIO):
        def write(self, text):
            if "candidate 3/" in text:
                raise KeyboardInterrupt
            return super().write(text)

        def isatty(self):
            return True

    with pytest.raises(KeyboardInterrupt):
        evomerge.search(
            pair / "study.yaml",
            storage=tmp_path / "s.db",
            results=tmp_path,
            console=Console(Stop()),
        )
    found = evomerge.load_study("tiny", storage=tmp_path / "s.db")
    assert found.verdict is None
    assert found.winner.number in found.trials.number.tolist()
    assert "no verdict" not in repr(found)
    assert "running" in repr(found)


def test_a_read_only_copy_suffices(searched, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everything")
    copy = tmp_path / "read-only"
    copy.mkdir()
    (copy / "s.db").write_bytes((searched[0] / "studies.db").read_bytes())
    (copy / "s.db").chmod(0o444)
    copy.chmod(0o555)
    try:
        found = evomerge.load_study("tiny", storage=copy / "s.db")
        assert found.to_json() == searched[1].to_json()
    finally:
        copy.chmod(0o755)


def test_check_returns_findings_and_the_command_prints_them(pair, capsys):
    findings = evomerge.check(pair / "study.yaml")
    (advice,) = [finding for finding in findings if finding.level != "ok"]
    assert "12 candidates are fewer than five generations" in advice.text
    assert main(["check", str(pair / "study.yaml")]) == 0
    lines = [f"{f.level:8}{f.subject}: {f.text}" for f in findings if f.subject != "disk"]
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if not line.startswith("ok      disk")] == lines
    wrong = evomerge.check(pair / "study.yaml", overrides=["genome.base_model=./nothing"])
    assert any(f.level == "wrong" for f in wrong)


def test_merge_takes_a_file_a_mapping_and_a_recipe(searched, tmp_path):
    folder, found = searched
    best = folder / "results/tiny/best.yaml"
    built = [
        evomerge.merge(source, tmp_path / str(i), console=quiet())
        for i, source in enumerate((best, str(best), found.recipe.to_dict(), found.recipe))
    ]
    built.append(found.build_model(tmp_path / "model", console=quiet()))
    weights = {(path / "model.safetensors").read_bytes() for path in built}
    assert len(weights) == 1
    assert "## Verdict" in (built[-1] / "README.md").read_text()
    with pytest.raises(InputError, match=str(built[0])):
        evomerge.merge(best, built[0], console=quiet())
    with pytest.raises(RecipeError):
        evomerge.merge({"merge_method": "none"}, tmp_path / "none", console=quiet())


def test_infer_by_recipe_study_and_model_agree(searched, pair, tmp_path):
    folder, found = searched
    tasks = [{"task_id": "a", "input": "あい"}, {"input": "うえ"}]
    model = evomerge.merge(found.recipe, tmp_path / "merged", console=quiet())
    ways = (
        {"study": "tiny", "storage": folder / "studies.db"},
        {"recipe": found.recipe},
        {"recipe": found.recipe.to_dict()},
        {"recipe": folder / "results/tiny/best.yaml"},
        {"model": model},
    )
    results = [evomerge.infer(tasks, max_new_tokens=12, console=quiet(), **way) for way in ways]
    assert len({tuple(result.records) for result in results}) == 1
    result = results[0]
    assert [(r.task_id, r.input) for r in result] == [("a", "あい"), (1, "うえ")]
    assert (len(result), result.answered, result.unfinished, result.out) == (2, 2, 0, None)
    assert result[0] in result
    assert not result[0].unfinished


def test_infer_writes_the_file_of_the_command(pair, tmp_path):
    tasks = pair / "tasks.jsonl"
    result = evomerge.infer(
        tasks, out=tmp_path / "a.jsonl", model=pair / "base", max_new_tokens=6, console=quiet()
    )
    command = ["infer", "--model", str(pair / "base"), "--tasks", str(tasks)]
    assert main([*command, "--out", str(tmp_path / "b.jsonl"), "--max-new-tokens", "6"]) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["output"] for row in rows] == [record.output for record in result]
    late = evomerge.infer(tasks, model=pair / "base", time_limit=0.001, console=quiet())
    assert {record.unfinished for record in late} == {"time limit"}
    refined = evomerge.infer(
        [{"input": "あ"}],
        model=pair / "base",
        max_new_tokens=4,
        best_of=2,
        self_check="all",
        console=quiet(),
    )
    assert [note.split(" ")[0] for note in refined.notes] == ["best", "self-check"]


def test_mistakes_name_the_parameter(pair, tmp_path):
    tasks = [{"input": "あ"}]
    for options, words in (
        ({}, "Give exactly one of infer: model"),
        ({"model": "m", "study": "s"}, "not clear which model answers"),
        ({"model": "m", "best_of": 1}, "infer: best_of: must be 2 or more"),
        ({"model": "m", "judge": "rules"}, "infer: judge: chooses among several answers"),
        ({"model": "m", "self_check": ["boring"]}, "infer: self_check: is not a known fault"),
        ({"model": "m", "concurrency": 2}, "infer: concurrency: applies to a server only"),
    ):
        with pytest.raises(InputError, match=words):
            evomerge.infer(tasks, console=quiet(), **options)
    with pytest.raises(TaskError, match="`input`"):
        evomerge.infer([{"text": "あ"}], model="m", console=quiet())
    with pytest.raises(StudyError, match="no study"):
        evomerge.load_study("none", storage=tmp_path / "none.db")
    with pytest.raises(StudyFileError, match="genom"):
        evomerge.check({"genom": {}})


def test_plots_are_optunas(searched):
    pytest.importorskip("plotly")
    found = searched[1]
    for plot in ("plot_history", "plot_importances", "plot_slices", "plot_parallel"):
        assert getattr(found, plot)().data, plot


def test_without_plotly_plots_say_what_to_install(searched, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"evomerge\[plot\]"):
        searched[1].plot_history()


def test_the_version_is_one():
    assert evomerge.__version__ == "0.2.0"
    assert isinstance(Recipe, type)


@pytest.mark.parametrize("name", ["2026_11_29", "2026-11-29", "007", "on", "1.10"])
def test_a_name_is_text_whatever_yaml_makes_of_it(pair, tmp_path, name):
    found = evomerge.search(
        pair / "study.yaml", study=name, trials=4, storage=str(tmp_path / "s.db"), results=tmp_path
    )
    assert found.name == name
    assert evomerge.load_study(name, storage=tmp_path / "s.db").name == name
