"""The cascade judge: its decisions by simulation, and whole searches with made-up judges."""

import json
import random
import zlib
from collections import Counter

import numpy as np
import pytest
from search_tools import (
    LAYERS,
    Cut,
    Cutting,
    QualityJudge,
    TaskEngine,
    make_search,
    make_study,
    trials,
)
from test_llm_judge_study import Steady

from evomerge.cli import main
from evomerge.errors import JudgePaused
from evomerge.genome.genome import make_genome
from evomerge.judging.cascade import (
    FEWEST,
    CascadeJudge,
    completed,
    composed,
    effects,
    settle,
    undecided,
)
from evomerge.judging.grade import Grade
from evomerge.judging.learned.fit import fit_file
from evomerge.searching.generation.racing import blocks
from evomerge.searching.history import History
from evomerge.searching.ledger import open_ledger
from evomerge.searching.samplers.make_sampler import make_sampler
from evomerge.searching.snapshot import load_snapshot


def residuals(seed, shared=0.5, candidates=12, tasks=48):
    """Residuals with a shift of each candidate and a share that all candidates have in common by
    task.
    """
    rng = np.random.default_rng(seed)
    common, own = rng.standard_normal((1, tasks)), rng.standard_normal((candidates, tasks))
    return (
        0.7 * (shared**0.5 * common + (1 - shared) ** 0.5 * own)
        + rng.normal(0, 0.2, (candidates, 1))
        + 0.4
    )


def generation(seed, spread, shared, **size):
    """(learned, llm) grades; the llm's means differ by `spread`, the tasks' difficulty by 0.9."""
    rng, residual = np.random.default_rng([seed, 1]), residuals(seed, shared, **size)
    c, t = residual.shape
    expensive = (
        3 + rng.normal(0, spread, (c, 1)) + rng.normal(0, 0.9, (1, t)) + rng.normal(0, 0.8, (c, t))
    )
    return expensive - residual, expensive


def settled(proxy, expensive, keep, error, seed=0):
    order = np.random.default_rng([seed, 2]).permutation(proxy.shape[1])
    looks = [[int(order[p]) for p in places] for places in blocks(proxy.shape[1], 4)]
    return settle(proxy, lambda asked, chosen: expensive[np.ix_(asked, chosen)], keep, error, looks)


def better(values, keep):
    return set(np.argsort(-values.mean(axis=1), kind="stable")[:keep].tolist())


def test_shifts_are_those_of_plain_least_squares():
    residual = residuals(0, candidates=5, tasks=9)
    residual[1:, 7] = residual[2:, 5] = residual[:, 8] = np.nan
    rows = [(i, t) for i in range(5) for t in range(9) if not np.isnan(residual[i, t])]
    design = np.zeros((len(rows), 14))
    for row, (i, t) in enumerate(rows):
        design[row, i] = design[row, 5 + t] = 1
    plain = np.linalg.lstsq(design, np.array([residual[i, t] for i, t in rows]), rcond=None)[0]
    level = plain[5:13].mean()
    shift, task = effects(residual)
    assert np.allclose(shift, plain[:5] + level)
    assert np.allclose(task[:8], plain[5:13] - level)
    assert task[8] == 0


def test_estimates_are_unbiased_whatever_the_learned_judge_is_worth():
    rng = np.random.default_rng(0)
    expensive = np.clip(3 + rng.normal(0, 0.5, (6, 1)) + rng.normal(0, 1, (6, 30)), 1, 5)
    for proxy in (
        np.full(expensive.shape, 1.0),
        6 - expensive,
        expensive + residuals(1, candidates=6, tasks=30),
    ):
        found = []
        for seed in range(1500):
            order = np.random.default_rng(seed).permutation(30)
            known = np.full(expensive.shape, np.nan)
            for i, n in enumerate((8, 8, 12, 12, 12, 20)):  # some are asked more than others
                known[i, order[:n]] = expensive[i, order[:n]]
            found.append(completed(proxy, known).mean(axis=1))
        error = np.std(found, axis=0) / 1500**0.5
        assert (np.abs(np.mean(found, axis=0) - expensive.mean(axis=1)) < 4 * error).all()


@pytest.mark.parametrize("shared", [0.0, 0.6], ids=["independent", "shared by task"])
@pytest.mark.parametrize("spread", [0.0, 0.3])
@pytest.mark.parametrize("tasks", [16, 48])
def test_better_halves_differ_no_more_often_than_said(shared, spread, tasks):
    error, wrong, asked, n = 0.1, 0, 0.0, 200
    for seed in range(n):
        proxy, expensive = generation(seed, spread, shared, tasks=tasks)
        known = settled(proxy, expensive, 6, error, seed)
        asked += np.mean(~np.isnan(known)) / n
        wrong += better(completed(proxy, known), 6) != better(expensive, 6)
    # two standard errors of the simulation
    assert wrong <= n * error + 2 * (n * error * (1 - error)) ** 0.5
    assert asked < 0.95
    if spread and tasks > 16:
        assert asked < 0.75


def test_what_a_task_does_to_all_candidates_costs_no_grades():
    shares = []
    for shared in (0.0, 0.9):
        found = [settled(*generation(seed, 0.3, shared), 6, 0.1, seed) for seed in range(60)]
        shares.append(np.mean([np.mean(~np.isnan(known)) for known in found]))
    assert shares[1] < 0.8 * shares[0]


def test_a_better_learned_judge_and_a_larger_error_save_more():
    proxy, expensive = generation(5, 0.2, 0.3)
    asked = [
        np.mean(~np.isnan(settled(expensive + x * (proxy - expensive), expensive, 6, e)))
        for x, e in ((0.02, 0.1), (1, 0.1), (1, 0.5))
    ]
    assert asked[0] < 0.3
    assert asked[0] < asked[2] < asked[1]


@pytest.mark.parametrize(
    ("candidates", "tasks", "keep"),
    [(12, 48, 6), (7, 20, 3), (3, 1, 1), (2, 2, 1), (4, 3, 2), (5, 5, 2), (1, 6, 1)],
)
def test_edges(candidates, tasks, keep):
    proxy, expensive = generation(3, 0.3, 0.5, candidates=candidates, tasks=tasks)
    nothing = np.full(proxy.shape, np.nan)
    assert undecided(proxy, nothing, keep, 0.1) == set(range(candidates)), (
        "no score rests on the learned judge alone"
    )
    assert undecided(proxy, expensive, keep, 0.1) == set(), "all are asked"
    known = settled(proxy, expensive, keep, 1e-9)
    assert ((~np.isnan(known)).sum(axis=1) >= min(FEWEST, tasks)).all()
    assert better(completed(proxy, known), keep) == better(expensive, keep)


def test_no_more_candidates_than_places_need_a_level_only():
    proxy, expensive = generation(3, 0.3, 0.5, candidates=4)
    assert (~np.isnan(settled(proxy, expensive, 6, 0.1))).sum(axis=1).tolist() == [4] * 4


def test_identical_candidates_are_asked_about_only_while_it_can_matter():
    proxy, expensive = generation(3, 0.3, 0.5)
    proxy[:], expensive[:] = proxy[0], expensive[0]
    known = settled(proxy, expensive, 6, 0.1)
    assert (~np.isnan(known)).sum() == 12 * 4, (
        "nothing distinguishes them, and what is left of the residuals is 0"
    )
    assert np.ptp(completed(proxy, known).mean(axis=1)) == pytest.approx(0)


def test_composed_grades_have_the_estimate_as_their_mean():
    proxy, expensive = generation(1, 0.3, 0.5)
    known = settled(proxy, expensive, 6, 0.1)
    estimate = completed(proxy, known)
    for i in range(12):
        learned = [Grade(float(v), None, "l") for v in proxy[i]]
        asked = [None if np.isnan(v) else Grade(float(v), None, "d") for v in known[i]]
        grades = composed(learned, asked, estimate[i])
        assert np.mean([g.value for g in grades]) == pytest.approx(estimate[i].mean(), abs=1e-6)
        assert all(g is a for g, a in zip(grades, asked, strict=True) if a is not None)
        alone = composed(learned, asked)
        difference = np.nanmean(known[i] - proxy[i])
        assert np.mean([g.value for g in alone]) == pytest.approx(
            np.mean(
                [
                    v if a is None else a.value - difference
                    for v, a in zip(proxy[i], asked, strict=True)
                ]
            )
            + difference
        )
        assert any("moved by" in g.reason for g in grades) or not np.isnan(known[i]).any()


# A whole search


def luck(text):
    return zlib.crc32(text.encode()) / 2**32 - 0.5


class Expensive(QualityJudge):
    """Waited for; its grades, once given, lie in `kept`, which outlives it. It stops after `left`
    new ones.
    """

    name, version, cost = "expensive", "1", 0.0

    def __init__(self, kept=None, left=None, stop=Cut):
        super().__init__()
        self.kept, self.left, self.stop, self.asked = (
            {} if kept is None else kept,
            left,
            stop,
            Counter(),
        )

    def submit(self, tasks, answers):
        return Waited(self, list(zip(tasks, answers, strict=True)))

    def close(self, drain=True):
        pass

    def given(self, task, answer):
        key = (str(task.task_id), answer.text)
        if key not in self.kept:
            if self.left is not None and self.left <= 0:
                raise self.stop("paused")
            self.left = None if self.left is None else self.left - 1
            self.asked[key] += 1
            grade = QualityJudge.grade(self, task, answer)
            self.kept[key] = Grade(
                float(np.clip(grade.value + 0.3 * luck(f"expensive {key}"), 1, 5)),
                None,
                "expensive",
            )
        return self.kept[key]


class Waited:
    def __init__(self, judge, pairs):
        self.judge, self.pairs = judge, pairs

    def done(self):
        return True

    def result(self):
        return [self.judge.given(*pair) for pair in self.pairs]


class Proxy(QualityJudge):
    """The quality with an error of its own on each answer, an error on each task, and too high in
    all.
    """

    name, version = "proxy", "1"

    def __init__(self, noise=0.5, bias=0.8):
        super().__init__()
        self.noise, self.bias = noise, bias

    def check(self, tasks):
        pass

    def grade(self, task, answer):
        value = super().grade(task, answer).value
        return Grade(
            value
            + 0.3
            + self.noise * luck(f"proxy {task.task_id} {answer.text}")
            + self.bias * luck(f"task {task.task_id}"),
            None,
            "proxy",
        )


def cascade_search(
    folder, name="cascade", expensive=None, engine=None, tasks=(48, 16, 0), proxy=None, **search
):
    expensive = expensive or Expensive()
    settings = {"trials": 24, "sigma": 0.5} | search
    found, engine, _ = make_search(
        folder,
        make_study(name, **settings),
        engine,
        CascadeJudge(proxy or Proxy(), expensive, 0.1),
        tasks,
    )
    return found, engine, expensive


def halves(search, judge):
    """For each generation: its better half as recorded, and by `judge`'s grades of all."""
    done = [r for r in search.ledger.records() if r.role == "candidate" and r.state == "complete"]
    every = {str(task.task_id): task for task in search.split.search}
    found = []
    for g in sorted({r.generation for r in done}):
        rows = sorted((r for r in done if r.generation == g), key=lambda r: r.index)
        whole = []
        for r in rows:
            search.evaluator.engine.apply(search.genome.decode(r.vector))
            tasks = [every[t] for t in r.grades]
            whole.append(
                np.mean(
                    [
                        judge.given(t, a).value
                        for t, a in zip(
                            tasks,
                            search.evaluator.engine.answer([t.input for t in tasks]),
                            strict=True,
                        )
                    ]
                )
            )
        keep = len(rows) // 2
        found.append(
            tuple(
                set(np.argsort(-np.array(v), kind="stable")[:keep].tolist())
                for v in ([r.score for r in rows], whole)
            )
        )
    return found


@pytest.mark.parametrize("population", [8, 7])
def test_a_search_has_the_better_halves_of_the_expensive_judge_for_fewer_grades(
    tmp_path, population
):
    search, _, expensive = cascade_search(tmp_path, population=population, trials=3 * population)
    search.run()
    saved = search.ledger.facts.cascade
    assert saved.graded == 3 * population * 48
    assert FEWEST / 48 <= saved.asked / saved.graded < 0.7
    assert sum(expensive.asked.values()) <= saved.asked + 16 * 48, (
        "references, the mean and the verdict come on top"
    )
    assert set(expensive.asked.values()) == {1}
    pairs = halves(search, Expensive())
    assert len(pairs) == 3
    assert sum(a != b for a, b in pairs) <= 1, "0.3 are expected at most"
    others = [r for r in search.ledger.records() if r.role != "candidate" and r.state == "complete"]
    assert all(1 <= g.grade <= 5 for r in others for g in r.grades.values())


def test_scores_stand_on_the_expensive_judge_s_level(tmp_path):
    """The proxy is 0.3 too high, which would lift candidates over the references."""
    search, engine, _ = cascade_search(tmp_path, trials=16)
    search.run()
    every, gaps = {str(task.task_id): task for task in search.split.search}, []
    for r in [r for r in search.ledger.records() if r.role == "candidate"]:
        engine.apply(search.genome.decode(r.vector))
        answers = engine.answer([every[t].input for t in r.grades])
        gaps.append(
            r.score
            - np.mean(
                [
                    Expensive().given(every[t], a).value
                    for t, a in zip(r.grades, answers, strict=True)
                ]
            )
        )
    assert abs(np.mean(gaps)) < 0.1


@pytest.mark.parametrize("stop", [Cut, JudgePaused])
@pytest.mark.parametrize("ranking", ["all", "subset"])
def test_a_run_that_ends_anywhere_goes_on_as_if_it_had_not(tmp_path, ranking, stop):
    settings = {"ranking": ranking, "trials": 12}
    if ranking == "subset":
        settings["subset"] = 24
    whole, engine, expensive = cascade_search(tmp_path, "whole", **settings)
    whole.run()
    rng, kept, asked, answered, paused = random.Random(0), {}, Counter(), [], 0
    for _ in range(400):
        search, cut_engine, judge = cascade_search(
            tmp_path, "cut", Expensive(kept, rng.randint(20, 120), stop), **settings
        )
        try:
            search.run()
            break
        except stop:
            paused += 1
        finally:
            asked += judge.asked
            answered += cut_engine.answered
    assert paused >= 2
    assert trials(search) == trials(whole)
    assert search.ledger.facts.verdict == whole.ledger.facts.verdict
    assert search.ledger.facts.cascade == whole.ledger.facts.cascade
    assert asked == expensive.asked
    assert sorted(answered) == sorted(engine.answered), "nothing is answered twice"


def test_a_run_that_is_cut_while_it_answers_goes_on_too(tmp_path):
    whole, _, expensive = cascade_search(tmp_path, "whole", trials=12)
    whole.run()
    rng, kept, asked = random.Random(1), {}, Counter()
    for _ in range(400):
        Cutting.left = rng.randint(5, 40)
        search, _, judge = cascade_search(tmp_path, "cut", Expensive(kept), Cutting(), trials=12)
        try:
            search.run()
            break
        except Cut:
            continue
        finally:
            asked += judge.asked
    assert trials(search) == trials(whole)
    assert asked == expensive.asked


@pytest.mark.parametrize("place", [0, 3])
def test_a_failing_candidate_is_replaced(tmp_path, place):
    study = make_study("cascade", trials=8, sigma=0.5)
    sampler = make_sampler(study, make_genome(study, LAYERS))
    doomed = sampler.draw(History(), sampler.slot(History(), 0, place))
    search, _, expensive = cascade_search(tmp_path, engine=TaskEngine(fails=[doomed]), trials=8)
    search.run()
    records = [r for r in search.ledger.records() if r.role == "candidate"]
    assert [(r.index, "always fails" in r.reason) for r in records if r.state == "failed"] == [
        (place, True)
    ]
    assert sorted(r.index for r in records if r.state == "complete") == list(range(8))
    assert all(len(r.grades) == 48 for r in records if r.state == "complete")
    assert set(expensive.asked.values()) == {1}


# Through the command line


@pytest.fixture(scope="module")
def learned(pair, tmp_path_factory):
    """A learned judge of the tiny pair's tasks, fitted on grades that follow the length."""
    folder, rng = tmp_path_factory.mktemp("learned"), random.Random(0)
    kana = "あいうえおかきくけこ"
    rows = [
        {"model": f"m{m}", "task_id": i, "output": "".join(rng.choices(kana, k=rng.randint(1, 20)))}
        for m in range(12)
        for i in range(40)
    ]
    grades = [
        {
            "model": r["model"],
            "task_id": r["task_id"],
            "judge": "length",
            "grade": 1 + len(r["output"]) // 5,
        }
        for r in rows
    ]
    for name, lines in (("answers", rows), ("grades", grades)):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines), encoding="utf-8"
        )
    fit_file(
        pair / "tasks.jsonl",
        folder / "answers.jsonl",
        folder / "grades.jsonl",
        ["length"],
        folder / "judge.npz",
    )
    return folder / "judge.npz"


def arguments(pair, folder, url, learned, *settings):
    where = ["--storage", f"sqlite:///{folder}/s.db", "--results", str(folder / "results")]
    keys = [
        "judge.kind=cascade",
        f"judge.file={learned}",
        f"judge.base_url={url}",
        "judge.model=m",
        "search.trials=8",
        "search.ranking=all",
    ]
    keys += ["split.validation=0", *settings]
    return [
        "search",
        str(pair / "study.yaml"),
        *where,
        *(x for key in keys for x in ("--set", key)),
    ]


def test_a_study_by_the_command_line_reports_what_it_saved(pair, learned, tmp_path, capsys):
    whole, server = Steady(), Steady()
    (tmp_path / "whole").mkdir()
    with whole.running() as url:
        assert main(arguments(pair, tmp_path / "whole", url, learned)) == 0
    with server.running() as url:
        assert main(arguments(pair, tmp_path, url, learned, "judge.max_requests=60")) == 3
        assert (
            capsys.readouterr()
            .err.strip()
            .splitlines()[-1]
            .startswith("evomerge: paused: the judge's budget of 60 requests is spent")
        )
        assert main(arguments(pair, tmp_path, url, learned)) == 0
    assert server.given == whole.given, "a pause asks nothing twice and nothing else"
    assert set(server.given.values()) == {1}
    finished, other = (
        load_snapshot(f"sqlite:///{f}/s.db", "tiny") for f in (tmp_path, tmp_path / "whole")
    )
    assert trials(finished) == trials(other)
    assert finished.verdict == other.verdict
    saved = open_ledger(f"sqlite:///{tmp_path}/s.db", "tiny").facts.cascade
    assert saved.graded == 8 * 20
    assert 8 * FEWEST <= saved.asked < saved.graded
    page = next((tmp_path / "results").rglob("report.html")).read_text(encoding="utf-8")
    assert "cascade:llm:m" in page
    assert f"{saved.asked:,}" in page
    assert f"{saved.graded:,}" in page


def test_no_study_no_cascade(pair, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"task_id": 0, "output": "あ"}\n', encoding="utf-8")
    code = main(
        [
            "judge",
            "grade",
            "--tasks",
            str(pair / "tasks.jsonl"),
            "--answers",
            str(tmp_path / "a.jsonl"),
            "--judge",
            "cascade",
        ]
    )
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1
    assert "cascade" in lines[0]
