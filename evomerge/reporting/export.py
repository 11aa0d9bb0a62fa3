"""A study's results as files: best.yaml, README.md (the model card), verdict.json, report.html and
trials.csv.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from evomerge.files import replace_file
from evomerge.recipe import DARE
from evomerge.reporting.card import model_card
from evomerge.reporting.report import write_report
from evomerge.reporting.sentences import notes
from evomerge.reporting.trial_table import write_trials_csv
from evomerge.searching.choosing import sibling_names
from evomerge.searching.records.trial_record import TrialRecord
from evomerge.searching.records.verdict_record import Verdict
from evomerge.searching.snapshot import StudySnapshot
from evomerge.study import Study

SEED_COMMENT = "# The same numbers are dropped with: mergekit-yaml --random-seed {seed}\n"
# the keys of a trial in `evomerge show --json`
SHOWN = (
    "number",
    "generation",
    "index",
    "role",
    "state",
    "weights",
    "score",
    "stderr",
    "n",
    "truncated",
)


def write_results(snapshot: StudySnapshot, folder: Path) -> list[Path]:
    """Write all five files, each whole or not at all; returns their paths. Raises OutputError."""
    slices = slice_labels(snapshot)
    texts = {"best.yaml": recipe_text(snapshot), "README.md": card(snapshot)}
    if snapshot.verdict is not None:
        verdict = json.dumps(snapshot.verdict.to_dict(), indent=2, ensure_ascii=False)
        texts["verdict.json"] = f"{verdict}\n"
    written = [replace_file(folder / name, _writer(text)) for name, text in texts.items()]
    written.append(
        replace_file(
            folder / "trials.csv", lambda path: write_trials_csv(path, snapshot.records, slices)
        )
    )
    written.append(replace_file(folder / "report.html", lambda path: write_page(snapshot, path)))
    return written


def write_page(snapshot: StudySnapshot, out: Path) -> Path:
    """Write the report page of a study to `out`. Raises OSError."""
    facts = snapshot.ledger.facts
    return write_report(
        out,
        study=snapshot.ledger.name,
        metric=snapshot.study.metric,
        trials=snapshot.records,
        verdict=snapshot.verdict,
        best=snapshot.winner.number,
        slices=slice_labels(snapshot),
        labels=reference_labels(snapshot),
        samples=facts.samples,
        notes=notes(facts),
        judge=facts.judge_report,
        cascade=facts.cascade,
        study_file=yaml.safe_dump(facts.study_file, allow_unicode=True, sort_keys=False),
    )


def slice_labels(snapshot: StudySnapshot) -> list[str]:
    """The label of each searched number, in the order of a trial's weights."""
    return [gene.label for gene in snapshot.genome.genes]


def use_threads(study: Study) -> None:
    """Merge with as many threads as the search did.

    Slerp's angle and DARE's rescaling are sums whose last bit depends on them.
    """
    if study.engine.threads is not None:
        import torch

        torch.set_num_threads(study.engine.threads)


def recipe_text(snapshot: StudySnapshot) -> str:
    """The winner's YAML; a comment names the seed where numbers are dropped at random."""
    text = snapshot.recipe.to_yaml()
    if snapshot.recipe.merge_method not in DARE:
        return text
    return SEED_COMMENT.format(seed=snapshot.study.search.seed) + text


def card(snapshot: StudySnapshot) -> str:
    """The model card: mergekit's sections, and the verdict."""
    verdict = verdict_markdown(snapshot.verdict, snapshot.winner, notes(snapshot.ledger.facts))
    return model_card(snapshot.recipe, snapshot.ledger.name, verdict, recipe_text(snapshot))


def verdict_markdown(
    verdict: Verdict | None, winner: TrialRecord, notes: Sequence[str] = ()
) -> str:
    """The verdict as a Markdown section; `notes` are sentences below its tables."""
    if verdict is None:
        return (
            "## Verdict\n\n"
            "The search is not finished, so nothing has been compared on held-out tasks yet.\n"
        )
    lines = [
        "## Verdict",
        "",
        f"On {verdict.n} tasks that the search never saw, metric `{verdict.metric}` "
        f"(trial {winner.number}, {winner.role}):",
        "",
        "| model | mean | standard error | cut off |",
        "|---|---|---|---|",
    ]
    for name, c in verdict.candidates.items():
        error = "n = 1" if c.stderr is None else f"{c.stderr:.3f}"
        lines.append(f"| {name} | {c.mean:.3f} | {error} | {c.truncated:.0%} |")
    lines += ["", "| paired difference | mean | 95 % interval |", "|---|---|---|"]
    for name, p in verdict.leads.items():
        interval = "n = 1"
        if p.low is not None:
            interval = f"{p.low:+.3f} to {p.high:+.3f}"
        lines.append(f"| winner − {name} | {p.diff:+.3f} | {interval} |")
    if notes:
        lines += ["", " ".join(notes)]
    return "\n".join(lines) + "\n"


def reference_labels(snapshot: StudySnapshot) -> dict[int, str]:
    """Trial number -> the label of a parent or uniform weight."""
    genome = snapshot.genome
    names: dict[tuple[float, ...], str] = {}
    for weight in (*snapshot.study.search.uniform, 1.0):
        for vector in genome.uniform(weight):
            names[vector] = f"uniform {weight:g}"
    for m, name in enumerate(sibling_names(genome.siblings)):
        names[genome.parent(m)] = name
    if genome.has_base:
        names[genome.parent(None)] = "base"
    labels = {}
    for record in snapshot.records:
        if record.role in ("parent", "uniform") and record.weights in names:
            labels[record.number] = names[record.weights]
    return labels


def as_json(snapshot: StudySnapshot) -> dict[str, Any]:
    """The stable form of `evomerge show --json`."""
    return {
        "study": snapshot.ledger.name,
        "best": snapshot.winner.number,
        "trials": [{key: getattr(r, key) for key in SHOWN} for r in snapshot.records],
        "verdict": None if snapshot.verdict is None else snapshot.verdict.to_dict(),
    }


def _writer(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text, encoding="utf-8")
