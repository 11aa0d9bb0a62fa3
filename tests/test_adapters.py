"""The contracts that Optuna and cmaes must keep, whose private names two adapters use."""

import numpy as np
import optuna
import pytest
from cmaes import CMA

from evomerge.errors import StudyError
from evomerge.searching.ledger import open_ledger
from evomerge.searching.records.optuna_adapter import open_stored
from evomerge.searching.records.study_facts import VERSION
from evomerge.searching.records.trial_record import INTERRUPTED, Result, TaskGrade
from evomerge.searching.samplers.cmaes_adapter import Distribution, make_cma, state

SPACE = {"a": (0.0, 2.0), "b": (-1.0, 1.0)}
NUMBERS = {"a": 0.1 + 0.2, "b": -1 / 3}


@pytest.fixture(params=["file", "driver", "uri"])
def url(request, tmp_path):
    urls = {
        "file": f"sqlite:///{tmp_path}/s.db",
        "driver": f"sqlite+pysqlite:///{tmp_path}/o.db",
        "uri": f"sqlite:///file:{tmp_path}/u%3F.db?uri=true",
    }
    return urls[request.param]


def test_a_trial_is_stored_whole_and_ends_once(url):
    stored = open_stored(url, "s", create=True)
    began = stored.start_trial(NUMBERS, SPACE, {"role": "candidate"})
    assert (began.params, began.user_attrs) == (NUMBERS, {"role": "candidate"})
    assert stored.running() == [began.number]
    stored.end_trial(began.number, "result", {"x": [1.5]}, 0.1 + 0.2)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        stored.end_trial(began.number, "reason", "again")
    failed = stored.start_trial(NUMBERS, SPACE, {"role": "candidate"})
    stored.end_trial(failed.number, "reason", "out of memory")
    assert stored.running() == []
    first, second = stored.trials()
    assert (first.values, first.params) == ([0.1 + 0.2], NUMBERS), "numbers keep every bit"
    assert first.user_attrs == {"role": "candidate", "result": {"x": [1.5]}}
    assert second.state == optuna.trial.TrialState.FAIL
    assert second.user_attrs["reason"] == "out of memory"


def test_what_the_only_writer_knows_is_what_is_stored(url):
    stored = open_stored(url, "s", create=True)
    stored.claim()
    for score in (1.5, None, float("inf"), float("nan")):
        began = stored.start_trial(NUMBERS, SPACE, {"role": "candidate"})
        assert same(stored.trials(), open_stored(url, "s").trials())
        stored.end_trial(began.number, "result", {"x": (1, 2)}, score)
        assert same(stored.trials(), open_stored(url, "s").trials())
    open_stored(url, "s", create=True).start_trial(NUMBERS, SPACE, {"role": "parent"})
    assert stored.start_trial(NUMBERS, SPACE, {}).number == 5, "another's trial has the number 4"
    assert same(stored.trials(), open_stored(url, "s").trials())


def same(found, wanted):
    keys = ("number", "state", "values", "params", "distributions", "user_attrs")
    rows = [[[getattr(trial, key) for key in keys] for trial in each] for each in (found, wanted)]
    return rows[0] == rows[1]


def test_what_is_stored_is_found_again(tmp_path):
    url = f"sqlite:///{tmp_path}/s.db"
    stored = open_stored(url, "s", create=True)
    stored.start_trial(NUMBERS, SPACE, {"role": "parent"})
    stored.set_attribute("fact", {"n": [1, 2]})
    again = open_stored(url, "s")
    assert again.attributes() == {"fact": {"n": [1, 2]}}
    assert again.running() == [0]
    assert again.trials()[0].params == NUMBERS
    study = optuna.load_study(storage=url, study_name="s")
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    with pytest.raises(StudyError, match="There are: s"):
        open_stored(url, "t")


def test_a_ledger_reads_what_it_wrote(url):
    ledger = open_ledger(url, "s", SPACE, create=True)
    assert ledger.facts.version == VERSION
    assert not ledger.facts.begun
    grades = {"0-x": TaskGrade(None, True, grade=3.5, length=0.25), "7": TaskGrade(True, False, 5)}
    trial = ledger.start("candidate", NUMBERS.values(), 1, 3)
    assert (trial.state, trial.slot, trial.score) == ("running", (1, 3), None)
    ledger.finish(trial, Result(4.25, None, 2, 0.5, {"merge": 1.0}, grades, 12, 3.5, {"grade": 4}))
    ledger.start("mean", NUMBERS.values(), 2)
    assert ledger.mark_interrupted() == 1
    done, stale = ledger.records()
    assert (done.vector, done.score, done.stderr) == (tuple(NUMBERS.values()), 4.25, None)
    assert (done.grades, done.parts, done.tokens) == (grades, {"grade": 4}, 12)
    assert (stale.state, stale.reason, stale.slot) == ("failed", INTERRUPTED, (2, None))
    assert ledger.history().candidates == (done,)


def test_a_study_of_a_newer_version_is_refused(tmp_path):
    ledger = open_ledger(f"sqlite:///{tmp_path}/s.db", "s", SPACE, create=True)
    ledger.remember("version", VERSION + 1)
    with pytest.raises(StudyError, match="newer version of evomerge"):
        ledger.history()


@pytest.mark.parametrize("lr_adapt", [False, True])
def test_the_state_of_cmaes_is_what_it_draws_from(lr_adapt):
    start = Distribution(np.array([1.0, 0.5]), 0.3, np.array([[1.0, 0.2], [0.2, 2.0]]))
    bounds = np.array([[-50.0, 50.0]] * 2)
    optimizer = make_cma(start, bounds, 6, seed=3, lr_adapt=lr_adapt)
    found = state(optimizer)
    assert (found.mean.tolist(), found.sigma) == (start.mean.tolist(), start.sigma)
    assert found.cov.tolist() == start.cov.tolist()
    for _ in range(8):
        asked = [optimizer.ask() for _ in range(6)]
        optimizer.tell([(x, float(np.sum((x - 0.7) ** 2))) for x in asked])
    found = state(optimizer)
    assert isinstance(optimizer, CMA)
    draws = np.array([optimizer.ask() for _ in range(6000)])
    spread = np.sqrt(np.diag(found.cov)) * found.sigma
    assert np.abs(draws.mean(0) - found.mean).max() < 0.06 * spread.max()
    assert np.cov(draws.T) == pytest.approx(
        found.sigma**2 * found.cov, abs=0.08 * spread.max() ** 2
    )


def test_the_state_is_a_copy():
    optimizer = make_cma(Distribution(np.zeros(2), 0.3, np.eye(2)), np.array([[-1.0, 1.0]] * 2), 4)
    found = state(optimizer)
    found.cov[0, 0] = 7.0
    found.mean[0] = 7.0
    assert state(optimizer).cov[0, 0] == 1.0
    assert state(optimizer).mean[0] == 0.0


def test_a_best_half_that_is_the_mean_leaves_numbers():
    start = Distribution(np.array([0.4, 0.6]), 0.2, np.eye(2))
    optimizer = make_cma(start, np.array([[0.0, 1.0]] * 2), 4, seed=1, lr_adapt=True)
    optimizer.tell([(start.mean.copy(), 0.0)] * 2 + [(optimizer.ask(), 1.0) for _ in range(2)])
    assert np.array_equal(state(optimizer).mean, start.mean)
    told = [optimizer.ask() for _ in range(4)]
    optimizer.tell([(x, float(i)) for i, x in enumerate(told)])
    assert np.isfinite([*state(optimizer).mean, state(optimizer).sigma]).all()


def test_the_learning_rate_is_that_of_cmaes_itself():
    start, bounds = Distribution(np.array([0.4, 0.6]), 0.2, np.eye(2)), np.array([[0.0, 1.0]] * 2)
    ours = make_cma(start, bounds, 4, seed=1, lr_adapt=True)
    plain = CMA(start.mean, 0.2, bounds, population_size=4, seed=1, cov=np.eye(2), lr_adapt=True)
    for _ in range(5):
        told = [(x, float(x @ x)) for x in (ours.ask() for _ in range(4))]
        for optimizer in (ours, plain):
            optimizer.tell(told)
    assert np.array_equal(ours.mean, plain.mean)
    assert ours._sigma == plain._sigma
