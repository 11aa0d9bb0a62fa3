"""Several objectives: values, fronts, the sampler, and a search to its verdict."""

import itertools

import numpy as np
import pytest
from optuna._hypervolume import compute_hypervolume
from search_tools import Cut, Cutting, TaskEngine, make_search, make_study, trials

from evomerge.answering.engine import Answer
from evomerge.errors import StudyFileError
from evomerge.reporting.front_chart import front_charts
from evomerge.searching.front.objective_values import (
    FrontObjective,
    estimates,
    objective_baselines,
    study_objectives,
    task_groups,
    trial_estimates,
)
from evomerge.searching.front.pareto_front import hypervolume, knee, non_dominated, thinned
from evomerge.searching.history import History
from evomerge.searching.records.trial_record import TaskGrade, TrialRecord
from evomerge.searching.records.verdict_record import Verdict
from evomerge.searching.samplers.pareto import ParetoSampler, simplex, standardized
from evomerge.searching.snapshot import load_snapshot
from evomerge.study import ObjectiveSection, TaskSource
from evomerge.tasks import Split, Task

BOTH = ObjectiveSection(maximize=("grade",), minimize=("answer_tokens",))


class Talkative(TaskEngine):
    """Its answers are longer, the larger the weights are."""

    def answer(self, prompts, settings=None, on_answer=None, deadline=None):
        tokens = round(20 + 40 * float(self.vector.mean()))
        answers = super().answer(prompts)
        return [Answer(answer.text, answer.truncated, tokens) for answer in answers]


class TalkativeCutting(Talkative, Cutting):
    pass


def random_values(seed, objectives, n=9):
    return np.random.default_rng(seed).uniform(0, 1, (n, objectives)).round(1)


@pytest.mark.parametrize(("objectives", "seed"), itertools.product([2, 3, 4], range(6)))
def test_a_hypervolume_is_optunas(objectives, seed):
    values = random_values(seed, objectives)
    worst = np.full(objectives, 0.1)
    inside = values[(values > worst).all(axis=1)]
    wanted = compute_hypervolume(-inside, -worst) if len(inside) else 0.0
    assert hypervolume(values, worst) == pytest.approx(wanted)


@pytest.mark.parametrize(("objectives", "seed"), itertools.product([2, 3, 4], range(6)))
def test_a_front_is_what_no_row_beats(objectives, seed):
    values = random_values(seed, objectives)
    front = non_dominated(values)
    for i, row in enumerate(values):
        better = [j for j in range(len(values)) if (values[j] >= row).all()]
        beaten = any((values[j] > row).any() for j in better)
        assert (i in front) == (not beaten and min(better) == i)
    assert set(thinned(values[front], 3)) <= set(range(len(front)))
    assert len(thinned(values[front], 3)) == min(3, len(front))


def test_a_knee_bulges_most_and_the_least_volume_goes_first():
    values = np.array([[0.0, 10.0], [0.8, 9.0], [0.5, 9.4], [1.0, 0.0]])
    assert knee(values, range(4)) == 1
    assert knee(values, [0, 2, 3]) == 2
    assert thinned(values, 3) == [0, 1, 3]


def test_an_objective_corrects_for_the_tasks_that_a_trial_has_seen():
    tokens = FrontObjective("answer_tokens", "answer_tokens", maximized=False)
    group = FrontObjective("group:a", "correct", tasks=frozenset({"0", "1"}))

    def grades(*lengths):
        return {str(i): TaskGrade(i % 2 == 0, False, 3.0, tokens=n) for i, n in enumerate(lengths)}

    references = [record(0, grades(10, 20, 30)), record(1, grades(30, 20, 10))]
    baselines = objective_baselines(references, [tokens, group])
    found = estimates({"0": TaskGrade(True, False, 3.0, tokens=26)}, baselines, [tokens, group])
    assert found["answer_tokens"].mean == pytest.approx(26 - 20 + 20)
    assert found["group:a"].mean == pytest.approx(1.0 - 1.0 + 0.5)
    assert "group:a" not in estimates({"2": grades(1, 1, 1)["2"]}, baselines, [group])


def record(number, grades, **more):
    fields = {
        "generation": None,
        "index": None,
        "role": "parent",
        "state": "complete",
        "vector": (float(number),),
        "score": 1.0,
        "stderr": None,
        "n": len(grades),
        "truncated": 0.0,
        "seconds": {},
        "reason": None,
    }
    return TrialRecord(number=number, grades=grades, **fields | more)


def test_groups_are_the_tasks_of_a_file_or_a_kind():
    named = ObjectiveSection(maximize=("group:fr", "group:en"))
    study = make_study(objective=named)
    tasks = [Task(i, "x", kind=("fr", "en")[i % 2]) for i in range(8)]
    split = Split(tuple(tasks[:4]), tuple(tasks[4:]))
    assert task_groups(study, split) == {
        "group:fr": ("0", "2", "4", "6"),
        "group:en": ("1", "3", "5", "7"),
    }
    first, _ = study_objectives(study, task_groups(study, split))
    assert first.values({"0": TaskGrade(None, False, 2.0), "1": TaskGrade(None, False, 3.0)}) == {
        "0": 2.0
    }
    with pytest.raises(StudyFileError, match="group:fr") as caught:
        task_groups(study, Split(tuple(tasks[1::2]), tuple(tasks[1::2])))
    assert "Use one of group:en." in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_are_spread_over_all_compromises():
    assert simplex(2).tolist() == [[1, 0], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0, 1]]
    for objectives, count in ((3, 6), (4, 10)):
        weights = simplex(objectives)
        assert len({tuple(row) for row in weights.tolist()}) == len(weights) == count
        assert weights.sum(axis=1) == pytest.approx(np.ones(count))


def test_objectives_are_ranked_in_units_of_their_spread():
    known = [record(i, {}, parts={"a": float(i), "b": 10.0 * i, "c": 1.0}) for i in range(4)]
    values = standardized(known, {"a": 1.0, "b": -1.0, "c": 1.0, "missing": 1.0})
    assert values[:, 0] == pytest.approx(-values[:, 1])
    assert values[:, 0].std() == pytest.approx(1)
    assert not values[:, 2:].any()


def test_a_search_finds_a_front_and_answers_it_once(tmp_path):
    study = make_study(objective=BOTH, trials=48, validation=0.2)
    search, engine, _ = make_search(tmp_path, study, Talkative(noise=0.1), tasks=(24, 12, 6))
    assert isinstance(search.sampler, ParetoSampler)
    verdict = search.run()
    front, history = verdict.front, search.ledger.history()
    assert front.held_out
    assert front.objectives == ("grade", "answer_tokens")
    assert 2 <= len(front.points) <= 8
    grades = [point.values["grade"] for point in front.points]
    assert [value.mean for value in grades] == sorted([v.mean for v in grades], reverse=True)
    for point in (*front.points, *front.compared):
        assert set(point.values) == {"grade", "answer_tokens"}
        for value in point.values.values():
            assert value.low <= value.mean <= value.high
    assert [point.name for point in front.compared] == ["base", "sibling"]
    middle = history.trial(front.middle.trial)
    assert search.ledger.facts.compared["winner"] == middle.number
    assert len(history.means) == 5
    # the search covers more than its parents do
    values = np.array(
        [[p.values["grade"].mean, -p.values["answer_tokens"].mean] for p in front.points]
    )
    parents = np.array(
        [[p.values["grade"].mean, -p.values["answer_tokens"].mean] for p in front.compared]
    )
    worst = parents.min(axis=0) - 0.01
    assert hypervolume(values, worst) > 1.1 * hypervolume(parents, worst)
    assert Verdict.from_dict(verdict.to_dict()) == verdict
    before = len(engine.answered)
    assert search.run() == verdict
    assert len(engine.answered) == before


def test_every_trial_records_each_objective(tmp_path):
    study = make_study(objective=BOTH, trials=8, ranking="subset", subset=5)
    search, _, _ = make_search(tmp_path, study, Talkative())
    search.run()
    history = search.ledger.history()
    for t in history.complete:
        assert set(t.parts) == {"grade", "answer_tokens"}
        assert t.parts["grade"] == pytest.approx(t.score)
        assert {grade.tokens for grade in t.grades.values()} == {
            round(20 + 40 * float(np.mean(t.vector)))
        }


def shown(verdict):
    """What a front says, but for the trials' numbers: those of a cut run are higher."""
    return [(point.name, point.values) for point in verdict.front.points]


def test_a_search_that_is_cut_ends_as_a_whole_one(tmp_path):
    study = make_study(objective=BOTH, trials=24, ranking="subset", subset=6, lr_adapt=True)
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole, _, _ = make_search(tmp_path / "whole", study, Talkative())
    verdict = whole.run()
    runs = 0
    while True:
        runs += 1
        Cutting.left = 17
        search, _, _ = make_search(tmp_path / "cut", study, TalkativeCutting())
        try:
            assert shown(search.run()) == shown(verdict)
            break
        except Cut:
            continue
    assert runs > 3
    assert trials(search) == trials(whole)


def test_a_replay_is_the_sampler_that_went_on(tmp_path):
    study = make_study(objective=BOTH, trials=24)
    search, _, _ = make_search(tmp_path, study, Talkative())
    search.run()
    history, kept = search.ledger.history(), search.sampler
    fresh, _, _ = make_search(tmp_path, study, Talkative())
    ours, theirs = kept.means(history), fresh.sampler.means(History(history.trials, history.start))
    assert ours[0] == theirs[0] == 3
    assert [m.tolist() for m in ours[1]] == [m.tolist() for m in theirs[1]]
    for t in history.candidates:
        slot = fresh.sampler.slot(history, *t.slot)
        assert tuple(fresh.sampler.draw(history, slot).tolist()) == t.vector


def test_a_study_with_one_objective_has_a_front_from_what_it_recorded(tmp_path):
    search, _, _ = make_search(tmp_path, make_study(trials=16), Talkative(noise=0.0))
    search.run()
    found = load_snapshot(f"sqlite:///{tmp_path}/fake.db", "fake")
    front = found.front
    assert (front.maximize, front.minimize, front.held_out) == (
        ("grade",),
        ("answer_tokens",),
        False,
    )
    rows = {}
    for t in search.ledger.history().complete:
        tokens = np.mean([grade.tokens for grade in t.grades.values()])
        rows[t.number] = (t.score, -tokens)
    for point in front.points:
        grade, tokens = rows[point.trial]
        assert point.values["grade"].mean == pytest.approx(grade)
        assert point.values["answer_tokens"].mean == pytest.approx(-tokens)
    wanted = non_dominated(np.array(list(rows.values())))
    assert sorted(point.trial for point in front.points) == sorted([*rows][i] for i in wanted)
    assert found.with_point("1").picked.number == front.points[0].trial


def test_trials_without_tokens_by_task_have_those_of_all_their_answers(tmp_path):
    known = [record(i, {"0": TaskGrade(True, False, 3.0)}, tokens=7) for i in range(2)]
    objectives = study_objectives(make_study(), {})
    baselines = objective_baselines(known, objectives)
    assert trial_estimates(known[0], baselines, objectives, "grade")["answer_tokens"].mean == 7
    without = record(0, {"0": TaskGrade(True, False, 3.0)})
    assert "answer_tokens" not in trial_estimates(without, baselines, objectives, "grade")


def test_three_objectives_and_groups_of_tasks(tmp_path):
    sources = (TaskSource(file="a.jsonl"), TaskSource(file="b.jsonl"))
    named = ObjectiveSection(maximize=("tasks:a", "tasks:b"), minimize=("answer_tokens",))
    study = make_study(objective=named, sources=sources, trials=16, ranking="subset", subset=8)
    search, _, _ = make_search(tmp_path, study, Talkative())
    front = search.run().front
    assert search.sampler.distributions == 6
    # two that have ranked every generation alike have one mean
    assert 3 <= len(search.ledger.history().means) <= 6
    for t in search.ledger.history().references:
        for number, name in enumerate(("tasks:a", "tasks:b")):
            values = [g.grade for key, g in t.grades.items() if key.startswith(f"{number}-")]
            assert t.parts[name] == pytest.approx(np.mean(values))
    assert all(set(point.values) == set(named.several) for point in front.points)
    assert len(front_charts(front)) == 2
