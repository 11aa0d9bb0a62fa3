"""A search whose generations answer in one pass: in fp32 the same trials as candidate after
candidate.
"""

import sqlite3

import pytest
import torch

from evomerge.answering.hf import population as population_module
from evomerge.answering.hf.population import TransformersPopulation
from evomerge.cli import main
from evomerge.searching.snapshot import load_snapshot


def search(pair, tmp_path, name, *settings):
    where = [
        "--storage",
        f"sqlite:///{tmp_path}/{name}.db",
        "--results",
        str(tmp_path / "results"),
        "--study",
        name,
    ]
    assert (
        main(
            [
                "search",
                str(pair / "study.yaml"),
                *where,
                *(x for s in settings for x in ("--set", s)),
            ]
        )
        == 0
    )
    return load_snapshot(f"sqlite:///{tmp_path}/{name}.db", name)


def outcomes(finished):
    return [(r.role, r.generation, r.index, r.vector, r.score, r.grades) for r in finished.records]


@pytest.fixture
def passes(monkeypatch):
    """How many candidates and prompts each pass had."""
    seen, answer_all = [], TransformersPopulation.__call__

    def counted(self, recipes, prompts, settings=None):
        seen.append((len(recipes), len(prompts)))
        return answer_all(self, recipes, prompts, settings)

    monkeypatch.setattr(TransformersPopulation, "__call__", counted)
    return seen


def test_the_trials_are_those_of_candidate_after_candidate(pair, tmp_path, passes):
    settings = ("search.dtype=float32", "engine.batch_size=8", "search.trials=10")
    one_by_one = search(pair, tmp_path, "one", *settings, "engine.population=false")
    assert passes == []
    together = search(pair, tmp_path, "all", *settings, "engine.population=true")
    n = len(together.records[0].grades)
    batches = [8] * (n // 8) + [n % 8] * bool(n % 8)
    # generations of four, the last one cut short
    assert passes == [(c, b) for c in (4, 4, 2) for b in batches]
    assert outcomes(together) == outcomes(one_by_one)
    assert together.verdict == one_by_one.verdict
    candidates = [r for r in together.records if r.role == "candidate"]
    assert min(r.seconds["answer"] for r in candidates) > 0


def test_going_on_answers_nothing_twice(pair, tmp_path, passes):
    """The study is cut in the middle of a generation, whose answers are all there already."""
    settings = ("search.dtype=float32", "engine.population=true", "engine.batch_size=32")
    first = search(pair, tmp_path, "cut", *settings, "search.trials=6")
    assert [candidates for candidates, _ in passes] == [4, 2]
    again = search(pair, tmp_path, "cut", *settings, "search.trials=8")
    assert [candidates for candidates, _ in passes] == [4, 2, 4]
    whole = search(pair, tmp_path, "whole", *settings, "search.trials=8")
    chosen = [[o for o in outcomes(f) if o[0] == "candidate"] for f in (again, whole)]
    assert chosen[0] == chosen[1]
    assert len(first.records) < len(again.records)


@pytest.mark.parametrize(
    ("dtype", "tasks", "wanted"),
    [("float32", 4, True), ("bfloat16", 4, False), ("float32", 40, False)],
)
def test_by_default_it_is_chosen_for_few_prompts_in_fp32(
    pair, tmp_path, passes, dtype, tasks, wanted
):
    rows = (pair / "tasks.jsonl").read_text(encoding="utf-8").splitlines()[:tasks]
    (tmp_path / "few.jsonl").write_text("\n".join(rows), encoding="utf-8")
    few = f"tasks=[{{file: {tmp_path}/few.jsonl}}]"
    search(
        pair,
        tmp_path,
        "auto",
        f"search.dtype={dtype}",
        few,
        "search.population=8",
        "search.trials=8",
    )
    assert bool(passes) is wanted


def test_a_killed_pass_loses_a_batch_and_a_full_memory_is_remembered(
    pair, tmp_path, passes, monkeypatch
):
    """The second batch of the second generation is interrupted; before that, memory had allowed
    twelve rows at once.
    """
    settings = (
        "search.dtype=float32",
        "engine.population=true",
        "engine.batch_size=8",
        "search.trials=8",
    )
    whole = search(pair, tmp_path, "whole", *settings)
    count, answer_all, decode = [], TransformersPopulation.__call__, population_module.decode
    wanted = len(passes)

    def interrupted(self, recipes, prompts, settings=None):
        count.append(len(prompts))
        if len(count) == wanted // 2 + 2:
            raise KeyboardInterrupt
        return answer_all(self, recipes, prompts, settings)

    def small(model, rows, *args, **kwargs):
        if len(rows) > 12:
            raise torch.OutOfMemoryError
        return decode(model, rows, *args, **kwargs)

    monkeypatch.setattr(population_module, "decode", small)
    where = [
        "--storage",
        f"sqlite:///{tmp_path}/cut.db",
        "--results",
        str(tmp_path / "results"),
        "--study",
        "cut",
    ]
    command = [
        "search",
        str(pair / "study.yaml"),
        *where,
        *(x for s in settings for x in ("--set", s)),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(TransformersPopulation, "__call__", interrupted)
        assert main(command) == 130
    passes.clear()
    assert main(command) == 0
    assert len(passes) == wanted // 2 - 1  # the first batch was kept
    cut = load_snapshot(f"sqlite:///{tmp_path}/cut.db", "cut")
    assert cut.ledger.facts.limits["batch_tokens"] > 0
    done = [[o for o in outcomes(f) if o[4] is not None] for f in (cut, whole)]
    assert done[0] == done[1]


def test_it_is_refused_where_it_cannot_be(pair, tmp_path, capsys):
    where = ["--storage", f"sqlite:///{tmp_path}/no.db", "--results", str(tmp_path / "results")]
    settings = ["--set", "genome.merge_method=ties", "--set", "engine.population=true"]
    assert main(["search", str(pair / "study.yaml"), *where, *settings]) == 2
    assert (
        "engine.population: these candidates cannot share a pass"
        in capsys.readouterr().err.splitlines()[-1]
    )


def test_a_damaged_cache_is_paid_for_again(pair, tmp_path):
    settings = ("search.trials=4",)
    first = search(pair, tmp_path, "s", *settings)
    for damage in ("'[[1'", "'[]'"):
        with sqlite3.connect(tmp_path / "s.answers.sqlite") as db:
            db.execute(f"UPDATE batches SET answers = {damage}")
        (tmp_path / "s.db").unlink()
        assert outcomes(search(pair, tmp_path, "s", *settings)) == outcomes(first)
