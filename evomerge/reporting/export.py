"""What a study gives, as files: best.yaml, README.md (the model card), verdict.json, report.html,
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
from evomerge.reporting.report import notes, write_report, write_trials_csv
from evomerge.searching.choosing import sibling_names
from evomerge.searching.finished import Finished
from evomerge.searching.records.trial_record import TrialRecord
from evomerge.searching.records.verdict_record import Verdict
from evomerge.study import Study


def write_results(finished: Finished, folder: Path) -> list[Path]:
    """Write all five files, each whole or not at all. Raises OutputError."""
    slices = [gene.label for gene in finished.genome.genes]
    facts = finished.ledger.facts
    written = []

    def put(name: str, write: Callable[[Path], object]) -> None:
        written.append(replace_file(folder / name, write))

    put("best.yaml", lambda p: p.write_text(recipe_text(finished), encoding="utf-8"))
    put("README.md", lambda p: p.write_text(card(finished), encoding="utf-8"))
    if finished.verdict is not None:
        text = json.dumps(finished.verdict.to_dict(), indent=2, ensure_ascii=False) + "\n"
        put("verdict.json", lambda p: p.write_text(text, encoding="utf-8"))
    put("trials.csv", lambda p: write_trials_csv(p, finished.records, slices))
    put(
        "report.html",
        lambda p: write_report(
            p,
            study=finished.ledger.name,
            metric=finished.study.metric,
            trials=finished.records,
            verdict=finished.verdict,
            best=finished.winner.number,
            slices=slices,
            labels=reference_labels(finished),
            samples=facts.samples,
            told=notes(facts),
            judge=facts.judge_report,
            cascade=facts.cascade,
            study_file=yaml.safe_dump(facts.study_file, allow_unicode=True, sort_keys=False),
        ),
    )
    return written


def use_threads(study: Study) -> None:
    """Merge with as many threads as the search did: slerp's angle and DARE's rescaling are sums
    whose last bit depends on them.
    """
    if study.engine.threads is not None:
        import torch

        torch.set_num_threads(study.engine.threads)


def recipe_text(finished: Finished) -> str:
    """The winner's YAML; where numbers are dropped at random, a comment says with which seed."""
    text = finished.recipe.to_yaml()
    if finished.recipe.merge_method not in DARE:
        return text
    return f"# The same numbers are dropped with: mergekit-yaml --random-seed {finished.study.search.seed}\n{text}"


def card(finished: Finished) -> str:
    """The model card: as mergekit's, plus the verdict."""
    verdict = verdict_markdown(finished.verdict, finished.winner, notes(finished.ledger.facts))
    return model_card(finished.recipe, finished.ledger.name, verdict, recipe_text(finished))


def verdict_markdown(verdict: Verdict | None, winner: TrialRecord, told: Sequence[str] = ()) -> str:
    """The verdict as a Markdown section; `told` are sentences below its tables."""
    if verdict is None:
        return "## Verdict\n\nThe search is not finished, so nothing was compared on held-out tasks yet.\n"
    lines = [
        "## Verdict",
        "",
        f"On {verdict.n} tasks that the search never saw, metric `{verdict.metric}` (trial {winner.number}, {winner.role}):",
        "",
        "| model | mean | standard error | cut off |",
        "|---|---|---|---|",
    ]
    for name, c in verdict.candidates.items():
        error = "n = 1" if c.stderr is None else f"{c.stderr:.3f}"
        lines.append(f"| {name} | {c.mean:.3f} | {error} | {c.truncated:.0%} |")
    lines += ["", "| paired difference | mean | 95 % interval |", "|---|---|---|"]
    for name, p in verdict.paired.items():
        lines.append(
            f"| {name.replace('-', ' − ', 1)} | {p.diff:+.3f} | {p.low:+.3f} to {p.high:+.3f} |"
        )
    lines += ["", " ".join(told)] if told else []
    return "\n".join(lines) + "\n"


def reference_labels(finished: Finished) -> dict[int, str]:
    """Trial number -> what a parent or uniform weight is called."""
    genome = finished.genome
    names = {
        vector: f"uniform {weight:g}"
        for weight in (*finished.study.search.uniform, 1.0)
        for vector in genome.uniform(weight)
    }
    names |= {genome.parent(m): name for m, name in enumerate(sibling_names(genome.siblings))}
    names |= {genome.parent(None): "base"} if genome.has_base else {}
    return {
        r.number: names[r.weights]
        for r in finished.records
        if r.role in ("parent", "uniform") and r.weights in names
    }


def as_json(finished: Finished) -> dict[str, Any]:
    """The stable form of `evomerge show --json`."""
    keys = (
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
    return {
        "study": finished.ledger.name,
        "best": finished.winner.number,
        "trials": [{key: getattr(r, key) for key in keys} for r in finished.records],
        "verdict": None if finished.verdict is None else finished.verdict.to_dict(),
    }
