"""The number of CPU threads: chosen by a trial, kept with the study, free to change."""

import json
from types import SimpleNamespace

import pytest
import torch

from evomerge.answering.cache import cache_scope
from evomerge.answering.hf import threads
from evomerge.answering.hf.threads import LARGEST, fastest_threads
from evomerge.cli import main
from evomerge.searching.snapshot import load_snapshot
from evomerge.study import STOPPING_KEYS, Study, changed_keys

# a valid value that differs from the default, for each key that may change
CHANGED = {
    "engine.residency": "disk",
    "engine.threads": 3,
    "search.trials": 7,
    "search.time_limit": "5h",
    "search.max_cost": 2.0,
    "search.hourly_price": 3.0,
    "search.min_sigma": 0.1,
    "search.patience": 4,
    "judge.base_url": "http://127.0.0.1:1/v1",
    "judge.concurrency": 3,
    "judge.requests_per_minute": 9.0,
    "judge.retries": 2,
    "judge.back_off": 0.5,
    "judge.timeout": 9.0,
    "judge.asks": 5,
    "judge.max_requests": 9,
    "judge.max_tokens": 9,
    "judge.max_cost": 3.0,
    "judge.input_price": 1.0,
    "judge.output_price": 1.0,
}


@pytest.fixture(autouse=True)
def own_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Timed:
    """A model that takes as long as `seconds` says for each number of threads."""

    def __init__(self, seconds, parameters=1000):
        self.seconds, self.size, self.tried, self.clock = seconds, parameters, [], 0.0

    def parameters(self):
        device = torch.device("cpu")
        return [SimpleNamespace(device=device, numel=lambda: self.size)]

    def __call__(self, input_ids, use_cache):
        assert torch.is_inference_mode_enabled()
        count = torch.get_num_threads()
        self.tried.append(count)
        self.clock += self.seconds[count]


@pytest.mark.parametrize(
    ("seconds", "best", "tried"),
    [
        ({1: 0.001, 2: 0.02}, 1, [1, 2]),  # a busy machine: four threads are not even tried
        ({1: 0.016, 2: 0.008, 4: 0.004, 6: 0.002}, 6, [1, 2, 4, 6]),
        ({1: 0.008, 2: 0.002, 4: 0.006}, 2, [1, 2, 4]),
    ],
)
def test_the_fastest_count_is_chosen_in_half_a_second(monkeypatch, seconds, best, tried):
    torch.set_num_threads(6)
    model = Timed(seconds)
    monkeypatch.setattr(threads, "time", SimpleNamespace(perf_counter=lambda: model.clock))
    assert fastest_threads(model) == best
    assert model.clock < 1.3 * threads.SECONDS
    assert list(dict.fromkeys(model.tried)) == tried
    assert torch.get_num_threads() == 6


def test_where_there_is_nothing_to_choose():
    torch.set_num_threads(1)
    assert fastest_threads(Timed({})) is None
    torch.set_num_threads(2)
    assert fastest_threads(Timed({}, LARGEST)) is None


def study_file(**changed):
    plain = {
        "genome": {"models": ["a"], "base_model": "b"},
        "tasks": [{"file": "t.jsonl"}],
        "study": "s",
        "judge": {"kind": "llm", "input_price": 2.0, "output_price": 2.0},
        "search": {"hourly_price": 1.0},
    }
    for key, value in changed.items():
        section, _, name = key.partition(".")
        plain.setdefault(section, {})[name] = value
    return Study.from_dict(plain).to_dict()


@pytest.mark.parametrize("key", STOPPING_KEYS)
def test_every_key_that_changes_no_answer_may_change(key):
    before, after = study_file(), study_file(**{key: CHANGED[key]})
    assert before != after
    assert changed_keys(before, after) == []
    assert changed_keys(after, before) == []


@pytest.mark.parametrize(("key", "value"), [("engine.batch_size", 2), ("search.sigma", 0.1)])
def test_other_keys_may_not(key, value):
    assert changed_keys(study_file(), study_file(**{key: value})) == [key]


def test_answers_are_found_under_the_threads_that_the_study_began_with():
    before = Study.from_dict(study_file())
    after = before.replace(engine=before.engine.replace(threads=2))
    scope = cache_scope(before, {"a": "1"})
    assert cache_scope(after, {"a": "1"}) != scope
    assert cache_scope(after, {"a": "1"}, {"threads": None}) == scope


@pytest.fixture
def run(pair, tmp_path, capsys):
    """run(*settings) -> (shown, stderr) after a search of the tiny pair."""
    where = ["--storage", f"sqlite:///{tmp_path}/s.db"]

    def called(*settings):
        argv = ["search", str(pair / "study.yaml"), *where, "--results", str(tmp_path / "r")]
        for setting in ("generation.max_new_tokens=4", "search.ranking=all", *settings):
            argv += ["--set", setting]
        capsys.readouterr()
        assert main(argv) == 0
        err = capsys.readouterr().err
        assert main(["show", "tiny", "--json", *where]) == 0
        return json.loads(capsys.readouterr().out), err

    called.url = f"sqlite:///{tmp_path}/s.db"
    called.answers = tmp_path / "tiny.answers.sqlite"
    return called


def test_the_choice_is_kept_with_the_study_and_used_again(run, monkeypatch, tmp_path):
    torch.set_num_threads(2)
    shown, err = run("search.trials=2")
    facts = load_snapshot(run.url, "tiny").ledger.facts
    assert facts.threads in (1, 2)
    assert f"{facts.threads} of 2 CPU threads are the fastest" in err
    other = 3 - facts.threads
    torch.set_num_threads(other)
    monkeypatch.setattr(threads, "fastest_threads", lambda model: pytest.fail("chosen again"))
    again, err = run("search.trials=3")
    assert torch.get_num_threads() == facts.threads
    assert again["trials"][: len(shown["trials"]) - 1] == shown["trials"][:-1]
    assert "note: engine.threads" not in err


def test_a_study_goes_on_with_other_threads_and_its_answers(run):
    shown, err = run("search.trials=2", "engine.threads=1")
    size = run.answers.stat().st_size
    again, err = run("search.trials=2", "engine.threads=2", "engine.residency=disk")
    assert "note: engine.threads was 1 and is now 2" in err
    assert again == shown
    facts = load_snapshot(run.url, "tiny").ledger.facts
    assert facts.first_engine == {"threads": 1}
    assert facts.study.engine.threads == 2
    assert run.answers.stat().st_size == size
    _, err = run("search.trials=2")
    assert "was 2 and is now left to torch" in err
    assert load_snapshot(run.url, "tiny").ledger.facts.first_engine == {"threads": 1}
