"""What is kept in memory between candidates equals what is read and replayed from the beginning."""

import random

import numpy as np
import pytest
from cmaes import CMA
from search_tools import Cut, Cutting, make_search, make_study, trials

from evomerge.searching.history import History
from evomerge.searching.ledger import Ledger, open_ledger
from evomerge.searching.records.study_facts import Start
from evomerge.searching.records.trial_record import INTERRUPTED, Result
from evomerge.searching.samplers.cma import CmaSampler, Slot
from evomerge.searching.samplers.cmaes_adapter import Distribution, make_cma, twin

D, POPULATION = 3, 6


def make(**more):
    return CmaSampler(
        names=["a", "b", "c"],
        bounds=[(0.0, 2.0)] * D,
        declared=[(-1.0, 3.0)] * D,
        starts=[1.0] * D,
        sigma=0.3,
        population=POPULATION,
        seed=3,
        **more,
    )


def same_state(optimizer, other):
    """Every attribute that is not the random state, bit for bit."""
    for name, value in vars(optimizer).items():
        if name not in ("_rng", "_funhist_values"):  # the latter begins uninitialised
            assert np.array_equal(value, vars(other)[name]), name


def same_history(found, reference):
    """A history against plain loops over its trials."""
    assert found.trials == reference
    complete = [t for t in reference if t.state == "complete"]
    candidates = [t for t in complete if t.role == "candidate"]
    assert list(found.complete) == complete
    assert list(found.candidates) == candidates
    assert found.finished == {t.slot: t for t in candidates}
    assert list(found.references) == [t for t in complete if t.role in ("parent", "uniform")]
    means = [t for t in complete if t.role == "mean"]
    assert found.mean == (means[-1] if means else None)
    number = 0
    while divmod(number, POPULATION) in found.finished:
        number += 1
    assert found.next_slot(POPULATION) == divmod(number, POPULATION)
    for generation in range(number // POPULATION + 2):
        of_it = [t for t in candidates if t.generation == generation]
        assert found.generation(generation) == of_it
    slots = {t.slot for t in reference if t.role == "candidate"}
    for slot in slots:
        failed = [
            t
            for t in reference
            if t.role == "candidate"
            and t.slot == slot
            and t.state == "failed"
            and t.reason != INTERRUPTED
        ]
        assert found.failures(*slot) == len(failed)
    if complete:
        best = max(t.score for t in complete)
        assert found.index.best == next(t for t in complete if t.score == best)


def outcome(x, rng):
    return Result(round(float(-np.sum((np.array(x) - 0.7) ** 2)), 2), None, 1, 0.0, {}, {})


def step(own, ledger, other, rng):
    """One event of a study; `other` is the ledger of another process on the same storage."""
    history = ledger.history()
    slot = own.next_slot(history)
    writer = other if rng.random() < 0.2 else ledger
    kind = rng.random()
    if kind < 0.1:
        trial = writer.start("uniform", [rng.random()] * D)
        writer.finish(trial, outcome(trial.vector, rng))
        return
    if kind < 0.15:
        complete, (mean,) = own.means(history)
        trial = writer.start("mean", mean.tolist(), complete)
        writer.finish(trial, outcome(trial.vector, rng))
        return
    trial = writer.start("candidate", own.draw(history, slot).tolist(), slot.generation, slot.index)
    if kind < 0.25:
        writer.fail(trial, "out of memory")
    elif kind < 0.35:
        writer.mark_interrupted()
    elif kind < 0.4:  # two at once: the later one ends first
        after = writer.start("uniform", [rng.random()] * D)
        ledger.history()
        writer.finish(after, outcome(after.vector, rng))
        ledger.history()
        writer.finish(trial, outcome(trial.vector, rng))
    else:
        writer.finish(trial, outcome(trial.vector, rng))


SETTINGS = {
    "plain": {},
    "lr_adapt": {"lr_adapt": True},
    "known": {"known_candidates": [[0.1 * i, 1.0, 3.0] for i in range(8)]},
}


@pytest.mark.parametrize(
    ("name", "seed"), [("plain", 0), ("plain", 1), ("lr_adapt", 2), ("known", 3)]
)
def test_every_draw_is_that_of_a_full_replay(tmp_path, name, seed):
    settings = SETTINGS[name]
    rng, url = random.Random(seed), f"sqlite:///{tmp_path}/s.db"
    own = make(**settings)
    ledger = open_ledger(url, "s", own.space, create=True)
    assert ledger.storage.study is not None  # it is stored now, for another process to find
    other = open_ledger(url, "s", own.space, create=True)
    if seed:
        cov = ((1.0, 0.2, 0.0), (0.2, 2.0, 0.0), (0.0, 0.0, 1.0))
        ledger.remember("start", Start((0.5, 0.5, 1.5), 0.2, cov, mean_is_first=True))
    for number in range(36):
        step(own, ledger, other, rng)
        if number in (12, 25):  # a kill: the next process has nothing in memory
            own, ledger = make(**settings), open_ledger(url, "s", own.space, create=True)
            ledger.space = dict(own.space)
        history = ledger.history()
        reference = Ledger(ledger.storage, own.space).history()
        same_history(history, reference.trials)
        slot, new = own.next_slot(history), make(**settings)
        assert slot == new.next_slot(reference)
        if number % 3 == 0:
            reference = History(reference.trials, reference.start)
        for index in range(POPULATION):
            drawn = own.draw(history, Slot(slot.generation, index))
            assert drawn.tolist() == new.draw(reference, Slot(slot.generation, index)).tolist()
        kept = own._after(history, slot.generation).optimizer
        same_state(kept, new.replay(reference, slot.generation))


def test_the_only_writer_knows_what_is_stored(tmp_path):
    own, rng = make(), random.Random(5)
    url = f"sqlite:///{tmp_path}/s.db"
    ledger = open_ledger(url, "s", own.space, create=True)
    ledger.storage.claim()
    for _ in range(30):
        step(own, ledger, ledger, rng)
        assert ledger.history() is ledger.history()
        same_history(ledger.history(), open_ledger(url, "s", own.space).history().trials)
        ledger.remember("start", Start((rng.random(), 0.5, 1.5), 0.2, tuple(map(tuple, np.eye(3)))))
        assert ledger.history().start == open_ledger(url, "s", own.space).facts.start


def test_an_earlier_history_is_still_what_it_was(tmp_path):
    own = make()
    ledger = open_ledger(f"sqlite:///{tmp_path}/s.db", "s", own.space, create=True)
    kept = []
    for _ in range(20):
        history = ledger.history()
        slot = own.next_slot(history)
        kept.append((history, history.trials, slot, own.draw(history, slot).tolist()))
        trial = ledger.start("candidate", kept[-1][3], slot.generation, slot.index)
        ledger.finish(trial, outcome(trial.vector, None))
    for history, records, slot, drawn in kept:
        same_history(history, records)
        assert own.draw(history, slot).tolist() == drawn


@pytest.mark.parametrize("lr_adapt", [False, True])
def test_a_twin_goes_on_as_the_optimizer_does(lr_adapt):
    rng = np.random.default_rng(0)
    start = Distribution(np.ones(5), 0.3, np.diag([1.0, 2.0, 3.0, 1.0, 0.5]))
    optimizer = make_cma(start, np.array([[0.0, 2.0]] * 5), 8, lr_adapt=lr_adapt)
    assert isinstance(optimizer, CMA)
    for _ in range(12):
        other = twin(optimizer)
        same_state(optimizer, other)
        told = [(x, float(rng.normal())) for x in rng.uniform(0, 2, (8, 5))]
        drawing = twin(optimizer)
        drawing.ask()
        optimizer.tell([(x.copy(), value) for x, value in told])
        other.tell([(x.copy(), value) for x, value in told])
        same_state(optimizer, other)


@pytest.mark.parametrize("ranking", ["all", "subset", "race"])
def test_a_search_that_is_cut_draws_as_full_replays_do(tmp_path, monkeypatch, ranking):
    after, compared = CmaSampler._after, []

    def checked(self, history, generations):
        found = after(self, history, generations)
        whole = self.replay(History(history.trials, history.start), generations)
        same_state(found.optimizer, whole)
        compared.append(generations)
        return found

    monkeypatch.setattr(CmaSampler, "_after", checked)
    study = make_study(ranking=ranking, trials=17, uniform=())
    tmp_path.joinpath("cut").mkdir()
    tmp_path.joinpath("whole").mkdir()
    whole, _, _ = make_search(tmp_path / "whole", study)
    whole.run()
    for _ in range(40):
        Cutting.left = 23
        search, _, _ = make_search(tmp_path / "cut", study, Cutting())
        try:
            search.run()
            break
        except Cut:
            continue
    assert trials(search) == trials(whole)
    assert max(compared) == 2
