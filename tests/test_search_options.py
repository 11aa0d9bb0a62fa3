"""What a search does with its answers: subsets, races, objectives, the choice of the winner, first
candidates, and its end.
"""

import importlib
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from search_tools import (
    BEST,
    LAYERS,
    Cut,
    Cutting,
    QualityJudge,
    TaskEngine,
    make_search,
    make_study,
    trials,
)

from evomerge.console import Console
from evomerge.errors import StudyFileError
from evomerge.genome.genome import make_genome
from evomerge.recipe import Recipe
from evomerge.searching.generation.stopping import Spending, why_limited
from evomerge.searching.history import History
from evomerge.searching.records.identity import changes, refused
from evomerge.searching.records.study_facts import StudyFacts
from evomerge.searching.samplers.make_sampler import make_sampler
from evomerge.searching.starting.known_candidates import encode
from evomerge.searching.starting.source_study import start_from_source
from evomerge.study import SUBSET, ObjectiveSection, SearchSection, SplitSection, TaskSource


def candidates(search):
    return [r for r in search.ledger.records() if r.role == "candidate" and r.state == "complete"]


@pytest.mark.parametrize("ranking", ["subset", "race"])
def test_a_generation_is_ranked_on_tasks_of_its_own(tmp_path, ranking):
    study = make_study(ranking=ranking, subset=16, sampling="uniform")
    search, _, _ = make_search(tmp_path, study)
    search.run()
    references = [r for r in search.ledger.records() if r.role in ("parent", "uniform")]
    levels = {
        task: np.mean([r.grades[task].grade for r in references]) for task in references[0].grades
    }
    by_generation = {}
    for r in candidates(search):
        values = {task: g.grade for task, g in r.grades.items()}
        above = [values[t] - levels[t] for t in values]
        plain = (
            np.mean(above) + np.mean(list(levels.values()))
            if len(values) < len(levels)
            else np.mean(list(values.values()))
        )
        assert r.score == pytest.approx(plain)
        n, total = len(values), len(levels)
        above_spread, spread = (np.std(v, ddof=1) for v in (above, list(values.values())))
        # two-phase sampling (Cochran 1977, chapter 12); s / sqrt(N) when all tasks are seen
        expected = above_spread**2 * (1 / n - 1 / total) + spread**2 / total
        assert r.stderr == pytest.approx(np.sqrt(expected))
        by_generation.setdefault(r.generation, []).append(tuple(values))
    for seen in by_generation.values():
        longest = max(seen, key=len)
        assert all(tasks == longest[: len(tasks)] for tasks in seen), (
            "all begin with the same tasks"
        )
        assert ranking == "race" or len(set(seen)) == 1
    assert len({tasks[0][:8] for tasks in by_generation.values()}) == len(by_generation), (
        "each generation draws anew"
    )
    assert search.ledger.facts.look == 1


def test_a_race_answers_less_and_keeps_the_better_half(tmp_path):
    full, race = (
        make_study("full", ranking="all", trials=8, sigma=0.6),
        make_study("race", ranking="race", subset=32, trials=8, sigma=0.6),
    )
    a, all_answers, _ = make_search(tmp_path, full, TaskEngine(noise=0.2))
    b, raced_answers, _ = make_search(tmp_path, race, TaskEngine(noise=0.2))
    a.run(), b.run()
    assert len(raced_answers.answered) < len(all_answers.answered)
    scores = {r.index: r.score for r in candidates(a)}
    better = set(sorted(scores, key=lambda i: -scores[i])[:4])
    stopped = {r.index for r in candidates(b) if r.n < 32}
    assert stopped, "someone must be far behind here"
    assert not stopped & better


@pytest.mark.parametrize("ranking", ["subset", "race"])
def test_a_run_cut_anywhere_goes_on_as_if_it_had_not_been(tmp_path, ranking):
    whole, _, _ = make_search(tmp_path, make_study("whole", ranking=ranking, subset=16))
    whole.run()
    rng, answered = np.random.default_rng(0), []
    for _ in range(200):
        Cutting.left = int(rng.integers(1, 12))
        search, engine, _ = make_search(
            tmp_path, make_study("cut", ranking=ranking, subset=16), Cutting()
        )
        try:
            search.run()
            break
        except Cut:
            continue
        finally:
            answered += engine.answered
    assert trials(search) == trials(whole)
    assert search.ledger.facts.verdict == whole.ledger.facts.verdict
    assert len(answered) == len(set(answered)), "nothing is answered twice"


def test_a_failed_candidate_is_replaced_within_its_race(tmp_path):
    study = make_study(ranking="race", subset=16, trials=8)
    sampler = make_sampler(study, make_genome(study, LAYERS))
    doomed = sampler.draw(History(), sampler.slot(History(), 0, 3))
    search, _, _ = make_search(tmp_path, study, TaskEngine(fails=[doomed]))
    search.run()
    failed = [r for r in search.ledger.records() if r.state == "failed"]
    assert [(r.index, "always fails" in r.reason) for r in failed] == [(3, True)]
    assert sorted(r.index for r in candidates(search)) == list(range(8))


def test_the_winner_is_chosen_on_tasks_that_the_search_did_not_see(tmp_path):
    search, engine, _ = make_search(
        tmp_path, make_study(validation=0.3, finalists=2), tasks=(24, 16, 12)
    )
    search.run()
    facts = search.ledger.facts
    chosen = facts.validation
    assert chosen.n == 12
    assert len(chosen.means) == 5, "two trials, the mean and two references"
    assert facts.compared["winner"] == chosen.winner
    before = {p for r in search.ledger.records() for p in r.grades}
    assert not before & {str(i) for i in range(40, 52)}
    asked = {prompt for _, prompt in engine.answered}
    assert {f"task {i}" for i in range(40, 52)} <= asked


def test_a_second_look_at_the_held_out_tasks_is_counted(tmp_path):
    make_search(tmp_path, make_study(trials=8))[0].run()
    search, _, _ = make_search(tmp_path, make_study(trials=24))
    search.run()
    assert search.ledger.facts.look == 2
    again, engine, _ = make_search(tmp_path, make_study(trials=24))
    again.run()
    assert again.ledger.facts.look == 2, "the same look is no new one"
    assert not engine.answered


def test_parts_of_an_objective_are_recorded_and_weighed(tmp_path):
    objective = ObjectiveSection(grade=2.0, length=-1.0)
    search, _, _ = make_search(tmp_path, make_study(trials=8, objective=objective))
    verdict = search.run()
    longest = search.study.generation.max_new_tokens
    for r in candidates(search):
        assert r.parts["length"] == pytest.approx(4 / longest)
        assert r.score == pytest.approx(2 * r.parts["grade"] - r.parts["length"])
        assert r.parts["grade"] == pytest.approx(np.mean([g.grade for g in r.grades.values()]))
    assert verdict.metric == "objective"


def test_groups_of_tasks_count_by_their_weights(tmp_path):
    sources = (TaskSource(file="a", weight=3.0), TaskSource(file="b", weight=1.0))

    search, _, _ = make_search(tmp_path, make_study(trials=8, sources=sources), tasks=(31, 17, 0))
    search.run()
    for r in candidates(search):
        groups = [
            [g.grade for task, g in r.grades.items() if task.startswith(f"{i}-")] for i in range(2)
        ]
        assert r.score == pytest.approx((3 * np.mean(groups[0]) + np.mean(groups[1])) / 4)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("trials", 9, "all 9 candidates are done"),
        ("time_limit", "0.0001s", "the time limit of 0.0001s is reached after 0 of 24"),
        ("min_sigma", 10.0, "converged: the step size is"),
        ("patience", 1, "converged: no gain beyond noise in 1 generations"),
    ],
)
def test_a_search_says_why_it_ends(tmp_path, key, value, said):
    settings = {key: value} | ({"sigma": 0.01} if key == "patience" else {})
    study = make_study(trials=settings.pop("trials", 24), **settings)
    if key == "time_limit":
        make_search(tmp_path, make_study(trials=8))[0].run()  # the mean needs a generation
    stream = StringIO()
    search, _, _ = make_search(
        tmp_path,
        study,
        TaskEngine(noise=3.0 if key == "patience" else 0.3),
        console=Console(stream),
    )
    search.run()
    said = said.replace("after 0 of", "after 8 of")
    assert f"the search ends: {said}" in stream.getvalue()
    assert search.ledger.facts.stopped.startswith(said)


def test_a_spent_budget_ends_a_search(tmp_path):
    judge = QualityJudge()
    type(judge).cost = property(lambda self: self.graded * 0.01)
    try:
        search, _, _ = make_search(
            tmp_path, make_study(trials=24, max_cost=3.0, hourly_price=1e-9), judge=judge
        )
        search.run()
    finally:
        del type(judge).cost
    assert "of 3 are spent" in search.ledger.facts.stopped
    assert 0 < len(candidates(search)) < 24


def test_known_vectors_and_recipes_are_the_first_candidates(tmp_path):
    genome = make_genome(make_study(), LAYERS)
    path = tmp_path / "known.yaml"
    path.write_text(genome.decode([0.5, 1.25, 0.75, 1.0]).to_yaml(), encoding="utf-8")
    study = make_study(trials=8, recipes=(str(path),), vectors=((0.1, 0.2, 0.3, 0.4),))
    search, _, _ = make_search(tmp_path, study)
    search.run()
    first = [r.vector for r in candidates(search)[:2]]
    assert first == [(0.5, 1.25, 0.75, 1.0), (0.1, 0.2, 0.3, 0.4)]


def test_a_recipe_that_is_no_merge_of_the_genome_is_refused(tmp_path):
    study = make_study()
    genome = make_genome(study, LAYERS)
    uneven = genome.decode([0.5, 1.25, 0.75, 1.0]).to_dict()
    half = make_genome(make_study(), LAYERS).decode([1.0] * 4).to_dict()
    uniform = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "dtype": "float32",
        "models": [{"model": "sibling", "parameters": {"weight": 0.7}}],
    }

    assert encode(genome, Recipe.from_dict(uniform), "x") == (0.7,) * 4
    assert encode(genome, Recipe.from_dict(uneven), "x") == (0.5, 1.25, 0.75, 1.0)
    gradient = uniform | {"models": [{"model": "sibling", "parameters": {"weight": [0.0, 1.0]}}]}
    other = uniform | {"models": [{"model": "stranger", "parameters": {"weight": 1.0}}]}
    for wrong in (gradient, other, half | {"merge_method": "ties"}):
        with pytest.raises(StudyFileError):
            encode(genome, Recipe.from_dict(wrong), "x")


def test_another_study_is_where_a_search_starts(tmp_path):
    source, _, _ = make_search(tmp_path, make_study("source", trials=24))
    source.run()
    study = make_study("second", trials=8, source_study="source")
    search, _, _ = make_search(tmp_path, study)
    wanted = source.sampler.distribution(source.ledger.history())
    start_from_source(study, f"sqlite:///{tmp_path}/second.db", search.genome, search.ledger)
    start = search.sampler.start(search.ledger.history())
    assert np.allclose(start.mean, wanted.mean)
    assert np.abs(start.mean - BEST).mean() < np.abs(1 - BEST).mean(), (
        "it stands nearer to the best than 1 does"
    )
    search.run()
    again, _, _ = make_search(tmp_path, study)
    assert np.allclose(again.sampler.start(again.ledger.history()).cov, wanted.cov), (
        "it is remembered"
    )


def test_what_ships_is_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "benchmarks")
    shipped = importlib.import_module("search").SHIPPED
    s = SearchSection()
    assert (s.ranking, s.subset or SUBSET, s.sigma, s.lr_adapt, s.finalists) == (
        shipped.ranking, shipped.subset, shipped.sigma, shipped.lr_adapt, shipped.finalists,
    )  # fmt: skip
    assert SplitSection().validation == shipped.validation


def test_a_study_from_before_a_default_is_told_how_it_goes_on(tmp_path):
    search, _, _ = make_search(tmp_path, make_study(ranking="subset", lr_adapt=True))
    stored = make_study(ranking="all", lr_adapt=False).to_dict()
    for section, key in (("search", "ranking"), ("search", "lr_adapt"), ("split", "validation")):
        del stored[section][key]
    old = StudyFacts(tasks="same", study_file=stored)
    changed = changes(old, replace(old, study_file=search.study.to_dict()))
    line = str(refused(old, changed, "fake"))
    assert '--set search.lr_adapt=false --set search.ranking="all"' in line
    as_before = make_study(ranking="all", lr_adapt=False).to_dict()
    assert not changes(old, replace(old, study_file=as_before))


def test_without_a_complete_generation_it_is_said_that_there_is_no_mean(tmp_path):
    stream = StringIO()
    search, _, _ = make_search(tmp_path, make_study(trials=5), console=Console(stream))
    search.run()
    assert not [r for r in search.ledger.records() if r.role == "mean"]
    assert "no generation of 8 is complete" in stream.getvalue()


def test_a_study_that_has_more_than_is_asked_for_says_so():
    stopped = why_limited(SearchSection(trials=4), 6, Spending(0.0, 0.0))
    assert stopped == "6 candidates are done, more than the 4 asked for"
