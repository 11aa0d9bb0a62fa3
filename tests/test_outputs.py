"""No command overwrites what it reads, however the output is named."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

import evomerge
from evomerge.api.inputs import check_no_study_file
from evomerge.cli import main
from evomerge.errors import InputError
from evomerge.outputs import check_outputs
from evomerge.searching.ledger import cache_path

TASKS = [{"task_id": i, "input": f"{i} + 1 = ?", "output": str(i + 1)} for i in range(4)]


def digests(folder):
    """The content of every file, by its path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and ".lock" not in path.name:
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def searched(pair, tmp_path_factory):
    """A folder with a finished study, its models, files and results."""
    place = tmp_path_factory.mktemp("searched")
    shutil.copytree(pair, place, dirs_exist_ok=True)
    storage = f"sqlite:///{place}/s.db"
    where = ["--storage", storage, "--results", str(place / "results")]
    assert main(["search", str(place / "study.yaml"), *where, "--trials", "4"]) == 0
    tasks = lines(place / "t.jsonl", TASKS)
    answers = [{"task_id": t["task_id"], "output": t["output"]} for t in TASKS]
    lines(place / "a.jsonl", answers)
    lines(place / "g.jsonl", [{"task_id": 0, "judge": "j", "grade": 3}])
    (place / "j.npz").write_text("a judge")
    (place / "k.csv").write_text("class,input,output\nk,a,b\n")
    shutil.copy(place / "results/tiny/best.yaml", place / "best.yaml")
    shutil.copy(tasks, place / "x.classes.jsonl")
    shutil.copy(place / "best.yaml", place / "y.jsonl.part")
    return place


def refused(place, capsys, *command):
    """A command, with {} for the folder, that must change nothing and say why in one line."""
    before = digests(place)
    assert main([part.replace("{}", str(place)) for part in command]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "what this command reads" in line or "is a study file" in line
    assert digests(place) == before


GRADE = ["judge", "grade", "--tasks", "{}/t.jsonl", "--answers", "{}/a.jsonl", "--out"]
FIT = [
    "judge", "fit", "--tasks", "{}/t.jsonl", "--answers", "{}/a.jsonl", "--grades", "{}/g.jsonl",
    "--reference", "j", "--out",
]  # fmt: skip
MODEL = ["infer", "--model", "{}/base", "--tasks", "{}/t.jsonl", "--out"]
STUDY = ["--storage", "sqlite:///{}/s.db"]
INFER_STUDY = ["infer", "--study", "tiny", *STUDY, "--tasks", "{}/t.jsonl", "--out"]
EXPORT = ["export", "tiny", *STUDY]


@pytest.mark.parametrize(
    "command",
    [
        [*GRADE, "{}/t.jsonl"],
        [*GRADE, "{}/a.jsonl"],
        [*GRADE, "{}/j.npz", "--judge", "learned:{}/j.npz"],
        [*GRADE, "{}/base/config.json", "--judge", "local:{}/base"],
        [*FIT, "{}/t.jsonl"],
        [*FIT, "{}/a.jsonl"],
        [*FIT, "{}/g.jsonl"],
        [*MODEL, "{}/t.jsonl"],
        [*MODEL, "{}/base/config.json"],
        [*MODEL, "{}/base/model.safetensors"],
        [*MODEL, "{}/base/new.json"],
        [*MODEL, "{}/k.csv", "--knowledge", "{}/k.csv"],
        ["infer", "--recipe", "{}/best.yaml", "--tasks", "{}/t.jsonl", "--out", "{}/best.yaml"],
        ["infer", "--recipe", "{}/best.yaml", "--tasks", "{}/t.jsonl", "--out",
         "{}/instruct/tokenizer.json"],
        ["infer", "--model", "{}/base", "--tasks", "{}/x.classes.jsonl", "--out", "{}/x.jsonl"],
        ["infer", "--recipe", "{}/y.jsonl.part", "--tasks", "{}/t.jsonl", "--out", "{}/y.jsonl"],
        [*INFER_STUDY, "{}/t.jsonl"],
        [*INFER_STUDY, "{}/s.db"],
        [*INFER_STUDY, "{}/tiny.answers.sqlite"],
        [*INFER_STUDY, "{}/tasks.jsonl"],
        [*INFER_STUDY, "{}/instruct/model.safetensors"],
        [*EXPORT, "-o", "{}/s.db"],
        [*EXPORT, "-o", "{}/tiny.answers.sqlite"],
        [*EXPORT, "-o", "{}/tasks.jsonl"],
        [*EXPORT, "-o", "{}/base/config.json"],
        [*EXPORT, "-o", "{}/study.yaml"],
        [*EXPORT, "--model", "{}/base"],
        [*EXPORT, "--model", "{}"],
        [*EXPORT, "--runner", "{}/instruct"],
        [*EXPORT, "--runner", "{}"],
        ["merge", "{}/best.yaml", "{}"],
        ["merge", "{}/best.yaml", "{}/base"],
        ["merge", "{}/best.yaml", "{}/results/.."],
        ["search", "{}/study.yaml", "--storage", "sqlite:///{}/tasks.jsonl"],
        ["search", "{}/study.yaml", "--storage", "sqlite:///{}/study.yaml"],
        ["search", "{}/study.yaml", "--storage", "sqlite:///{}/n.db", "--study", "base",
         "--results", "{}"],
        ["knowledge", "from-tasks", "{}/t.jsonl", "--out", "{}/t.jsonl"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_no_command_overwrites_what_it_reads(searched, capsys, command):
    refused(searched, capsys, *command)


def test_results_do_not_replace_files_of_the_study(searched, tmp_path, capsys):
    """A model, a recipe or a study file where results/NAME/ would be."""
    place = tmp_path / "p"
    shutil.copytree(searched, place)
    shutil.move(place / "instruct", place / "tiny")
    (place / "tiny/README.md").write_text("The sibling's own card.")
    text = (place / "study.yaml").read_text().replace("./instruct", "./tiny")
    (place / "study.yaml").write_text(text)
    new = ["--storage", f"sqlite:///{place}/n.db"]
    refused(place, capsys, "search", "{}/study.yaml", *new, "--results", "{}")
    (place / "r/tiny").mkdir(parents=True)
    (place / "r/tiny/best.yaml").write_text(
        text.replace("./", f"{place}/").replace("tasks.j", f"{place}/tasks.j")
    )
    refused(place, capsys, "search", "{}/r/tiny/best.yaml", *new, "--results", "{}/r")


def test_a_report_does_not_replace_what_its_study_reads(pair, tmp_path, capsys):
    place = tmp_path / "p"
    shutil.copytree(pair, place)
    text = (place / "study.yaml").read_text()
    (place / "tiny").mkdir()
    shutil.move(place / "tasks.jsonl", place / "tiny/trials.csv")  # a name of a result
    (place / "tiny/trials.csv").write_text(
        "input,output\n" + "".join(f"あ{i},い\n" for i in range(12)), encoding="utf-8"
    )
    (place / "study.yaml").write_text(text.replace("tasks.jsonl", "tiny/trials.csv"))
    where = ["--storage", f"sqlite:///{place}/n.db"]
    results = ["--results", str(place / "results")]
    assert main(["search", str(place / "study.yaml"), *where, *results, "--trials", "2"]) == 0
    refused(place, capsys, "report", "tiny", *where, "--results", "{}")
    with pytest.raises(InputError):
        evomerge.load_study("tiny", storage=where[1]).write_results(place)


def test_a_study_stored_beside_its_model_goes_on(pair, tmp_path, capsys):
    place = tmp_path / "p"
    shutil.copytree(pair, place)
    command = ["search", str(place / "study.yaml"), "--storage", f"sqlite:///{place}/base/s.db"]
    for trials in ("2", "3"):
        assert main([*command, "--results", str(place / "r"), "--trials", trials]) == 0
    capsys.readouterr()


def test_outputs_beside_what_is_read_are_written(searched, capsys):
    """Answers in a model's folder, and again; a recipe over an earlier one; the cache's folder."""
    again = [*MODEL, "{}/base/answers.jsonl", "--max-new-tokens", "2"]
    for command in (
        again,
        [*EXPORT, "-o", "{}/best.yaml"],
        [*GRADE, "{}/grades.jsonl"],
        [*GRADE, "{}/grades.jsonl"],
        ["report", "tiny", *STUDY, "--results", "{}/results"],
    ):
        assert main([part.replace("{}", str(searched)) for part in command]) == 0
    assert cache_path(f"sqlite:///{searched}/s.db", "tiny").is_file()
    capsys.readouterr()


def test_the_api_refuses_too(searched, tmp_path):
    place = searched
    before = digests(place)
    for call in (
        lambda: evomerge.infer(place / "t.jsonl", model=place / "base", out=place / "t.jsonl"),
        lambda: evomerge.merge(place / "best.yaml", place),
        lambda: evomerge.merge({"models": [{"model": str(place / "base")}],
                                "merge_method": "linear"}, place),
        lambda: evomerge.load_study("tiny", storage=place / "s.db").write_recipe(place / "s.db"),
        lambda: evomerge.load_study("tiny", storage=place / "s.db").build_model(place),
    ):  # fmt: skip
        with pytest.raises(InputError, match="what this command reads"):
            call()
    assert digests(place) == before


@pytest.fixture
def named(tmp_path, monkeypatch):
    """Other names of a/tasks.jsonl, and of the folder a, by what they are."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    file = tmp_path / "a/tasks.jsonl"
    file.write_text("x")
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "chain").symlink_to("link")
    (tmp_path / "folder").symlink_to("a", target_is_directory=True)
    os.link(file, tmp_path / "hard")
    monkeypatch.chdir(tmp_path / "b")
    return {
        "itself": file,
        "relative": "../a/tasks.jsonl",
        "roundabout": tmp_path / "b/../a/./tasks.jsonl",
        "symbolic link": tmp_path / "link",
        "link to a link": tmp_path / "chain",
        "through a linked folder": tmp_path / "folder/tasks.jsonl",
        "hard link": tmp_path / "hard",
    }


@pytest.mark.parametrize(
    "name",
    [
        "itself",
        "relative",
        "roundabout",
        "symbolic link",
        "link to a link",
        "through a linked folder",
        "hard link",
    ],
)
def test_other_names_of_a_file_are_the_file(named, tmp_path, name):
    file = tmp_path / "a/tasks.jsonl"
    for output, source in ((named[name], file), (file, named[name])):
        with pytest.raises(InputError, match="would overwrite"):
            check_outputs(files=[output], inputs=[str(source)])
    check_outputs(files=[tmp_path / "a/other.jsonl", None], inputs=[named[name], None])


def test_other_names_of_a_folder_and_of_its_files(named, tmp_path):
    weights = tmp_path / "blob"
    weights.write_text("w")
    (tmp_path / "a/model.safetensors").symlink_to(weights)  # as in the hub's cache
    model = f"{tmp_path}/folder"
    for output in (weights, "../a/config.json", named["hard link"].with_name("folder") / "x.JSON"):
        with pytest.raises(InputError, match="would overwrite"):
            check_outputs(files=[output], inputs=[f"owner/name+{model}"])
    for folder in (tmp_path, "..", tmp_path / "folder", tmp_path / "a"):
        with pytest.raises(InputError, match="holds what this command reads"):
            check_outputs(folders=[folder], inputs=[f"{model}@main"])
    check_outputs(folders=[tmp_path / "a/merged", tmp_path / "b"], inputs=[model])
    check_outputs(files=[tmp_path / "a/new.jsonl", tmp_path / "a/sub/x.json"], inputs=[model])


def test_a_case_insensitive_disk_decides_itself(tmp_path):
    (tmp_path / "tasks.jsonl").write_text("x")
    other = tmp_path / "TASKS.jsonl"
    if other.exists():
        with pytest.raises(InputError):
            check_outputs(files=[other], inputs=[tmp_path / "tasks.jsonl"])
    else:
        check_outputs(files=[other], inputs=[tmp_path / "tasks.jsonl"])


@pytest.mark.parametrize(
    "odd", ["", "~nouser/x", "a\0b", "x" * 5000, "owner/name", "+", "@", "a+b"]
)
def test_odd_references_are_no_traceback(tmp_path, odd):
    check_outputs(files=[tmp_path / "o.jsonl"], folders=[tmp_path / "new"], inputs=[odd])
    check_outputs(files=[odd or "o"], inputs=[str(tmp_path / "t.jsonl")])


def test_grades_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "t.jsonl", TASKS)
    lines(tmp_path / "a.json", [{"task_id": 0, "output": "1"}])
    command = ["judge", "grade", "--tasks", "t.jsonl", "--answers", "a.json", "--out", "g.json"]
    assert main(command) == 0
    assert (tmp_path / "g.json").is_file()


def test_a_pipe_or_device_is_not_read_to_see_what_it_holds(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    check_no_study_file(tmp_path / "pipe")  # nothing writes to it: reading would never end
    check_no_study_file(Path("/dev/zero"))
    (tmp_path / "study.yaml").write_text("genome: {}\n")
    with pytest.raises(InputError, match="is a study file"):
        check_no_study_file(tmp_path / "study.yaml")
