"""The sampler against plain cmaes, and against itself after any interruption."""

import hashlib
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from cmaes import CMA

from evomerge.searching.history import History
from evomerge.searching.ledger import open_ledger
from evomerge.searching.records.trial_record import INTERRUPTED, Result, TaskGrade
from evomerge.searching.samplers.cma import CmaSampler, Slot, within_reach
from evomerge.searching.samplers.cmaes_adapter import Distribution, make_cma, state

NAMES = ["a", "b", "c"]
# of studies that end with their test: in memory, where there is such a folder
MEMORY = Path("/dev/shm")
FOLDER, NUMBER = (
    tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None),
    itertools.count(),
)
TARGET = np.array([0.3, 1.4, 0.9])


def mean_of(sampler, history):
    """How many generations are complete, and the mean of the only distribution after them."""
    complete_generations, (mean,) = sampler.means(history)
    return complete_generations, mean


def make(declared=((-1.0, 3.0),) * 3, **more):
    settings = {
        "names": NAMES,
        "bounds": [(0.0, 2.0)] * 3,
        "starts": [1.0] * 3,
        "sigma": 0.3,
        "population": 6,
        "seed": 0,
    }
    return CmaSampler(**settings | {"declared": declared} | more)


def sampler(population=6, seed=0):
    return make([(0.0, 2.0)] * 3, population=population, seed=seed)


def result(x):
    return Result(float(-np.sum((np.array(x) - TARGET) ** 2)), None, 1, 0.0, {}, {})


def new_ledger(own, url=None):
    url = url or f"sqlite:///{FOLDER.name}/{next(NUMBER)}.db"
    return open_ledger(url, "s", own.space, create=True)


def step(own, ledger, outcome=result):
    """One candidate, drawn and finished."""
    trial = begin(own, ledger)
    ledger.finish(trial, outcome(trial.vector))


def begin(own, ledger):
    slot = own.next_slot(ledger.history())
    vector = own.draw(ledger.history(), slot)
    return ledger.start("candidate", vector, slot.generation, slot.index)


def run(own, ledger, trials, interrupt=()):
    """Ask and tell until `trials` candidates are complete; those at the numbers in `interrupt` are
    left running first.
    """
    done = 0
    while done < trials:
        trial = begin(own, ledger)
        if trial.number in interrupt:
            ledger.mark_interrupted()
            continue
        ledger.finish(trial, result(trial.vector))
        done += 1
    return [
        (t.generation, t.index, t.vector, t.score)
        for t in ledger.records()
        if t.state == "complete"
    ]


def test_interruptions_change_nothing(tmp_path):
    plain = run(sampler(), new_ledger(sampler()), 24)
    url = f"sqlite:///{tmp_path}/s.db"
    run(sampler(), new_ledger(sampler(), url), 7, interrupt={2, 5})
    assert run(sampler(), new_ledger(sampler(), url), 17, interrupt={10, 11}) == plain


@pytest.mark.parametrize("seed", [0, 7])
def test_the_candidates_are_those_of_plain_cmaes(seed):
    own = sampler(6, seed)
    ledger = new_ledger(own)
    ours = [list(weights) for _, _, weights, _ in run(own, ledger, 24)]
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
    assert mean_of(own, ledger.history())[1].tolist() == np.clip(optimizer.mean, 0, 2).tolist()


def test_every_number_has_its_own_bounds_start_and_step():
    bounds, starts = [(0.0, 2.0), (0.1, 1.0), (0.0, 3.0)], [1.0, 0.8, 1.5]
    wider, scales = [(-1.0, 4.0)] * 3, [1.0, 0.5, 2.0]
    own = make(wider, bounds=bounds, starts=starts, sigma=0.1, scales=scales)
    draws = np.array([own.draw(History(), Slot(0, i)) for i in range(4000)])
    assert np.abs(draws.mean(0) - starts).max() < 0.02
    assert draws.std(0) == pytest.approx([0.1, 0.05, 0.2], rel=0.05)
    wide = make(bounds, bounds=bounds, starts=starts, sigma=2.0)
    draws = np.array([wide.draw(History(), Slot(0, i)) for i in range(400)])
    assert (draws >= np.array(bounds).T[0]).all()
    assert (draws <= np.array(bounds).T[1]).all()


def test_one_number_alone_is_searched():
    own = make([(0.0, 2.0)], names=["a"], bounds=[(0.0, 2.0)], starts=[1.0], population=4)
    ledger = new_ledger(own)
    for _ in range(60):
        step(own, ledger, lambda x: Result(-((x[0] - 1.4) ** 2), None, 1, 0.0, {}, {}))
    assert mean_of(own, ledger.history())[1] == pytest.approx([1.4], abs=0.02)


def test_it_finds_the_optimum():
    own = sampler(8)
    ledger = new_ledger(own)
    run(own, ledger, 240)
    _, mean = mean_of(own, ledger.history())
    assert np.abs(mean - TARGET).max() < 0.02


def test_a_generation_is_drawn_from_the_mean_and_step_size_given():
    own = sampler(population=6, seed=3)
    draws = np.array([own.draw(History(), Slot(0, i)) for i in range(4000)])
    assert np.abs(draws.mean(0) - 1.0).max() < 0.02
    assert np.abs(draws.std(0) - 0.3).max() < 0.02
    assert draws.min() >= 0.0
    assert draws.max() <= 2.0


def test_a_failed_place_is_drawn_anew_and_an_interrupted_one_as_it_was():
    own = sampler()
    ledger = new_ledger(own)
    first = begin(own, ledger)
    ledger.fail(first, INTERRUPTED)
    second = begin(own, ledger)
    assert second.vector == first.vector
    ledger.fail(second, "out of memory")
    assert own.next_slot(ledger.history()) == Slot(0, 0, 1)
    assert begin(own, ledger).vector != first.vector


@pytest.mark.parametrize("role", ["parent", "uniform", "mean"])
def test_other_roles_do_not_reach_the_optimizer(role):
    own = sampler()
    ledger = new_ledger(own)
    ledger.finish(ledger.start(role, [0.0] * 3), result([0, 0, 0]))
    assert ledger.records()[0].vector == (0.0,) * 3
    assert own.next_slot(ledger.history()) == Slot(0, 0)
    assert ledger.history().complete_generations(own.population) == 0


def complete(own, trials):
    """The history of a study of which `trials` candidates are told."""
    ledger = new_ledger(own)
    for _ in range(trials):
        step(own, ledger)
    return ledger.history()


def coarse(weights):
    """A score with many ties, and two tasks' grades that tell the candidates apart."""
    finer = -float(np.sum((np.array(weights) - 0.7) ** 2))
    grades = {"0": TaskGrade(True, False, finer), "1": TaskGrade(False, False, 2 * finer)}
    return Result(round(finer), None, 2, 0.0, {}, grades)


@pytest.mark.parametrize("breaks_ties", [False, True])
def test_partial_credit_orders_equal_scores(breaks_ties):
    own = make(lr_adapt=True)
    ledger = new_ledger(own)
    ledger.remember("credit_breaks_ties", breaks_ties)
    for _ in range(30):
        step(own, ledger, coarse)
    history = ledger.history()
    optimizer = make_cma(own.default, own.bounds, 6, lr_adapt=True)
    for generation in range(5):
        told = history.generation(generation)
        assert len({t.score for t in told}) < 6, "scores are tied"
        small = 1e-6 if breaks_ties else 0.0
        optimizer.tell(
            [(np.array(t.vector), -t.score - small * 1.5 * t.grades["0"].grade) for t in told]
        )
    assert mean_of(own, history)[1].tolist() == optimizer.mean.tolist()
    assert own.distribution(history).cov.tolist() == state(optimizer).cov.tolist()


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
        told = trials.generation(generation)
        optimizer.tell([(np.array(t.vector), -t.score) for t in told])
    assert mean_of(own, trials)[1].tolist() == optimizer.mean.tolist()
    assert mean_of(own, trials)[1].tolist() != mean_of(make(), complete(make(), 30))[1].tolist()
    edge = [(0.0, 0.2)] * 3
    at_the_edge = make(edge, bounds=edge, starts=[0.1] * 3, lr_adapt=True)
    ledger = new_ledger(at_the_edge)
    rng = np.random.default_rng(0)
    for _ in range(60):
        step(at_the_edge, ledger, lambda x: Result(float(rng.normal()), None, 1, 0.0, {}, {}))
    assert all(0 <= x <= 0.2 for x in at_the_edge.replay(ledger.history(), 10).mean)


def test_the_step_size_of_a_generation():
    own = make()
    trials = complete(own, 20)
    assert own.sigma(trials, 0) == 0.3
    assert own.sigma(trials, 3) == state(own.replay(trials, 3)).sigma
    assert own.sigma(trials, 3) != own.sigma(trials, 2)


def test_known_vectors_are_the_first_candidates():
    known = [[0.5, 0.5, 0.5], [0.4, 1.3, 0.8]]
    own = make(known_candidates=known)
    trials = complete(own, 12).trials
    assert [list(t.vector) for t in trials[:2]] == known
    plain = complete(make(), 6).trials
    assert [t.vector for t in trials[2:6]] == [t.vector for t in plain[2:6]]
    assert (
        own.draw(History(), Slot(0, 0, 1)).tolist()
        == make().draw(History(), Slot(0, 0, 1)).tolist()
    )


def test_more_known_vectors_than_a_generation_holds_go_on_in_the_next():
    known = [[0.1 * i, 1.0, 1.0] for i in range(8)]
    trials = complete(make(known_candidates=known), 12).trials
    assert [list(t.vector) for t in trials[:8]] == known
    assert trials[7].generation == 1


def test_a_known_vector_far_away_does_not_blow_up_the_step_size():
    far = make(known_candidates=[[-1.0, 3.0, 3.0]])
    assert far.sigma(complete(far, 6), 1) < 0.6
    start = Distribution(np.ones(3), 0.3, np.diag([1.0, 4.0, 1.0]))
    bounds = np.array([[0.0, 2.0]] * 3)
    near = np.array([1.1, 0.8, 1.0])
    assert within_reach(near, start, bounds) == pytest.approx(near)
    tight = Distribution(np.ones(3), 0.01, np.eye(3))
    assert np.linalg.norm(within_reach(np.full(3, 2.0), tight, bounds) - 1) == pytest.approx(
        0.01 * (np.sqrt(3) + 6 / 5)
    )


def test_another_studys_distribution_is_a_start():
    source = make()
    found = source.distribution(complete(source, 60))
    heir = make(
        bounds=[(-1.0, 3.0)] * 3,
        starts=found.mean.tolist(),
        sigma=found.sigma,
        seed=1,
        cov=found.cov,
    )
    draws = np.array([heir.draw(History(), Slot(0, i)) for i in range(3000)])
    assert np.abs(draws.mean(0) - found.mean).max() < 0.02
    assert np.cov(draws.T) == pytest.approx(
        found.sigma**2 * found.cov, abs=0.1 * found.sigma**2 * np.abs(found.cov).max()
    )
    assert np.abs(found.mean - TARGET).max() < 0.2
