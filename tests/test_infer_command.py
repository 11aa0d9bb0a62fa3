"""`evomerge infer` as a user calls it: who answers, knowledge in a study, settings, and what does
not go together.
"""

import json

import openpyxl
import pytest
import yaml

from evomerge.cli import main
from evomerge.inference.part import Part
from evomerge.knowledge.records import Example, Knowledge, KnowledgeClass
from evomerge.knowledge.write_base import write_knowledge
from evomerge.searching.snapshot import load_snapshot

KINDS = (
    KnowledgeClass("かな", "", "あ{input}", max_new_tokens=5),
    KnowledgeClass("数", "か", "{input}", shots=0),
)
BASE = Knowledge(
    KINDS,
    (
        Example(2, "かな", "あい", "う"),
        Example(3, "かな", "いう", "え"),
        Example(4, "数", "12", "3"),
    ),
)


@pytest.fixture
def place(pair, tmp_path):
    """A folder with tasks and a base, and the start of a command in fp32, where batches change no
    words.
    """
    lines = [
        {"task_id": i, "input": text}
        for i, text in enumerate(["あいか", "いうき", "123", "あいうえ", "4512"])
    ]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_knowledge(BASE, tmp_path / "base.yaml")
    return tmp_path


def infer(place, out, *options, code=0):
    assert (
        main(
            [
                "infer",
                "--tasks",
                str(place / "tasks.jsonl"),
                "--out",
                str(place / out),
                *map(str, options),
            ]
        )
        == code
    )
    return (
        [json.loads(line) for line in (place / out).read_text(encoding="utf-8").splitlines()]
        if code == 0
        else []
    )


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def search(pair, place, *settings):
    where = [
        "--storage",
        f"sqlite:///{place}/s.db",
        "--results",
        str(place / "results"),
        "--trials",
        "4",
    ]
    return main(
        [
            "search",
            str(pair / "study.yaml"),
            *where,
            "--set",
            "search.dtype=float32",
            *(x for s in settings for x in ("--set", s)),
        ]
    )


def test_a_recipe_a_study_and_a_merged_folder_answer_alike(pair, place):
    assert search(pair, place) == 0
    best = place / "results/tiny/best.yaml"
    assert main(["merge", str(best), str(place / "merged")]) == 0
    by_recipe = infer(place, "a.jsonl", "--recipe", best, "--max-new-tokens", 12)
    by_folder = infer(place, "b.jsonl", "--model", place / "merged", "--max-new-tokens", 12)
    by_study = infer(place, "c.jsonl", "--study", "tiny", "--storage", f"sqlite:///{place}/s.db")
    assert by_recipe == by_folder == by_study
    assert any(row["output"] for row in by_recipe)


def test_what_is_optimised_is_what_is_shipped(pair, place, capsys):
    """A search whose prompts come from a base; infer asks as it did, without being told."""
    knowledge = f"prompt.knowledge={place}/base.yaml"
    assert search(pair, place, knowledge) == 0
    storage = ["--study", "tiny", "--storage", f"sqlite:///{place}/s.db"]
    rows = infer(place, "a.jsonl", *storage)
    classes = [
        json.loads(line)
        for line in (place / "a.classes.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [row["class"] for row in classes] == ["かな", "かな", "数", "かな", "数"]
    assert [row["examples"] for row in classes] == [[3, 2], [2, 3], [], [3, 2], []]
    lengths = [len(row["output"].replace(" ", "")) for row in rows]
    # the classes' own, or the study's 12
    assert max(lengths[i] for i in (0, 1, 3)) <= 5 < max(lengths[i] for i in (2, 4)) <= 12
    assert infer(place, "b.jsonl", *storage, "--knowledge", place / "base.yaml") == rows
    without = infer(place, "c.jsonl", *storage, "--set", "prompt.knowledge=null")
    assert not (place / "c.classes.jsonl").exists()
    assert without != rows
    capsys.readouterr()
    write_knowledge(
        Knowledge(KINDS, (*BASE.examples, Example(5, "数", "77", "7"))), place / "base.yaml"
    )
    infer(place, "d.jsonl", *storage, code=2)
    assert "the knowledge base has changed since the search" in capsys.readouterr().err
    assert search(pair, place, knowledge) == 2
    assert "the study has changed since it began: the knowledge base" in capsys.readouterr().err


def test_a_base_that_holds_held_out_tasks_is_told_and_check_reads_it(pair, place, capsys):
    tasks = [
        json.loads(line) for line in (pair / "tasks.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    examples = tuple(Example(2 + i, "数", task["input"], "1") for i, task in enumerate(tasks))
    write_knowledge(
        Knowledge(KINDS, (*examples, Example(99, "かな", "あい", "う"))), place / "all.yaml"
    )
    assert search(pair, place, f"prompt.knowledge={place}/all.yaml") == 0
    searched = load_snapshot(f"sqlite:///{place}/s.db", "tiny").ledger.facts.split.search
    # inputs are there several times
    unseen = {task["input"] for task in tasks if task["task_id"] not in searched}
    count = sum(task["input"] in unseen for task in tasks)
    assert (
        f"note: {count} example(s) of the knowledge base are held-out tasks"
        in capsys.readouterr().err
    )
    assert (
        main(["check", str(pair / "study.yaml"), "--set", f"prompt.knowledge={place}/all.yaml"])
        == 0
    )
    assert "2 classes, 41 examples" in capsys.readouterr().out
    assert (
        main(["check", str(pair / "study.yaml"), "--set", f"prompt.knowledge={place}/none.yaml"])
        == 2
    )


def test_the_answers_kept_for_prompts_are_of_their_settings(pair, place):
    """Other settings of a class: the same prompts are answered anew, in the same study's cache."""
    longer = Knowledge(
        (KnowledgeClass("かな", "", "あ{input}", max_new_tokens=9), KINDS[1]), BASE.examples
    )
    write_knowledge(longer, place / "longer.yaml")
    figures = []
    for name in ("base", "longer"):
        assert search(pair, place, f"prompt.knowledge={place}/{name}.yaml", f"study={name}") == 0
        figures.append((place / f"results/{name}/trials.csv").read_text())
    assert figures[0] != figures[1]


def test_settings_of_the_run_and_sampling(pair, place):
    model = ("--model", pair / "base", "--set", "search.dtype=float32", "--max-new-tokens", 8)
    plain = infer(place, "a.jsonl", *model)
    assert infer(place, "b.jsonl", *model, "--batch-size", 1) == plain
    sampled = [*model, "--set", "generation.do_sample=true", "--set", "generation.temperature=1.5"]
    first = infer(place, "c.jsonl", *sampled)
    assert first != plain
    assert infer(place, "d.jsonl", *sampled, "--batch-size", 2) == first
    assert infer(place, "e.jsonl", *sampled, "--seed", 5) != first


def test_best_of_and_self_check_keep_the_format(pair, place, capsys):
    model = ("--model", pair / "base", "--set", "search.dtype=float32", "--max-new-tokens", 6)
    rows = infer(place, "a.jsonl", *model, "--best-of", 3, "--self-check", "empty,repetitive")
    assert [list(row)[:3] for row in rows] == [["task_id", "input", "output"]] * 5
    assert {key for row in rows for key in row} <= {"task_id", "input", "output", "truncated"}
    said = capsys.readouterr().err
    assert "best of 3 by agreement" in said
    assert "self-check (empty, repetitive)" in said
    assert not (place / "a.jsonl.part").exists()


@pytest.mark.parametrize("way", ["model", "both"])
def test_classes_by_the_model_that_answers(pair, place, way):
    infer(
        place,
        "a.jsonl",
        "--model",
        pair / "base",
        "--knowledge",
        place / "base.yaml",
        "--classify",
        way,
        "--max-new-tokens",
        4,
        "--set",
        "prompt.too_long=truncate",
    )
    rows = [
        json.loads(line)
        for line in (place / "a.classes.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [row["task_id"] for row in rows] == list(range(5))
    assert {row["class"] for row in rows} <= {"かな", "数"}


def test_explaining_asks_the_study_for_its_base_and_the_model_for_classes(pair, place, capsys):
    assert search(pair, place, f"prompt.knowledge={place}/base.yaml") == 0
    capsys.readouterr()
    explain = ["infer", "--explain", "--json", "--tasks", str(place / "tasks.jsonl")]
    study = ["--study", "tiny", "--storage", f"sqlite:///{place}/s.db"]
    assert main([*explain, *study]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["class"] for row in rows] == ["かな", "かな", "数", "かな", "数"]
    assert main([*explain, *study, "--classify", "model"]) == 0
    asked = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["confidence"] for row in asked] != [row["confidence"] for row in rows]
    assert main([*explain, "--knowledge", str(place / "base.yaml"), "--classify", "model"]) == 2
    assert "it is not clear which model answers" in capsys.readouterr().err
    assert main(explain) == 2
    assert "nothing to explain without a knowledge base" in capsys.readouterr().err


def test_the_time_limit_of_a_real_model(pair, place, capsys):
    model = ("--model", pair / "base", "--set", "search.dtype=float32", "--max-new-tokens", 40)
    whole = infer(place, "whole.jsonl", *model)
    infer(place, "a.jsonl", *model, "--time-limit", "0.001s", code=1)  # nothing is answered
    cut = rows_of(place / "a.jsonl")
    assert [row["unfinished"] for row in cut] == ["time limit"] * 5
    assert "left 5 of 5 tasks unfinished" in capsys.readouterr().err
    assert infer(place, "a.jsonl", *model) == whole


WRONG = {
    "nobody answers": ([], "it is not clear which model answers"),
    "two answer": (["--model", "m", "--study", "s"], "it is not clear which model answers"),
    "no such recipe": (["--recipe", "missing.yaml"], "missing.yaml: no such recipe"),
    "an unknown key": (
        ["--model", "BASE", "--set", "generation.max_tokens=3"],
        "Did you mean `generation.max_new_tokens`?",
    ),
    "another section": (["--model", "BASE", "--set", "judge.kind=rules"], "has no effect here"),
    "a value out of range": (
        ["--model", "BASE", "--set", "generation.top_p=2"],
        "`generation.top_p` is out of range",
    ),
    "no duration": (["--model", "BASE", "--time-limit", "soon"], "--time-limit: is not a duration"),
    "one answer is no choice": (
        ["--model", "BASE", "--best-of", "1"],
        "--best-of: must be 2 or more",
    ),
    "a judge of nothing": (
        ["--model", "BASE", "--judge", "rules"],
        "--judge: chooses among several answers",
    ),
    "no such judge": (["--model", "BASE", "--best-of", "2", "--judge", "mine"], "no such judge"),
    "no such fault": (
        ["--model", "BASE", "--self-check", "boring"],
        "--self-check: is not a known fault",
    ),
    "a retriever of nothing": (
        ["--model", "BASE", "--retriever", "bm25"],
        "--retriever: there is no knowledge base",
    ),
    "a class of nothing": (
        ["--model", "BASE", "--classify", "model"],
        "--classify: there is no knowledge base",
    ),
    "no such class": (
        ["--model", "BASE", "--knowledge", "KNOWLEDGE", "--default-class", "詩"],
        "the default class is not a class of the knowledge base",
    ),
    "no such base": (["--model", "BASE", "--knowledge", "none.xlsx"], "no such knowledge base"),
    "a threshold above 1": (
        ["--model", "BASE", "--knowledge", "KNOWLEDGE", "--threshold", "3"],
        "`prompt.threshold` is out of range",
    ),
    "a server's batches": (
        ["--server", "http://localhost:1/v1", "--batch-size", "2"],
        "--batch-size: is decided by the server",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_go_together(pair, place, capsys, name):
    options, message = WRONG[name]
    options = [
        {"BASE": str(pair / "base"), "KNOWLEDGE": str(place / "base.yaml")}.get(o, o)
        for o in options
    ]
    infer(place, "a.jsonl", *options, code=2)
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]
    assert len(said) == 1
    assert not (place / "a.jsonl").exists()


def test_a_recipe_that_only_a_folder_can_hold_says_so(pair, place, capsys):
    layers = [
        {
            "sources": [
                {"model": str(pair / "base"), "layer_range": r, "parameters": {"weight": 1.0}}
            ]
        }
        for r in ([2, 4], [0, 2])
    ]
    moved = {"merge_method": "linear", "dtype": "bfloat16", "slices": layers}
    (place / "moved.yaml").write_text(yaml.safe_dump(moved))
    infer(place, "a.jsonl", "--recipe", place / "moved.yaml", code=2)
    assert "Build the model with `evomerge merge`" in capsys.readouterr().err


def test_a_runner_goes_out_with_the_studys_own_base(pair, place, capsys):
    assert search(pair, place, f"prompt.knowledge={place}/base.yaml") == 0
    storage = ["--storage", f"sqlite:///{place}/s.db"]
    assert main(["export", "tiny", *storage, "--runner", str(place / "runner")]) == 0
    assert {"answer.py", "recipe.yaml", "settings.yaml", "knowledge.yaml", "README.md"} <= {
        p.name for p in (place / "runner").iterdir()
    }
    assert main(["export", "tiny", *storage, "--knowledge", str(place / "base.yaml")]) == 2
    assert "--knowledge: goes into a runner" in capsys.readouterr().err


def test_tables_of_tasks_are_answered_like_json_lines(pair, place, capsys):
    tasks = [json.loads(line) for line in (place / "tasks.jsonl").read_text().splitlines()]
    rows = [["Input", "note", "task_id"], *([t["input"], "x", t["task_id"]] for t in tasks)]
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(place / "t.xlsx")
    text = "".join(";".join(map(str, row)) + "\n" for row in rows)
    (place / "t.csv").write_text(text, encoding="cp932")
    model = ["--model", str(pair / "base"), "--max-new-tokens", "4"]
    wanted = infer(place, "a.jsonl", *model)
    for name in ("t.xlsx", "t.csv"):
        command = ["infer", "--tasks", str(place / name), "--out", str(place / f"{name}.out")]
        assert main([*command, *model]) == 0
        lines = (place / f"{name}.out").read_text(encoding="utf-8").splitlines()
        assert list(map(json.loads, lines)) == wanted
    capsys.readouterr()


@pytest.mark.parametrize("option", ["tasks", "knowledge", "recipe"])
def test_answers_never_take_the_place_of_what_they_are_made_from(pair, place, capsys, option):
    (place / "q.classes.jsonl").write_text((place / "tasks.jsonl").read_text())
    files = {
        "tasks": place / "q.classes.jsonl",
        "knowledge": place / "base.yaml",
        "recipe": place / "best.yaml",
    }
    (place / "best.yaml").write_text("a recipe")
    before = files[option].read_bytes()
    out = place / "q.jsonl" if option == "tasks" else files[option]
    who = (
        ["--recipe", str(files["recipe"])]
        if option == "recipe"
        else ["--model", str(pair / "base")]
    )
    command = [
        "infer",
        *who,
        "--tasks",
        str(files["tasks"]),
        "--knowledge",
        str(files["knowledge"]),
        "--out",
        str(out),
    ]
    assert main(command) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "would overwrite what this command reads" in line
    assert str(files[option]) in line
    assert files[option].read_bytes() == before


@pytest.mark.parametrize("out", [".", "FOLDER"])
def test_a_folder_is_no_place_for_answers(pair, place, capsys, out):
    out = str(place) if out == "FOLDER" else out
    assert (
        main(
            [
                "infer",
                "--model",
                str(pair / "base"),
                "--tasks",
                str(place / "tasks.jsonl"),
                "--out",
                out,
            ]
        )
        == 2
    )
    assert "--out: is a folder" in capsys.readouterr().err


def test_the_seed_reaches_the_samples(pair, place):
    """Best of 2 on one faulty first answer: the samples depend on --seed, and on nothing else."""
    model = [
        "--model",
        pair / "base",
        "--set",
        "search.dtype=float32",
        "--max-new-tokens",
        8,
        "--best-of",
        2,
    ]
    kept = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        lines = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                Part,
                "add",
                lambda self, answers, name="", lines=lines, add=Part.add: (
                    lines.append((name, answers)),
                    add(self, answers, name),
                ),
            )
            infer(place, f"{name}.jsonl", *model, "--seed", seed)
        kept[name] = {
            i: answer.text for round_, answers in lines if round_ for i, answer in answers.items()
        }
    assert len(kept["a"]) == 5
    assert kept["a"] == kept["b"] != kept["c"]


def test_characters_beyond_the_first_plane_in_options(pair, place, capsys):
    write_knowledge(
        Knowledge((*KINDS, KnowledgeClass("𩸽", "", "{input}", shots=0)), BASE.examples),
        place / "𠮷野.yaml",
    )
    model = ("--model", pair / "base", "--max-new-tokens", 4)
    infer(
        place,
        "a.jsonl",
        *model,
        "--knowledge",
        place / "𠮷野.yaml",
        "--default-class",
        "𩸽",
        "--threshold",
        1,
    )
    rows = [
        json.loads(line)
        for line in (place / "a.classes.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert "𩸽" in {row["class"] for row in rows}


def test_a_changed_base_can_be_named_and_no_runner_ships_it(pair, place, capsys):
    assert search(pair, place, f"prompt.knowledge={place}/base.yaml") == 0
    write_knowledge(
        Knowledge(KINDS, (*BASE.examples, Example(5, "数", "77", "7"))), place / "base.yaml"
    )
    storage = ["--storage", f"sqlite:///{place}/s.db"]
    assert main(["export", "tiny", *storage, "--runner", str(place / "runner")]) == 2
    assert "the knowledge base has changed since the search" in capsys.readouterr().err
    infer(place, "a.jsonl", "--study", "tiny", *storage, "--knowledge", place / "base.yaml")


def test_a_task_that_is_too_long_is_named(pair, place, capsys):
    (place / "tasks.jsonl").write_text(
        json.dumps({"task_id": "short", "input": "あ"})
        + "\n"
        + json.dumps({"task_id": "long", "input": "い" * 70})
        + "\n"
    )
    infer(place, "a.jsonl", "--model", pair / "base", code=1)
    assert "task long: a prompt of" in capsys.readouterr().err
