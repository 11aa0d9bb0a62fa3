"""A winner that is known to be worse than a parent or a uniform weight is not exported."""

import json

import numpy as np
import pytest
import yaml
from search_tools import BEST, TaskEngine, make_search, make_study
from test_verdict import record

from evomerge import load_study
from evomerge.cli import main
from evomerge.cli.showing import print_verdict
from evomerge.recipe import Recipe
from evomerge.reporting.sentences import conclusion
from evomerge.searching.choosing import Finalists, choose_winner, incumbent
from evomerge.searching.records.verdict_record import HeldOutScore, PairedDifference, Verdict


class Landscape(TaskEngine):
    """The best weights are `best` instead of BEST; None: nothing makes a difference."""

    def __init__(self, best, noise=0.3):
        super().__init__(noise)
        self.best = best

    def answer(self, prompts, settings=None, on_answer=None, deadline=None):
        whole = self.vector
        self.vector = BEST if self.best is None else whole - np.array(self.best) + BEST
        answers = super().answer(prompts, settings, on_answer, deadline)
        self.vector = whole
        return answers


def grades(values):
    return {str(i): float(v) for i, v in enumerate(values)}


def test_a_reference_stands_where_it_leads_the_mean_by_a_standard_error():
    rng = np.random.default_rng(0)
    mean = rng.normal(3, 1, 50)
    ahead = rng.normal(0, 1, 50)
    ahead = (ahead - ahead.mean()) / ahead.std(ddof=1)  # error 1 / sqrt(50)
    error = 1 / np.sqrt(50)
    for lead, stands in ((1.1, "base"), (0.9, "mean"), (-1.0, "mean")):
        base = grades(mean + ahead + lead * error)
        assert incumbent(grades(mean), {"base": base}) == stands
    assert incumbent(grades(mean), {"base": grades(mean)}) == "base", "it does not beat its equal"
    assert incumbent(None, {"a": grades([1, 2]), "b": grades([2, 2])}) == "b"
    assert incumbent(grades([1]), {"a": grades([5])}) == "mean", "one task tells nothing"
    assert incumbent(grades(mean), {}) == "mean"


def test_search_and_validation_tasks_count_for_the_mean_and_its_references():
    mean, base = record(9, "mean", [3, 3, 4, 3]), record(0, "parent", [4, 4, 4, 4])
    found = Finalists(mean, (record(5, "candidate", [5, 5, 5, 5]),), (base,))
    better = {f"v{i}": 5.0 for i in range(20)}
    worse = dict.fromkeys(better, 1.0)
    told = {9: better, 0: worse, 5: worse}
    assert choose_winner(found, "grade", told).number == 9
    assert choose_winner(found, "grade", {9: worse, 0: better, 5: worse}).number == 0
    assert choose_winner(found, "grade", {9: worse, 0: worse, 5: better}).number == 5
    assert choose_winner(Finalists(mean, found.trials), "grade", told).number == 9


def test_a_lucky_trial_does_not_replace_a_reference():
    rng, replaced = np.random.default_rng(1), 0
    for _ in range(200):
        base = record(0, "parent", rng.normal(3, 1, 16))
        trials = [record(i, "candidate", rng.normal(3, 1, 16)) for i in range(1, 9)]
        trials.sort(key=lambda trial: -trial.score)
        found = Finalists(None, tuple(trials[:3]), (base,))
        replaced += choose_winner(found, "grade").number != 0
    assert replaced <= 0.04 * 200


@pytest.mark.parametrize("validation", [0, 8])
@pytest.mark.parametrize(("best", "name"), [(0.0, "base"), (1.0, "sibling"), (0.5, "uniform 0.5")])
def test_a_reference_that_nothing_beats_wins(tmp_path, best, name, validation):
    search = make_search(
        tmp_path,
        make_study(validation=0.2 if validation else 0.0, start=1.8, sigma=0.1),
        Landscape([best] * 4),
        tasks=(24, 16, validation),
    )[0]
    verdict = search.run()
    history, facts = search.ledger.history(), search.ledger.facts
    winner = history.trial(facts.compared["winner"])
    assert (winner.role in ("parent", "uniform"), winner.vector) == (True, (best,) * 4)
    assert verdict.unbeaten == name
    assert verdict.leads["found"].low > 0, "the search's own merge is compared too"
    assert facts.compared["found"] == history.mean.number
    assert name.partition(" ")[0] not in verdict.leads, "not compared with itself"
    assert f" merge was found that beats {name.replace('uniform', 'the uniform weight')}" in (
        conclusion(verdict)
    )
    if validation:
        assert {winner.number, history.mean.number} <= facts.validation.means.keys()
    again = make_search(tmp_path, search.study, Landscape([best] * 4), tasks=(24, 16, validation))[
        0
    ]
    assert again.run() == verdict
    assert again.ledger.facts.look == 1


def test_where_nothing_can_be_learned_no_merge_is_claimed(tmp_path):
    search = make_search(tmp_path, make_study(trials=16), Landscape(None, noise=0))[0]
    assert search.run().unbeaten == "base"


def test_a_search_that_finds_something_wins(tmp_path):
    study = make_study(trials=80, validation=0.2)
    search = make_search(tmp_path, study, TaskEngine(), tasks=(24, 16, 8))[0]
    verdict = search.run()
    assert verdict.unbeaten is None
    assert "found" not in verdict.candidates
    assert verdict.leads["uniform"].low > 0
    assert "the winner beats base, sibling and the best uniform weight" in conclusion(verdict)


def test_a_study_that_began_before_chooses_as_it_did(tmp_path):
    study = make_study(start=1.8, sigma=0.1, trials=16)
    search = make_search(tmp_path, study, Landscape([0.5] * 4), references_win=False)[0]
    verdict = search.run()
    winner = search.ledger.history().trial(search.ledger.facts.compared["winner"])
    assert winner.role in ("candidate", "mean")
    assert verdict.unbeaten is None
    assert verdict.leads["uniform"].high < 0, "it is known to be worse, and has won nevertheless"
    resumed = make_search(tmp_path, study, Landscape([0.5] * 4))[0]
    assert not resumed.ledger.facts.references_win
    assert resumed.run() == verdict


@pytest.mark.parametrize("best", [0.0, 1.0, 0.5])
def test_it_is_said_wherever_the_winner_is_shown(tmp_path, capsys, best):
    study = make_study(start=1.8, sigma=0.1, trials=16)
    make_search(tmp_path, study, Landscape([best] * 4))[0].run()
    found = load_study("fake", storage=f"sqlite:///{tmp_path}/fake.db")
    said = "merge was found that beats"
    print_verdict(found)
    assert said in capsys.readouterr().out
    text = found.recipe_yaml
    assert said in text.splitlines()[0]
    assert text.startswith("# ")
    recipe = Recipe.from_dict(yaml.safe_load(text))
    assert recipe.digest() == found.recipe.digest(), "the comment changes nothing"
    weights = {s["sources"][0]["parameters"]["weight"] for s in recipe.to_dict()["slices"]}
    assert weights == {best}
    url = f"sqlite:///{tmp_path}/fake.db"
    assert main(["export", "fake", "--storage", url]) == 0
    out, err = capsys.readouterr()
    assert (out, said in err) == (text, True)
    assert main(["show", "fake", "--storage", url]) == 0
    assert said in capsys.readouterr().out
    assert found.to_json()["unbeaten"] == found.unbeaten == found.verdict.unbeaten
    results = {path.name: path for path in found.write_results(tmp_path / "results")}
    assert said in results["best.yaml"].read_text(encoding="utf-8")
    assert said in results["report.html"].read_text(encoding="utf-8")
    card = results["README.md"].read_text(encoding="utf-8")
    assert said in card.partition("## Verdict")[2]
    assert ("This is a merge" in card) == (best == 0.5), "a parent is not called a merge"
    written = json.loads(results["verdict.json"].read_text(encoding="utf-8"))
    assert written["unbeaten"] == found.unbeaten
    assert Verdict.from_dict(written) == found.verdict


def test_a_verdict_in_one_sentence():
    score = HeldOutScore(0.5, 0.1, 0.0)
    pairs = {"winner-base": (0.1, 0.3), "winner-a": (-0.1, 0.2), "winner-uniform": (-0.3, -0.1)}
    paired = {key: PairedDifference(0.0, *ends) for key, ends in pairs.items()}
    verdict = Verdict("grade", 9, {"winner": score}, paired)
    assert conclusion(verdict) == (
        "On the held-out tasks the winner beats base; it is not shown to differ from a; it is "
        "worse than the best uniform weight."
    )


def test_older_verdicts_are_read():
    data = Verdict("grade", 1, {}, {}).to_dict()
    del data["unbeaten"]
    assert Verdict.from_dict(data).unbeaten is None
