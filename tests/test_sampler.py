"""The sampler against plain cmaes, and against itself after any interruption."""

import hashlib

import numpy as np
import optuna
import pytest
from cmaes import CMA
from optuna.trial import TrialState

from evomerge.searching.ledger import Ledger, Result
from evomerge.searching.sampler import INTERRUPTED, Distribution, ReplayedCmaEs, Slot, shortened

NAMES = ["a", "b", "c"]
TARGET = np.array([0.3, 1.4, 0.9])


def sampler(population=6, seed=0):
    return ReplayedCmaEs(
        NAMES, [(0.0, 2.0)] * 3, [(0.0, 2.0)] * 3, [1.0] * 3, 0.3, population, seed
    )


def result(x):
    return Result(float(-np.sum((np.array(x) - TARGET) ** 2)), 0.0, 1, 0.0, {}, {})


def run(study, trials, interrupt=()):
    """Ask and tell until `trials` candidates are complete; those at the numbers in `interrupt` are
    left running first.
    """
    ledger = Ledger(study)
    done = 0
    while done < trials:
        slot = study.sampler.next_slot(ledger.trials())
        trial = ledger.start("candidate", slot)
        if trial.number in interrupt:
            ledger.release_stale()
            continue
        ledger.finish(trial, result([trial.params[n] for n in NAMES]))
        done += 1
    return [
        (t.user_attrs["generation"], t.user_attrs["index"], t.params, t.values)
        for t in ledger.trials()
        if t.state == TrialState.COMPLETE
    ]


def test_interruptions_change_nothing(tmp_path):
    plain = run(optuna.create_study(sampler=sampler(), direction="maximize"), 24)
    url = f"sqlite:///{tmp_path}/s.db"
    study = optuna.create_study(
        storage=url, study_name="s", sampler=sampler(), direction="maximize"
    )
    run(study, 7, interrupt={2, 5})
    again = optuna.load_study(storage=url, study_name="s", sampler=sampler())
    assert run(again, 17, interrupt={10, 11}) == plain


@pytest.mark.parametrize("seed", [0, 7])
def test_the_candidates_are_those_of_plain_cmaes(seed):
    study = optuna.create_study(sampler=sampler(6, seed), direction="maximize")
    ours = [list(params.values()) for _, _, params, _ in run(study, 24)]
    optimizer = CMA(
        mean=np.ones(3), sigma=0.3, bounds=np.array([[0.0, 2.0]] * 3), population_size=6
    )
    theirs = []
    for generation in range(4):
        asked = []
        for index in range(6):
            digest = hashlib.sha256(f"{seed}/{generation}/{index}/0".encode()).digest()
            optimizer.reseed_rng(int.from_bytes(digest[:4], "big"))
            asked.append(optimizer.ask())
        optimizer.tell([(x, -result(x).score) for x in asked])
        theirs += [x.tolist() for x in asked]
    assert ours == theirs
    assert (
        study.sampler.mean(study.get_trials())[1].tolist() == np.clip(optimizer.mean, 0, 2).tolist()
    )


def test_every_number_has_its_own_bounds_start_and_step():
    bounds, starts = [(0.0, 2.0), (0.1, 1.0), (0.0, 3.0)], [1.0, 0.8, 1.5]
    own = ReplayedCmaEs(NAMES, bounds, [(-1.0, 4.0)] * 3, starts, 0.1, 6, 0, [1.0, 0.5, 2.0])
    draws = np.array([own.draw([], Slot(0, i)) for i in range(4000)])
    assert np.abs(draws.mean(0) - starts).max() < 0.02
    assert draws.std(0) == pytest.approx([0.1, 0.05, 0.2], rel=0.05)
    wide = ReplayedCmaEs(NAMES, bounds, bounds, starts, 2.0, 6, 0)
    draws = np.array([wide.draw([], Slot(0, i)) for i in range(400)])
    assert (draws >= np.array(bounds).T[0]).all()
    assert (draws <= np.array(bounds).T[1]).all()


def test_one_number_alone_is_searched():
    study = optuna.create_study(
        sampler=ReplayedCmaEs(["a"], [(0.0, 2.0)], [(0.0, 2.0)], [1.0], 0.3, 4, 0),
        direction="maximize",
    )
    ledger = Ledger(study)
    for _ in range(60):
        trial = ledger.start("candidate", study.sampler.next_slot(ledger.trials()))
        ledger.finish(trial, Result(-((trial.params["a"] - 1.4) ** 2), 0.0, 1, 0.0, {}, {}))
    assert study.sampler.mean(ledger.trials())[1] == pytest.approx([1.4], abs=0.02)


def test_it_finds_the_optimum():
    study = optuna.create_study(sampler=sampler(8), direction="maximize")
    run(study, 240)
    _, mean = study.sampler.mean(study.get_trials())
    assert np.abs(mean - TARGET).max() < 0.02


def test_a_generation_is_drawn_from_the_mean_and_step_size_given():
    own = sampler(population=6, seed=3)
    draws = np.array([own.draw([], Slot(0, i)) for i in range(4000)])
    assert np.abs(draws.mean(0) - 1.0).max() < 0.02
    assert np.abs(draws.std(0) - 0.3).max() < 0.02
    assert draws.min() >= 0.0
    assert draws.max() <= 2.0


def test_a_failed_place_is_drawn_anew_and_an_interrupted_one_as_it_was():
    study = optuna.create_study(sampler=sampler(), direction="maximize")
    ledger = Ledger(study)
    first = ledger.start("candidate", study.sampler.next_slot(ledger.trials()))
    ledger.fail(first, INTERRUPTED)
    second = ledger.start("candidate", study.sampler.next_slot(ledger.trials()))
    assert second.params == first.params
    ledger.fail(second, "out of memory")
    slot = study.sampler.next_slot(ledger.trials())
    third = ledger.start("candidate", slot)
    assert slot == Slot(0, 0, 1)
    assert third.params != first.params


@pytest.mark.parametrize("role", ["parent", "uniform", "mean"])
def test_other_roles_do_not_reach_the_optimizer(role):
    study = optuna.create_study(sampler=sampler(), direction="maximize")
    ledger = Ledger(study)
    ledger.finish(ledger.start(role, weights=dict.fromkeys(NAMES, 0.0)), result([0, 0, 0]))
    assert ledger.trials()[0].params == dict.fromkeys(NAMES, 0.0)
    assert study.sampler.next_slot(ledger.trials()) == Slot(0, 0)
    assert study.sampler.complete_generations(ledger.trials()) == 0


def complete(own, trials):
    """A study of which `trials` candidates are told."""
    study = optuna.create_study(sampler=own, direction="maximize")
    ledger = Ledger(study)
    for _ in range(trials):
        trial = ledger.start("candidate", study.sampler.next_slot(ledger.trials()))
        ledger.finish(trial, result([trial.params[n] for n in NAMES]))
    return study.get_trials()


def make(**more):
    return ReplayedCmaEs(NAMES, [(0.0, 2.0)] * 3, [(-1.0, 3.0)] * 3, [1.0] * 3, 0.3, 6, 0, **more)


def test_learning_rates_adapt_as_in_plain_cmaes_and_the_mean_stays_within_bounds():
    own = make(lr_adapt=True)
    trials = complete(own, 30)
    optimizer = CMA(
        mean=np.ones(3),
        sigma=0.3,
        bounds=np.array([[0.0, 2.0]] * 3),
        population_size=6,
        lr_adapt=True,
    )
    for generation in range(5):
        told = [t for t in trials if t.user_attrs["generation"] == generation]
        optimizer.tell([(np.array([t.params[n] for n in NAMES]), -t.values[0]) for t in told])
    assert own.mean(trials)[1].tolist() == optimizer.mean.tolist()
    assert own.mean(trials)[1].tolist() != make().mean(complete(make(), 30))[1].tolist()
    at_the_edge = ReplayedCmaEs(
        NAMES, [(0.0, 0.2)] * 3, [(0.0, 0.2)] * 3, [0.1] * 3, 0.3, 6, 0, lr_adapt=True
    )
    study = optuna.create_study(sampler=at_the_edge, direction="maximize")
    ledger = Ledger(study)
    rng = np.random.default_rng(0)
    for _ in range(60):
        trial = ledger.start("candidate", at_the_edge.next_slot(ledger.trials()))
        ledger.finish(trial, Result(float(rng.normal()), 0.0, 1, 0.0, {}, {}))
    assert all(0 <= x <= 0.2 for x in at_the_edge.replay(ledger.trials(), 10).mean)


def test_the_step_size_of_a_generation():
    own = make()
    trials = complete(own, 20)
    assert own.sigma(trials, 0) == 0.3
    assert own.sigma(trials, 3) == own.replay(trials, 3)._sigma
    assert own.sigma(trials, 3) != own.sigma(trials, 2)


def test_known_vectors_are_the_first_candidates():
    known = [[0.5, 0.5, 0.5], [0.4, 1.3, 0.8]]
    own = make(first=known)
    trials = complete(own, 12)
    assert [[t.params[n] for n in NAMES] for t in trials[:2]] == known
    plain = complete(make(), 6)
    assert [t.params for t in trials[2:6]] == [t.params for t in plain[2:6]]
    assert own.draw(trials[:0], Slot(0, 0, 1)).tolist() == make().draw([], Slot(0, 0, 1)).tolist()


def test_more_known_vectors_than_a_generation_holds_go_on_in_the_next():
    known = [[0.1 * i, 1.0, 1.0] for i in range(8)]
    trials = complete(make(first=known), 12)
    assert [[t.params[n] for n in NAMES] for t in trials[:8]] == known
    assert trials[7].user_attrs["generation"] == 1


def test_a_known_vector_far_away_does_not_blow_up_the_step_size():
    far = make(first=[[-1.0, 3.0, 3.0]])
    assert far.sigma(complete(far, 6), 1) < 0.6
    start = Distribution(np.ones(3), 0.3, np.diag([1.0, 4.0, 1.0]))
    bounds = np.array([[0.0, 2.0]] * 3)
    near = np.array([1.1, 0.8, 1.0])
    assert shortened(near, start, bounds) == pytest.approx(near)
    tight = Distribution(np.ones(3), 0.01, np.eye(3))
    assert np.linalg.norm(shortened(np.full(3, 2.0), tight, bounds) - 1) == pytest.approx(
        0.01 * (np.sqrt(3) + 6 / 5)
    )


def test_another_studys_distribution_is_a_start():
    source = make()
    found = source.distribution(complete(source, 60))
    heir = ReplayedCmaEs(
        NAMES,
        [(-1.0, 3.0)] * 3,
        [(-1.0, 3.0)] * 3,
        found.mean.tolist(),
        found.sigma,
        6,
        1,
        cov=found.cov,
    )
    draws = np.array([heir.draw([], Slot(0, i)) for i in range(3000)])
    assert np.abs(draws.mean(0) - found.mean).max() < 0.02
    assert np.cov(draws.T) == pytest.approx(
        found.sigma**2 * found.cov, abs=0.1 * found.sigma**2 * np.abs(found.cov).max()
    )
    assert np.abs(found.mean - TARGET).max() < 0.2
