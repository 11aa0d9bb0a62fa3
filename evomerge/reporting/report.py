"""What a study found, as one self-contained page and as a table.

The page loads nothing: style and charts are inline, and it runs no script. Every text is escaped by
the template, for answers come from models and references from files. Here figures become words and
coordinates; the markup stands in templates/report.html.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.reporting.judge_section import judge_section

if TYPE_CHECKING:
    from evomerge.searching.records.study_facts import CascadeSavings, StudyFacts
    from evomerge.searching.records.trial_record import TrialRecord
    from evomerge.searching.records.verdict_record import Sample, Verdict

Z95 = 1.96  # standard errors to each side of a mean in a 95 % interval
PHASES = ("merge", "answer", "judge")
COLUMNS = ("number", "generation", "index", "role", "state", "score", "stderr", "n", "truncated")
METRICS = {
    "grade": "mean grade, 1 to 5",
    "correct": "share of answers that are right",
    "score": "weighted mean of lm-eval's metrics",
    "objective": "weighted sum of the objective's parts",
}
MINUS = "−"
PLOT = {"left": 46.0, "right": 610.0, "top": 14.0, "bottom": 236.0, "width": 760.0, "height": 274.0}
LABEL_GAP = 14.0  # least distance between two labels beside the progress chart
CELL_WIDTH = 130.0  # of an interval bar in the verdict table


def write_report(
    out: Path,
    *,
    study: str,
    metric: str,
    trials: Sequence[TrialRecord],
    verdict: Verdict | None,
    best: int | None,
    slices: Sequence[str],
    labels: Mapping[int, str] | None = None,
    samples: Sequence[Sample] = (),
    study_file: str = "",
    judge: Mapping[str, Any] | None = None,
    cascade: CascadeSavings | None = None,
    told: Sequence[str] = (),
) -> Path:
    """Write the page of a study, finished or not, to `out`, and return `out`.

    `best` is the winner's trial number. `slices` holds a label per weight, such as "0–2". `labels`
    says what a parent
    or uniform trial is called, by its number: "base", "uniform 0.5". `samples` are held-out answers
    side by side. `judge` is what `judge_facts` gave, `cascade` what a cascade judge saved, `told`
    what `notes` says. Raises OSError.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("evomerge.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number, signed=signed, share=share, title=model_title, with_error=with_error
    )
    winner = next((t for t in trials if t.number == best), None)
    page = environment.get_template("report.html").render(
        study=study,
        metric=METRICS.get(metric, metric),
        trials=trials,
        winner=winner,
        headline=headline(verdict, trials, winner),
        told=told,
        remarks=remarks(verdict),
        verdict=verdict,
        rows=verdict_rows(verdict) if verdict else [],
        progress=progress_chart(trials, best, labels or {}),
        weights=weight_chart(winner.weights, slices) if winner else None,
        phases=seconds_by_phase(trials),
        truncated=truncation(trials),
        slices=slices,
        samples=samples,
        study_file=study_file,
        judge=judge_section(judge, cascade),
    )
    out.write_text(page, encoding="utf-8")
    return out


def write_trials_csv(out: Path, trials: Sequence[TrialRecord], slices: Sequence[str]) -> Path:
    """One row per trial: its figures, seconds by phase, the reason of a failure, and a column per
    weight.
    """
    with out.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        parts = list(dict.fromkeys(part for t in trials for part in t.parts))
        headings = [
            *COLUMNS,
            *(f"seconds_{phase}" for phase in PHASES),
            "reason",
            *(f"weight {label}" for label in slices),
        ]
        table.writerow([*headings, *(f"part {part}" for part in parts)])
        for t in trials:
            # A spreadsheet would run a reason that begins like a formula.
            reason = f"'{t.reason}" if t.reason and t.reason[0] in "=+-@" else t.reason
            figures = [
                *(getattr(t, c) for c in COLUMNS),
                *(t.seconds.get(phase) for phase in PHASES),
            ]
            table.writerow([*figures, reason, *t.weights, *(t.parts.get(part) for part in parts)])
    return out


def number(value: float | None, digits: int = 3) -> str:
    """A figure with a true minus sign; an en dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def signed(value: float | None, digits: int = 3) -> str:
    """The same with its sign always shown."""
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", MINUS)


def with_error(value: float | None, error: float | None, sign: bool = False) -> str:
    """A figure and its standard error; a single value has none."""
    text = signed(value) if sign else number(value)
    if value is not None and error is None:
        return f"{text} (n = 1)"
    return f"{text} ± {number(error)}"


def share(value: float | None) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{100 * value:.1f} %"


def model_title(name: str) -> str:
    """What the verdict calls a candidate, in words."""
    return {"uniform": "best uniform weight"}.get(name, name.removeprefix("sibling:"))


def headline(
    verdict: Verdict | None, trials: Sequence[TrialRecord], winner: TrialRecord | None
) -> str:
    """The first sentence: the winner on the held-out tasks, or how far the search has come."""
    if verdict is not None:
        mean, n = verdict.candidates["winner"], verdict.n
        figure = with_error(mean.mean, mean.stderr).replace(" ", "\u00a0")
        if verdict.metric == "correct":
            return f"The winner is right on a share of {figure} of the {n} held-out tasks."
        if verdict.metric == "objective":
            return f"The winner reaches an objective of {figure} on the {n} held-out tasks."
        if verdict.metric == "score":
            return f"The winner has a score of {figure} on the {n} held-out documents."
        return f"The winner has a mean grade of {figure} on the {n} held-out tasks."
    done = sum(t.state == "complete" for t in trials)
    text = f"The search is not finished: {done} trials are complete, and there is no verdict yet."
    if winner is not None and winner.score is not None:
        counted = "" if winner.stderr is None else f" (n = {winner.n})"
        text += f" Best on the search tasks so far: trial {winner.number}, {with_error(winner.score, winner.stderr)}{counted}."
    return text


def remarks(verdict: Verdict | None) -> list[dict[str, Any]]:
    """One sentence per paired difference; it says so when the interval includes zero."""
    sentences: list[dict[str, Any]] = []
    if verdict is None:
        return sentences
    for key, pair in verdict.paired.items():
        name = model_title(key.removeprefix("winner-"))
        name = f"the {name}" if key == "winner-uniform" else name
        figures = f"{signed(pair.diff)}, 95 % interval {signed(pair.low)} to {signed(pair.high)}, n = {verdict.n}"
        if pair.low > 0:
            kind, text = "better", f"Better than {name}: {figures}."
        elif pair.high < 0:
            kind, text = "worse", f"Worse than {name}: {figures}."
        else:
            kind, text = (
                "open",
                f"No difference from {name} is shown: {figures}, which includes zero.",
            )
        sentences.append({"kind": kind, "text": text})
    return sentences


def notes(facts: StudyFacts) -> list[str]:
    """What a reader of the verdict must know beside its figures, a sentence each; `facts` are a
    study's.
    """
    told = []
    if facts.stopped:
        told.append(f"The search ended because {facts.stopped.removeprefix('converged: ')}.")
    chosen = facts.validation
    if chosen is not None:
        kept = f"{chosen.n} tasks that no candidate was ranked on"
        blind = "; the held-out tasks had no part in it" if facts.look == 1 else ""
        told.append(f"The winner was chosen among {len(chosen.means)} finalists on {kept}{blind}.")
    look = facts.look
    if look > 1:
        told.append(
            f"This is look number {look} at the held-out tasks: the search went on after a verdict, so its intervals are too narrow."
        )
    saved = facts.cascade
    if saved is not None and saved.graded:
        told.append(
            f"The cascade judge asked the language model about {saved.asked:,} of {saved.graded:,} answers of candidates"
            f" ({saved.asked / saved.graded:.0%})."
        )
    return told


def verdict_rows(verdict: Verdict) -> list[dict[str, Any]]:
    """A row per candidate with its figures and the geometry of its two interval bars."""
    candidates, paired = verdict.candidates, verdict.paired
    means = {}
    for name, c in candidates.items():
        half = Z95 * (c.stderr or 0.0)
        means[name] = (c.mean - half, c.mean, c.mean + half)
    pairs = {key.removeprefix("winner-"): (p.low, p.diff, p.high) for key, p in paired.items()}
    x_mean = scale([v for m in means.values() for v in m], 6, CELL_WIDTH - 6)
    x_pair = scale([0.0, *(v for p in pairs.values() for v in p)], 6, CELL_WIDTH - 6)
    return [
        {
            "name": name,
            **vars(c),
            "bar": [x_mean(v) for v in means[name]],
            "pair": paired.get(f"winner-{name}"),
            "pair_bar": [x_pair(v) for v in pairs[name]] if name in pairs else None,
            "zero": x_pair(0.0),
        }
        for name, c in candidates.items()
    ]


def progress_chart(
    trials: Sequence[TrialRecord], best: int | None, labels: Mapping[int, str]
) -> dict[str, Any] | None:
    """Coordinates of the scores by trial, the running best, and a line for each parent and the best
    uniform weight.
    """
    shown = [t for t in trials if t.role in ("candidate", "mean")]
    scored = [t for t in trials if t.state == "complete" and t.score is not None]
    if not shown or not scored:
        return None
    edges = [(t.score or 0.0) + sign * (t.stderr or 0.0) for t in scored for sign in (-1, 1)]
    y, ticks = y_axis(edges)
    x = scale([0.5, len(shown) + 0.5], PLOT["left"], PLOT["right"], pad=0)
    points, crosses, steps, top = [], [], [], None
    for place, t in enumerate(shown, start=1):
        if t.state == "failed":
            crosses.append({"x": x(place), "trial": t})
        if t.state != "complete" or t.score is None:
            continue
        error = t.stderr or 0.0
        points.append(
            {
                "x": x(place),
                "y": y(t.score),
                "low": y(t.score - error),
                "high": y(t.score + error),
                "trial": t,
                "best": t.number == best,
            }
        )
        if t.role == "candidate" and (top is None or t.score > top):
            top = t.score
        if top is not None:
            steps.append((x(place), y(top)))
    every = max(1, -(-len(shown) // 12))
    return {
        **PLOT,
        "points": points,
        "crosses": crosses,
        "running": step_path(steps),
        "lines": reference_lines(scored, y, labels),
        "ticks": [{"y": y(v), "label": number(v, 2)} for v in ticks],
        "xticks": [{"x": x(i + 1), "label": shown[i].number} for i in range(0, len(shown), every)],
    }


def reference_lines(
    scored: Sequence[TrialRecord], y: Callable[[float], float], labels: Mapping[int, str]
) -> list[dict[str, Any]]:
    """The parents and the best uniform weight as level lines, their labels kept apart."""
    shown = [t for t in scored if t.role == "parent"]
    uniform = max(
        (t for t in scored if t.role == "uniform"), key=lambda t: t.score or 0.0, default=None
    )
    lines: list[dict[str, Any]] = []
    for t in [*shown, *([uniform] if uniform is not None else [])]:
        name = labels.get(t.number, t.role)
        kind = "uniform" if t.role == "uniform" else "base" if name == "base" else "sibling"
        lines.append({"kind": kind, "label": f"{name}: {number(t.score)}", "y": y(t.score or 0.0)})
    lines.sort(key=lambda line: line["y"])
    lowest = PLOT["bottom"] - LABEL_GAP * (len(lines) - 1)
    at = PLOT["top"] - LABEL_GAP
    for i, line in enumerate(lines):
        at = max(at + LABEL_GAP, min(line["y"], lowest + LABEL_GAP * i))
        line["label_y"] = at
    return lines


def weight_chart(weights: Sequence[float], slices: Sequence[str]) -> dict[str, Any]:
    """Horizontal bars, a slice to a row, from the first layers down to the last; lines at 0 and at
    1.
    """
    labels = [slices[i] if i < len(slices) else str(i) for i in range(len(weights))]
    left = 54 + 7.0 * max((len(label) for label in labels), default=0)
    x = scale([0.0, 1.0, *weights], left, 560, pad=0.02)
    bars = [
        {
            "y": 26 + 20 * i,
            "x": min(x(0), x(w)),
            "width": abs(x(w) - x(0)),
            "label": labels[i],
            "value": number(w),
            "end": max(x(0), x(w)),
        }
        for i, w in enumerate(weights)
    ]
    return {"bars": bars, "left": left, "zero": x(0), "one": x(1), "height": 34 + 20 * len(weights)}


def seconds_by_phase(trials: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """Mean and total seconds per phase over the complete trials, and the phase's share of all."""
    done = [t for t in trials if t.state == "complete"]
    names = [
        p
        for p in dict.fromkeys((*PHASES, *(p for t in done for p in t.seconds)))
        if any(p in t.seconds for t in done)
    ]
    totals = {p: sum(t.seconds.get(p, 0.0) for t in done) for p in names}
    everything = sum(totals.values()) or 1.0
    return [
        {
            "name": p,
            "mean": totals[p] / len(done),
            "total": totals[p],
            "share": totals[p] / everything,
        }
        for p in names
    ]


def truncation(trials: Sequence[TrialRecord]) -> dict[str, Any] | None:
    """Mean and highest share of answers that ended at `max_new_tokens`."""
    done = [t for t in trials if t.state == "complete"]
    if not done:
        return None
    worst = max(done, key=lambda t: t.truncated)
    return {
        "mean": sum(t.truncated for t in done) / len(done),
        "worst": worst.truncated,
        "trial": worst.number,
    }


def scale(
    values: Sequence[float], start: float, end: float, pad: float = 0.04
) -> Callable[[float], float]:
    """A linear map from the values' range, widened by `pad` of it at both ends, to start..end in
    pixels.
    """
    low, high = min(values), max(values)
    room = pad * (high - low) or (0.5 if high == low else 0.0)
    low, high = low - room, high + room
    return lambda value: round(start + (value - low) / (high - low) * (end - start), 2)


def y_axis(values: Sequence[float]) -> tuple[Callable[[float], float], list[float]]:
    """A map to pixels, upwards, and about five round tick values."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1.0, 2.0, span) if span / s <= 6)
    first = int(low // step)
    ticks = [round(step * k, 6) for k in range(first, first + int(span / step) + 3)]
    ticks = ticks[: next(i for i, t in enumerate(ticks) if t >= high) + 1]
    return scale([ticks[0], ticks[-1]], PLOT["bottom"], PLOT["top"], pad=0), ticks


def step_path(steps: Sequence[tuple[float, float]]) -> str:
    """An SVG path that goes level to each x, then up."""
    if not steps:
        return ""
    first, *rest = steps
    return f"M{first[0]} {first[1]}" + "".join(f"H{x}V{y}" for x, y in rest)
