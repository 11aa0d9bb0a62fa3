"""A front as it is shown, stored and exported: points by name, the table, the picture."""

import json
from dataclasses import replace

import pytest

from evomerge.cli.showing import print_front, value_cell
from evomerge.errors import InputError
from evomerge.reporting.front_chart import front_charts
from evomerge.reporting.report import write_report
from evomerge.searching.front.picking import picked_point
from evomerge.searching.records.front_record import Front, FrontPoint, FrontValue
from evomerge.searching.records.verdict_record import Verdict

EVIL = "<script>uniform"


def value(mean):
    return FrontValue(mean, mean - 0.1, mean + 0.1)


def front_of(*points):
    made = []
    for trial, (correct, tokens) in enumerate(points):
        values = {"correct": value(correct), "answer_tokens": value(tokens)}
        made.append(FrontPoint(10 + trial, "mean", values))
    base = FrontPoint(0, EVIL, {"correct": value(0.2), "answer_tokens": value(50)})
    return Front(("correct",), ("answer_tokens",), tuple(made), (base,), knee=2, held_out=True)


FRONT = front_of((0.9, 400.0), (0.8, 250.0), (0.4, 120.0))


@pytest.mark.parametrize(
    ("wanted", "trial"),
    [
        ("1", 10),
        ("3", 12),
        ("knee", 11),
        ("answer_tokens<=300", 11),
        ("answer_tokens <= 120", 12),
        ("correct>=0.5", 11),
        ("correct>=.85", 10),
    ],
)
def test_a_point_is_picked_by_number_knee_or_constraint(wanted, trial):
    assert picked_point(FRONT, wanted).trial == trial


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("0", ["no such point", "1 to 3"]),
        ("4", ["no such point", "'4'"]),
        ("knees", ["neither", "'knees'", "answer_tokens<="]),
        ("correct>=e", ["neither"]),
        ("9" * 5000, ["neither"]),
        ("", ["neither"]),
        ("answer_tokens<=nan", ["neither"]),
        ("<=3", ["no objective", "''"]),
        ("length<=3", ["no objective", "'length'", "correct or answer_tokens"]),
        ("answer_tokens<=100", ["answer_tokens <= 100", "120", "point 3"]),
        ("correct>=0.95", ["correct >= 0.95", "0.9,", "point 1"]),
    ],
)
def test_an_impossible_point_is_one_line(wanted, words):
    with pytest.raises(InputError) as caught:
        picked_point(FRONT, wanted)
    assert "\n" not in str(caught.value)
    for word in ["--point", *words]:
        assert word in str(caught.value)


def test_a_group_s_name_may_hold_a_sign():
    points = []
    for point in FRONT.points:
        values = {"group:a<=b": point.values["correct"], "length": value(1.0)}
        points.append(replace(point, values=values))
    front = Front(("group:a<=b",), ("length",), tuple(points), (), knee=1)
    assert picked_point(front, "group:a<=b<=0.5").trial == 12
    unknown = replace(front, minimize=("likelihood",))
    with pytest.raises(InputError, match="has both group:a<=b and likelihood"):
        picked_point(unknown, "group:a<=b<=0.5")


def test_a_front_is_shown_in_80_columns(capsys):
    print_front(FRONT)
    four = replace(FRONT, maximize=("correct", "tasks:" + "x" * 90), minimize=("a", "b"))
    print_front(four)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    row = "2 11 mean (knee) 0.800 [0.700, 0.900] 250.0 [249.9, 250.1]"
    assert " ".join(lines[3].split()) == row
    assert value_cell(FrontValue(0.5, None, None)) == "0.500"
    for number in (0.0, -99.9994, 999.99, 12345.6, -1e7):
        assert len(value_cell(FrontValue(number, None, None))) <= 9


def test_the_picture_holds_each_point_within_its_axes():
    (chart,) = front_charts(FRONT)
    area = chart.area
    assert [mark.label for mark in chart.marks] == ["1", "2", "3", EVIL]
    for mark in chart.marks:
        assert area.left <= mark.left <= mark.x <= mark.right <= area.right
        assert area.top <= mark.high <= mark.y <= mark.low <= area.bottom
    by_tokens = sorted(chart.marks, key=lambda mark: mark.x)
    assert [mark.label for mark in by_tokens] == [EVIL, "3", "2", "1"]
    assert 3 <= len(chart.xticks) <= 8
    assert not front_charts(front_of((0.9, 400.0)))
    assert not front_charts(None)


def test_the_page_has_the_picture_and_escapes_names(tmp_path):
    page = write_report(
        tmp_path / "r.html",
        study="s",
        metric="correct",
        trials=[],
        verdict=None,
        best=None,
        slices=[],
        front=FRONT,
    ).read_text(encoding="utf-8")
    assert 'class="front"' in page
    assert page.count("<circle") == 5
    assert "answer_tokens" in page
    assert "<script" not in page


def test_a_front_is_stored_as_it_is():
    verdict = Verdict("correct", 3, {}, {}, front=FRONT)
    assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict()))) == verdict
