"""One point of a front, as a user names it: its number, the knee, or a constraint."""

from __future__ import annotations

import re

from evomerge.errors import InputError
from evomerge.searching.records.front_record import Front, FrontPoint

CONSTRAINT = re.compile(r"\A(?P<name>[^<>]++)(?P<sign>[<>]=)\s*(?P<limit>[-+.\deE]+)")
WHERE = "--point"


def picked_point(front: Front, wanted: str) -> FrontPoint:
    """The point that `wanted` names: "2", "knee", or "answer_tokens<=300".

    Of the points that meet a constraint, the best in the first of the other objectives. Raises
    InputError.
    """
    if wanted == "knee":
        return front.middle
    if wanted.isdecimal():
        number = int(wanted)
        if not 1 <= number <= len(front.points):
            raise InputError(
                "the front has no such point",
                where=WHERE,
                found=wanted,
                remedy=f"Use 1 to {len(front.points)}; `evomerge show STUDY --pareto` lists them.",
            )
        return front.points[number - 1]
    found = CONSTRAINT.fullmatch(wanted.strip())
    limit = None if found is None else _number(found["limit"])
    if found is None or limit is None:
        raise InputError(
            "is neither a point's number, nor knee, nor a constraint",
            where=WHERE,
            found=wanted,
            remedy=f"Write 1, knee, or '{front.objectives[-1]}<=NUMBER', for example.",
        )
    return _constrained(front, found["name"].strip(), found["sign"], limit)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _constrained(front: Front, name: str, sign: str, limit: float) -> FrontPoint:
    if name not in front.objectives:
        raise InputError(
            "is no objective of this front",
            where=WHERE,
            found=name,
            remedy=f"Use {' or '.join(front.objectives)}.",
        )
    known = [point for point in front.points if name in point.values]
    below = sign == "<="
    fitting = []
    for point in known:
        mean = point.values[name].mean
        if mean <= limit if below else mean >= limit:
            fitting.append(point)
    if not fitting:
        nearest = min(known, key=lambda point: abs(point.values[name].mean - limit))
        raise InputError(
            f"no point of the front has {name} {sign} {limit:g}",
            where=WHERE,
            found=f"{nearest.values[name].mean:.6g}, the nearest, at point "
            f"{front.points.index(nearest) + 1}",
            remedy="Loosen the constraint.",
        )
    other = next(objective for objective in front.objectives if objective != name)
    better = 1.0 if other in front.maximize else -1.0
    rated = [point for point in fitting if other in point.values]
    return max(rated, key=lambda point: better * point.values[other].mean)
