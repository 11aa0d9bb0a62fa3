"""One point of a front, as a user names it: its number, the knee, or a constraint."""

from __future__ import annotations

import math

from evomerge.errors import InputError
from evomerge.searching.records.front_record import Front, FrontPoint

WHERE = "--point"
DIGITS = 9  # of a point's number, at most


def picked_point(front: Front, wanted: str) -> FrontPoint:
    """The point that `wanted` names: "2", "knee", or "answer_tokens<=300".

    Of the points that meet a constraint, the best in the first of the other objectives. Raises
    InputError.
    """
    if wanted == "knee":
        return front.middle
    if wanted.isdecimal() and len(wanted) <= DIGITS:
        number = int(wanted)
        if not 1 <= number <= len(front.points):
            raise InputError(
                "the front has no such point",
                where=WHERE,
                found=wanted,
                remedy=f"Use 1 to {len(front.points)}; `evomerge show STUDY --pareto` lists them.",
            )
        return front.points[number - 1]
    # the last sign: a group's name may hold one
    at = max(wanted.rfind("<="), wanted.rfind(">="))
    limit = _number(wanted[at + 2 :])
    if at < 0 or limit is None:
        raise InputError(
            "is neither a point's number, nor knee, nor a constraint",
            where=WHERE,
            found=wanted,
            remedy=f"Write 1, knee, or '{front.objectives[-1]}<=NUMBER', for example.",
        )
    return _constrained(front, wanted[:at].strip(), wanted[at : at + 2], limit)


def _number(text: str) -> float | None:
    """A finite number; None for anything else."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _constrained(front: Front, name: str, sign: str, limit: float) -> FrontPoint:
    if name not in front.objectives:
        raise InputError(
            "is no objective of this front",
            where=WHERE,
            found=name,
            remedy=f"Use {' or '.join(front.objectives)}.",
        )
    other = next(objective for objective in front.objectives if objective != name)
    below = sign == "<="
    known, fitting = [], []
    for point in front.points:
        if not {name, other} <= point.values.keys():
            continue
        known.append(point)
        mean = point.values[name].mean
        if mean <= limit if below else mean >= limit:
            fitting.append(point)
    if not known:
        raise InputError(
            f"no point of the front has both {name} and {other}", where=WHERE, remedy="Use knee."
        )
    if not fitting:
        nearest = min(known, key=lambda point: abs(point.values[name].mean - limit))
        raise InputError(
            f"no point of the front has {name} {sign} {limit:g}",
            where=WHERE,
            found=f"{nearest.values[name].mean:.6g}, the nearest, at point "
            f"{front.points.index(nearest) + 1}",
            remedy="Loosen the constraint.",
        )
    better = 1.0 if other in front.maximize else -1.0
    return max(fitting, key=lambda point: better * point.values[other].mean)
