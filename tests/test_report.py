"""The report page and the table of trials: true figures, nothing loaded, nothing unescaped."""

from __future__ import annotations

import csv
import itertools
import random
import re
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from evomerge.reporting.charts import PLOT, progress_chart
from evomerge.reporting.report import write_report
from evomerge.reporting.sentences import headline, remarks
from evomerge.reporting.trial_table import seconds_by_phase, write_trials_csv
from evomerge.searching.final_test import make_verdict
from evomerge.searching.records.trial_record import TaskGrade
from evomerge.searching.records.verdict_record import (
    HeldOutScore,
    PairedDifference,
    Sample,
    SampleAnswer,
    Verdict,
)

SLICES = ["0–1", "2–3", "4–5", "6–7"]
EVIL = "<script>alert('x')</script><img src=https://example.org/x.png onerror=alert(1)>"
VERDICT = Verdict.from_dict(
    {
        "metric": "correct",
        "n": 70,
        "candidates": {
            "winner": {"mean": 0.8143, "stderr": 0.0468, "truncated": 0.0143},
            "base": {"mean": 0.2571, "stderr": 0.0526, "truncated": 0.5},
            "instruct": {"mean": 0.7286, "stderr": 0.0536, "truncated": 0.0},
            "uniform": {"mean": 0.7714, "stderr": 0.0505, "truncated": 0.0},
        },
        "paired": {
            "winner-base": {"diff": 0.5572, "low": 0.4286, "high": 0.6714},
            "winner-instruct": {"diff": 0.0857, "low": 0.0143, "high": 0.1571},
            "winner-uniform": {"diff": 0.0429, "low": -0.0286, "high": 0.1143},
        },
    }
)
SAMPLES = [
    Sample(7, "並:312=", "123", {n: SampleAnswer(f"{n}: 答え", 2.5) for n in VERDICT.candidates}),
    Sample(EVIL, EVIL, EVIL, {"winner": SampleAnswer(EVIL, 1.0), EVIL: SampleAnswer("", 5.0)}),
]


@dataclass(frozen=True)
class Trial:
    number: int
    role: str
    vector: tuple[float, ...]
    score: float | None = None
    stderr: float | None = None
    state: str = "complete"
    generation: int | None = None
    index: int | None = None
    n: int = 70
    truncated: float = 0.0
    seconds: dict[str, float] = field(
        default_factory=lambda: {"merge": 0.25, "answer": 15.5, "judge": 0.125}
    )
    reason: str | None = None
    grades: dict[str, dict[str, Any]] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    tokens: int | None = None
    thought_tokens: int | None = None
    mean_thought_tokens: float | None = None
    mean_answer_tokens: float | None = None

    @property
    def place(self) -> tuple[int | None, int | None]:
        if self.generation is None or self.index is None:
            return self.generation, None
        return self.generation + 1, self.index + 1


def trials() -> list[Trial]:
    rng = random.Random(0)
    out = [
        Trial(0, "parent", (0.0,) * 4, 0.264, 0.053),
        Trial(1, "parent", (1.0,) * 4, 0.721, 0.054),
    ]
    for i in range(24):
        weights = tuple(round(rng.gauss(0.9, 0.3), 4) for _ in SLICES)
        out.append(
            Trial(
                2 + i,
                "candidate",
                weights,
                min(0.85, rng.gauss(0.68 + 0.005 * i, 0.04)),
                0.05,
                "complete",
                i // 8,
                i % 8,
            )
        )
    out.append(
        Trial(
            26,
            "candidate",
            (1.0, 0.5, 0.2, 0.1),
            None,
            None,
            "failed",
            3,
            0,
            0,
            0.0,
            {},
            "the model could not answer",
        )
    )
    out += [
        Trial(27 + i, "uniform", (w,) * 4, s, 0.05, truncated=0.1 * i)
        for i, (w, s) in enumerate([(0.25, 0.286), (0.75, 0.725)])
    ]
    return [*out, Trial(29, "mean", (0.9321, 1.6512, -0.1234, 0.4567), 0.8, 0.048, generation=2)]


LABELS = {0: "base", 1: "instruct", 27: "uniform 0.25", 28: "uniform 0.75"}


def make_page(path: Path, **changes: Any) -> str:
    study_file = f"study: demo\n# {EVIL}\n"
    settings = {
        "verdict": VERDICT,
        "best": 29,
        "samples": SAMPLES,
        "trials": trials(),
        "labels": LABELS,
        "study_file": study_file,
    }
    assert (
        write_report(path, study="demo", metric="correct", slices=SLICES, **settings | changes)
        == path
    )
    return path.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Every element with its attributes, and the text outside <style>."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] != "style":
            self.texts.append(data)


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    page = make_page(tmp_path / "report.html")
    elements = Elements(page).found
    assert {tag for tag, _ in elements}.isdisjoint(
        {"script", "img", "link", "iframe", "object", "embed", "base", "image", "use"}
    )
    names = {name for _, attributes in elements for name in attributes}
    assert names.isdisjoint({"src", "href", "xlink:href", "action"})
    assert not [name for name in names if name.startswith("on")]
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_texts_from_models_and_files_are_escaped(tmp_path: Path) -> None:
    page = make_page(tmp_path / "report.html")
    assert "<script" not in page
    # id, input, reference, answer, a candidate's name, the study file: each shown as written
    assert "".join(Elements(page).texts).count(EVIL) == 6


def test_the_figures_shown_are_those_given(tmp_path: Path) -> None:
    text = " ".join("".join(Elements(make_page(tmp_path / "report.html")).texts).split())
    assert "The winner answers a share of 0.814 ± 0.047 of the 70 held-out tasks correctly." in text
    assert "Better than base: +0.557, 95 % interval +0.429 to +0.671, n = 70." in text
    assert (
        "No difference from the best uniform weight is shown: +0.043, 95 % interval −0.029 to "
        "+0.114, n = 70, which includes zero." in text
    )
    for shown in (
        "0.257 ± 0.053",
        "0.729 ± 0.054",
        "+0.086 [+0.014, +0.157]",
        "50.0 %",
        "−0.123",
        "1.651",
        "15.50",
        "the model could not answer",
    ):
        assert shown in text, shown


@pytest.mark.parametrize(
    ("low", "high", "kind"),
    [
        (0.1, 0.3, "better"),
        (-0.3, -0.1, "worse"),
        (-0.1, 0.3, "open"),
        (0.0, 0.3, "open"),
        (-0.3, 0.0, "open"),
    ],
)
def test_an_interval_that_includes_zero_shows_no_difference(
    low: float, high: float, kind: str
) -> None:
    pair = PairedDifference((low + high) / 2, low, high)
    (remark,) = remarks(Verdict("grade", 9, {}, {"winner-base": pair}))
    assert remark.kind == kind
    assert ("includes zero" in remark.text) == (kind == "open")


def test_a_single_value_is_shown_without_a_standard_error(tmp_path: Path) -> None:
    winner = HeldOutScore(0.5, None, 0.0)
    verdict = Verdict("grade", 1, {"winner": winner}, {})
    assert "0.500\u00a0(n\u00a0=\u00a01)" in headline(verdict, [], None)
    given = [Trial(0, "candidate", (0.0,) * 4, 0.25, None, n=1)]
    page = make_page(tmp_path / "r.html", trials=given, verdict=verdict, best=0)
    assert "0.250 (n = 1)" in page
    assert "0.500 (n = 1)" in page


def test_points_and_level_lines_share_one_scale() -> None:
    chart = progress_chart(trials(), 29, LABELS)
    assert chart is not None
    level = {line.kind: line.y for line in chart.lines}
    ticks = {float(t.label): t.at for t in chart.ticks}
    (a, ya), (b, yb) = sorted(ticks.items())[0], sorted(ticks.items())[-1]

    def expected(score: float) -> float:
        return ya + (score - a) / (b - a) * (yb - ya)

    for point in chart.points:
        assert point.y == pytest.approx(expected(point.trial.score), abs=0.02)
        assert PLOT.top <= point.high <= point.y <= point.low <= PLOT.bottom
    assert level == {
        k: pytest.approx(expected(v), abs=0.02)
        for k, v in {"base": 0.264, "sibling": 0.721, "uniform": 0.725}.items()
    }
    assert {line.label.rpartition(":")[0] for line in chart.lines} == {
        "base",
        "instruct",
        "uniform 0.75",
    }
    labels = sorted(line.label_y for line in chart.lines)
    assert min(b - a for a, b in itertools.pairwise(labels)) >= 14


@pytest.mark.parametrize(
    "given",
    [
        [],
        trials()[:2],
        [Trial(0, "candidate", (0.5,) * 4, None, None, "failed", seconds={}, reason="no")],
    ],
)
def test_a_study_without_verdict_has_a_page(tmp_path: Path, given: list[Trial]) -> None:
    page = make_page(tmp_path / "report.html", trials=given, verdict=None, best=None, samples=())
    assert "The search is not finished" in page
    assert "Verdict on the held-out" not in page


def test_equal_scores_without_spread_have_a_page(tmp_path: Path) -> None:
    flat = [Trial(i, "candidate", (0.0,) * 4, 0.0, 0.0, seconds={"merge": 0.0}) for i in range(3)]
    assert "<svg" in make_page(tmp_path / "report.html", trials=flat, verdict=None, best=0)
    assert headline(None, flat, flat[0]).endswith("trial 0, 0.000 ± 0.000 (n = 70).")


def test_seconds_are_means_over_complete_trials() -> None:
    phases = {p.name: p for p in seconds_by_phase(trials())}
    assert phases["answer"].mean == pytest.approx(15.5)
    assert phases["merge"].total == pytest.approx(0.25 * 29)
    assert sum(p.share for p in phases.values()) == pytest.approx(1)


def test_the_table_holds_every_trial(tmp_path: Path) -> None:
    reasons = ["\t=1+1", "\r=1", " =1", "\n@A1", "'=1", "a=1", "=1+1"]
    given = [*trials()]
    for number, reason in enumerate(reasons, start=30):
        given.append(Trial(number, "candidate", (0.1,) * 4, None, None, "failed", reason=reason))
    with write_trials_csv(tmp_path / "trials.csv", given, SLICES).open(
        encoding="utf-8", newline=""
    ) as file:
        rows = list(csv.DictReader(file))
    assert [int(r["number"]) for r in rows] == [t.number for t in given]
    assert [tuple(float(r[f"weight {label}"]) for label in SLICES) for r in rows] == [
        t.vector for t in given
    ]
    assert [float(r["score"]) for r in rows if r["score"]] == [
        t.score for t in given if t.score is not None
    ]
    assert [r["reason"] for r in rows[-len(reasons) :]] == [
        reason if reason == "a=1" else f"'{reason}" for reason in reasons
    ]
    given = [
        replace(t, parts={"grade": 3.5, "length": 0.25}) if t.role == "candidate" and t.score else t
        for t in given
    ]
    with write_trials_csv(tmp_path / "parts.csv", given, SLICES).open(
        encoding="utf-8", newline=""
    ) as file:
        rows = list(csv.DictReader(file))
    assert [(r["part grade"], r["part length"]) for r in rows] == [
        ("3.5", "0.25") if t.parts else ("", "") for t in given
    ]


def test_every_drawing_scales_and_every_table_scrolls(tmp_path: Path) -> None:
    page = make_page(tmp_path / "r.html")
    parsed = Elements(page)
    drawings = [attributes for tag, attributes in parsed.found if tag == "svg"]
    assert len(drawings) > 6
    for attributes in drawings:
        _, _, width, height = map(float, (attributes["viewbox"] or "").split())
        if "width" in attributes:
            assert width == float(attributes["width"] or 0)
            assert height == float(attributes["height"] or 0)
    assert page.count("<table") == page.count('<div class="scroll"><table')


def test_one_held_out_task_gives_no_interval(tmp_path: Path) -> None:
    grades = {}
    for name, grade in (("winner", 4.0), ("base", 3.0)):
        grades[name] = {"0": TaskGrade(None, False, grade)}
    verdict = make_verdict(grades, "grade")
    assert verdict.paired["winner-base"] == PairedDifference(1.0, None, None)
    # version 0.2.0 and before stored one of no width
    older = verdict.to_dict()
    older["paired"]["winner-base"] = {"diff": 1.0, "low": 1.0, "high": 1.0}
    for found in (verdict, Verdict.from_dict(older)):
        page = make_page(tmp_path / "r.html", verdict=found)
        text = " ".join(" ".join(Elements(page).texts).split())
        assert "+1.000 (n = 1)" in text
        assert "One task tells nothing about the difference from base: +1.000." in text
        assert "Better than" not in text
