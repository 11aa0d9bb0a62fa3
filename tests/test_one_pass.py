"""A search whose generations answer in one pass: in fp32 the same trials as candidate after candidate."""

import pytest

from evomerge.answering.population import PopulationEngine
from evomerge.cli import main
from evomerge.search.session import load_finished


def search(pair, tmp_path, name, *settings):
    where = ["--storage", f"sqlite:///{tmp_path}/{name}.db", "--results", str(tmp_path / "results"), "--study", name]
    assert main(["search", str(pair / "study.yaml"), *where, *(x for s in settings for x in ("--set", s))]) == 0
    return load_finished(f"sqlite:///{tmp_path}/{name}.db", name)


def outcomes(finished):
    return [(r.role, r.generation, r.index, r.weights, r.score, r.grades) for r in finished.records]


@pytest.fixture
def passes(monkeypatch):
    """How many candidates and prompts each pass had."""
    seen, answer_all = [], PopulationEngine.answer_all

    def counted(self, recipes, prompts):
        seen.append((len(recipes), len(prompts)))
        return answer_all(self, recipes, prompts)

    monkeypatch.setattr(PopulationEngine, "answer_all", counted)
    return seen


def test_the_trials_are_those_of_candidate_after_candidate(pair, tmp_path, passes):
    fp32 = "search.dtype=float32"
    one_by_one = search(pair, tmp_path, "one", fp32, "engine.population=false", "search.trials=10")
    assert passes == []
    together = search(pair, tmp_path, "all", fp32, "engine.population=true", "search.trials=10")
    n = len(together.records[0].grades)
    assert passes == [(4, n), (4, n), (2, n)]  # generations of four, the last one cut short
    assert outcomes(together) == outcomes(one_by_one)
    assert together.verdict == one_by_one.verdict
    shares = [r.seconds["answer"] for r in together.records if r.role == "candidate"]
    assert min(shares) > 0


def test_going_on_answers_nothing_twice(pair, tmp_path, passes):
    """The study is cut in the middle of a generation, whose answers are all there already."""
    settings = ("search.dtype=float32", "engine.population=true")
    first = search(pair, tmp_path, "cut", *settings, "search.trials=6")
    assert [candidates for candidates, _ in passes] == [4, 2]
    again = search(pair, tmp_path, "cut", *settings, "search.trials=8")
    assert [candidates for candidates, _ in passes] == [4, 2, 4]
    whole = search(pair, tmp_path, "whole", *settings, "search.trials=8")
    chosen = [[o for o in outcomes(f) if o[0] == "candidate"] for f in (again, whole)]
    assert chosen[0] == chosen[1]
    assert len(first.records) < len(again.records)


@pytest.mark.parametrize(("dtype", "tasks", "wanted"), [("float32", 4, True), ("bfloat16", 4, False), ("float32", 40, False)])
def test_unsaid_it_is_for_few_prompts_in_fp32(pair, tmp_path, passes, dtype, tasks, wanted):
    rows = (pair / "tasks.jsonl").read_text(encoding="utf-8").splitlines()[:tasks]
    (tmp_path / "few.jsonl").write_text("\n".join(rows), encoding="utf-8")
    few = f"tasks=[{{file: {tmp_path}/few.jsonl}}]"
    search(pair, tmp_path, "auto", f"search.dtype={dtype}", few, "search.population=8", "search.trials=8")
    assert bool(passes) is wanted
