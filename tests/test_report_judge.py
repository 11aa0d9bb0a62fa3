"""The report's section on the judge: its figures against plain formulas, and nothing unescaped."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
from scipy.stats import spearmanr

from evomerge.answering.engine import Answer
from evomerge.judging.grade import Grade
from evomerge.judging.rules.judge import RulesJudge
from evomerge.reporting.judge_section import (
    MeanFigure,
    compare_judges,
    grade_bars,
    judge_section,
    mean_figure,
    saved_grades,
)
from evomerge.reporting.report import write_report
from evomerge.searching.records.judge_report import JudgeReport
from evomerge.searching.records.study_facts import CascadeSavings, stored
from evomerge.searching.report_judge import REASON, SHOWN, TEXT, report_judge
from evomerge.tasks import Task

EVIL = "<script>alert('x')</script>\"&<b>"
NAMES = ("winner", "base", "instruct", "uniform")
TASKS = [
    Task(
        i,
        f"{i}に{i}を足すと？理由も述べてください。",
        f"{2 * i}です。{i}+{i}を計算したからです。",
        "",
    )
    for i in range(20)
]


@dataclass(frozen=True)
class Did:
    answers: list[Answer]
    grades: list[Grade]


def examined(seed: int = 0, levels: int = 9) -> dict[str, Did]:
    rng = random.Random(seed)

    def text(i: int) -> str:
        return rng.choice(
            [
                f"{2 * i}です。",
                f"{i}だと思います。足し算をしたからです。",
                "わかりません。",
                f"{2 * i}になります。" * 3,
            ]
        )

    return {
        name: Did(
            [Answer(text(i), False, 5) for i in range(len(TASKS))],
            [
                Grade(1 + 4 * rng.randrange(levels) / (levels - 1), None, f"{name} {i}")
                for i in range(len(TASKS))
            ],
        )
        for name in NAMES
    }


class Texts(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.parts).split())


def page(tmp_path: Path, judge: JudgeReport | None, cascade: CascadeSavings | None = None) -> str:
    write_report(
        tmp_path / "r.html",
        study="s",
        metric="grade",
        trials=[],
        verdict=None,
        best=None,
        slices=[],
        judge=judge,
        cascade=cascade,
    )
    return (tmp_path / "r.html").read_text(encoding="utf-8")


def test_facts_are_json_and_hold_both_judges_grades() -> None:
    done = examined()
    facts = report_judge(
        "llm:big", "abc", TASKS, done, {"within_task": {"value": 0.5, "low": 0.4, "high": 0.6}}
    )
    assert JudgeReport.from_dict(json.loads(json.dumps(stored(facts)))) == facts
    assert (facts.name, facts.version, facts.n) == ("llm:big", "abc", 20)
    rules = RulesJudge()
    for name in NAMES:
        assert facts.grades[name] == [g.value for g in done[name].grades]
        assert facts.rules[name] == [
            rules.grade(t, a).value for t, a in zip(TASKS, done[name].answers, strict=True)
        ]


def test_agreement_is_scipys_spearman_and_a_plain_difference() -> None:
    facts = report_judge("llm:big", "abc", TASKS, examined())
    found = compare_judges(facts.grades, facts.rules)
    rhos, differences = [], []
    for t in range(len(TASKS)):
        a, b = [facts.grades[n][t] for n in NAMES], [facts.rules[n][t] for n in NAMES]
        differences.append(sum(x - y for x, y in zip(a, b, strict=True)) / 4)
        if len(set(a)) > 1 and len(set(b)) > 1:
            rhos.append(float(spearmanr(a, b).statistic))
    assert 10 < len(rhos) <= 20
    for got, values in ((found.spearman, rhos), (found.difference, differences)):
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        error = spread / math.sqrt(len(values))
        assert got == MeanFigure(pytest.approx(mean), pytest.approx(error), len(values))
    for order, grades in zip(found.orders, (facts.grades, facts.rules), strict=True):
        means = [sum(grades[n]) for n in order]
        assert means == sorted(means, reverse=True)


def test_two_candidates_have_no_rank_correlation_and_the_page_says_so(tmp_path: Path) -> None:
    done = {name: did for name, did in examined().items() if name in ("winner", "base")}
    facts = report_judge("llm:big", "abc", TASKS, done)
    compared = compare_judges(facts.grades, facts.rules)
    assert compared.spearman == MeanFigure(None, None, 0)
    assert "over 2 models– ± –0 tasks" in Texts(page(tmp_path, facts)).text


def test_shares_of_the_nearest_grade() -> None:
    found = grade_bars([1.0, 1.49, 1.5, 3.2, 4.5, 5.0, 4.4999, 2.5])
    assert [bar.count for bar in found] == [2, 1, 2, 1, 2]
    assert sum(bar.share for bar in found) == pytest.approx(1)
    assert mean_figure([2.0]) == MeanFigure(2.0, None, 1)


def test_the_largest_disagreements_first_and_one_for_each_task() -> None:
    done = examined()
    facts = report_judge("llm:big", "abc", TASKS, done)
    gap = lambda t, n: abs(facts.grades[n][t] - facts.rules[n][t])  # noqa: E731
    expected = sorted((max(gap(t, n) for n in NAMES) for t in range(len(TASKS))), reverse=True)[
        :SHOWN
    ]
    shown = [(pair.task_id, pair.who, [side.grade for side in pair.sides]) for pair in facts.pairs]
    assert [abs(a - b) for _, _, (a, b) in shown] == pytest.approx(expected)
    assert len({task for task, _, _ in shown}) == SHOWN
    for task, who, grades in shown:
        assert grades == [facts.grades[who][task], facts.rules[who][task]]
    assert facts.pairs[0].text == done[shown[0][1]].answers[shown[0][0]].text


def test_rules_compare_the_winner_with_the_best_parent() -> None:
    done = examined(3)
    facts = report_judge("rules", "2", TASKS, done)
    means = {n: sum(facts.grades[n]) for n in ("base", "instruct")}
    best = max(means, key=lambda n: means[n])
    assert facts.rules is None
    assert {tuple(side.name for side in pair.sides) for pair in facts.pairs} == {("winner", best)}
    gaps = [abs(a.grade - b.grade) for a, b in (pair.sides for pair in facts.pairs)]
    everything = sorted(
        (abs(a - b) for a, b in zip(facts.grades["winner"], facts.grades[best], strict=True)),
        reverse=True,
    )
    assert gaps == pytest.approx(everything[:SHOWN])
    same = {"winner": done["winner"], "sibling:a": done["winner"], "uniform": done["base"]}
    # no parent differs; uniform is none
    assert report_judge("rules", "2", TASKS, same).pairs == ()


def test_the_page_shows_the_figures(tmp_path: Path) -> None:
    held_out = {
        "folds": 5,
        "by_family": True,
        "within_task": {"value": 0.612, "low": 0.58, "high": 0.64},
        "model_level": {"value": None, "low": None, "high": None},
        "pairs": {"0.15-0.3": {"value": 0.875, "low": 0.8, "high": 0.9}},
    }
    facts = report_judge("cascade", "1f2e", TASKS, examined(), held_out)
    saved = CascadeSavings(graded=2400, asked=312)
    text = Texts(page(tmp_path, facts, saved)).text
    section = judge_section(facts, saved)
    assert section is not None
    winner, agreed = section.rows[0], section.agreement
    assert agreed is not None
    assert winner.rules is not None
    for shown in (
        "Graded by cascade, version 1f2e.",
        f"{winner.mean:.3f} ± {winner.stderr:.3f}",
        f"{winner.rules.mean:.3f} ± {winner.rules.stderr:.3f}",
        f"{agreed.spearman.mean:.3f} ± {agreed.spearman.stderr:.3f}".replace("-", "−"),
        f"{agreed.difference.mean:+.3f} ± {agreed.difference.stderr:.3f}".replace("-", "−"),
        "0.612 [0.580, 0.640]",
        "– [–, –]",
        "0.15 to 0.3 apart ordered right0.875 [0.800, 0.900]",
        "Of 2400 answers, the expensive judge graded 312: 87.0 % of its grades were saved.",
        "Where the two judges differ most",
    ):
        assert shown in text, shown
    assert page(tmp_path, facts).count("<rect") == 5 * len(NAMES)


def test_the_page_of_a_study_graded_by_rules_claims_no_agreement(tmp_path: Path) -> None:
    text = Texts(page(tmp_path, report_judge("rules", "2", TASKS, examined()))).text
    assert "Winner and best parent: the largest differences" in text
    assert "nothing to compare it with here" in text
    assert "Spearman" not in text
    assert "Rules judge ±" not in text


def test_no_judge_no_section(tmp_path: Path) -> None:
    assert "<h2>Judge</h2>" not in page(tmp_path, None)
    assert saved_grades(CascadeSavings(graded=0, asked=0)) is None


@pytest.mark.parametrize("judge", ["llm:" + EVIL, "rules"])
def test_texts_of_models_are_escaped_and_cut(tmp_path: Path, judge: str) -> None:
    long = EVIL + "長" * 5000
    did = lambda value: Did([Answer(long, True, 1)], [Grade(value, None, long)])  # noqa: E731
    facts = report_judge(
        judge,
        EVIL,
        [Task(EVIL, long, long, "")],
        {"winner": did(5.0), "base": did(4.0), f"sibling:{EVIL}": did(1.0)},
    )
    written = page(tmp_path, facts)
    parsed = Texts(written)
    assert "<script" not in written
    assert parsed.tags.isdisjoint({"script", "b", "img"})
    # version, id, input, reference, answer, reason: each shown as written
    assert parsed.text.count(EVIL) >= 6
    assert max(len(part) for part in parsed.parts[parsed.parts.index("Judge") :]) <= TEXT + 2
    (pair,) = facts.pairs
    assert max(len(side.reason) for side in pair.sides) <= REASON + 2


def test_bars_have_one_scale(tmp_path: Path) -> None:
    did = lambda *values: Did([Answer("1", False, 1)] * 4, [Grade(v, None, "") for v in values])  # noqa: E731
    facts = report_judge(
        "rules",
        "2",
        TASKS[:4],
        {"winner": did(5.0, 5.0, 4.0, 1.0), "base": did(1.0, 2.0, 3.0, 4.0)},
    )
    heights = [
        float(h)
        for h in re.findall(r'<rect class="bar"[^>]*height="([\d.]+)"', page(tmp_path, facts))
    ]
    assert heights == [12, 0, 0, 12, 24, 12, 12, 12, 12, 0]
