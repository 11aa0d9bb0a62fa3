"""The findings of a study, as one self-contained page.

The page loads nothing: style and charts are inline, and it runs no script. The template escapes
every text, since answers come from models and references from files. The figures become words and
coordinates in sentences.py, charts.py and judge_section.py; the markup is in templates/report.html.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.reporting.charts import progress_chart, verdict_rows, weight_chart
from evomerge.reporting.front_chart import front_charts
from evomerge.reporting.judge_section import judge_section
from evomerge.reporting.sentences import (
    METRICS,
    headline,
    model_title,
    number,
    remarks,
    share,
    signed,
    with_error,
)
from evomerge.reporting.trial_table import mean_tokens, seconds_by_phase, truncation

if TYPE_CHECKING:
    import jinja2

    from evomerge.searching.records.front_record import Front
    from evomerge.searching.records.judge_report import JudgeReport
    from evomerge.searching.records.study_facts import CascadeSavings
    from evomerge.searching.records.trial_record import TrialRecord
    from evomerge.searching.records.verdict_record import Sample, Verdict


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
    judge: JudgeReport | None = None,
    cascade: CascadeSavings | None = None,
    notes: Sequence[str] = (),
    front: Front | None = None,
) -> Path:
    """Write the page of a study, finished or not, to `out`, and return `out`. Raises OSError.

    `best` is the winner's trial number. `slices` holds a label per weight, such as "0–2". `labels`
    names parents and uniform trials by their numbers: "base", "uniform 0.5". `samples` are held-out
    answers side by side. `judge` is what the study stores about its judge, `cascade` what a cascade
    judge saved, `notes` the result of sentences.notes. `front`: that of several objectives, or of
    score and tokens.
    """
    winner = next((t for t in trials if t.number == best), None)
    page = (
        _environment()
        .get_template("report.html")
        .render(
            study=study,
            metric=METRICS.get(metric, metric),
            trials=trials,
            winner=winner,
            headline=headline(verdict, trials, winner),
            notes=notes,
            remarks=remarks(verdict),
            verdict=verdict,
            rows=verdict_rows(verdict),
            progress=progress_chart(trials, best, labels or {}),
            weights=weight_chart(winner, slices),
            phases=seconds_by_phase(trials),
            truncated=truncation(trials),
            tokens=mean_tokens(trials),
            slices=slices,
            samples=samples,
            study_file=study_file,
            judge=judge_section(judge, cascade),
            front=front,
            fronts=front_charts(front),
        )
    )
    out.write_text(page, encoding="utf-8")
    return out


@cache
def _environment() -> jinja2.Environment:
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
    return environment
