"""A study's results as files: best.yaml, README.md (the model card), verdict.json, report.html and
trials.csv.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from evomerge.console import plus_minus
from evomerge.files import replace_file
from evomerge.recipe import METHODS
from evomerge.reporting.card import ABOUT, markdown_text, model_card
from evomerge.reporting.report import write_report
from evomerge.reporting.sentences import conclusion, notes, unbeaten_sentence
from evomerge.reporting.trial_table import shown_fields, write_trials_csv
from evomerge.searching.choosing import reference_names
from evomerge.searching.records.trial_record import REFERENCES, TrialRecord
from evomerge.searching.records.verdict_record import Verdict
from evomerge.searching.snapshot import StudySnapshot

RESULT_FILES = ("best.yaml", "README.md", "verdict.json", "trials.csv", "report.html")
SEED_COMMENT = "# The same numbers are dropped with: mergekit-yaml --random-seed {seed}\n"
OWN_COMMENT = "# Only evomerge merges this: mergekit does not have the method.\n"
MODULES_COMMENT = (
    "# Only evomerge merges this: mergekit takes no such slices of a model with several modules.\n"
)
# of a card, where a parent has won
NO_MERGE = "The configuration below gives {name} itself, which is no merge."


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
        front=snapshot.front,
        samples=facts.samples,
        notes=notes(facts),
        judge=facts.judge_report,
        cascade=facts.cascade,
        study_file=yaml.safe_dump(facts.study_file, allow_unicode=True, sort_keys=False),
    )


def slice_labels(snapshot: StudySnapshot) -> list[str]:
    """The label of each searched number, in the order of a trial's weights."""
    return [gene.label for gene in snapshot.genome.genes]


def use_threads(snapshot: StudySnapshot) -> None:
    """Merge with as many threads as the search did.

    Slerp's angle and DARE's rescaling are sums whose last bit depends on them.
    """
    threads = snapshot.study.engine.threads or snapshot.ledger.facts.threads
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def recipe_text(snapshot: StudySnapshot, in_modules: bool = True) -> str:
    """The winner's YAML, as mergekit takes it; without `in_modules` always in the genome's form.

    Comments say that it is no merge of the search, or that mergekit cannot merge it, and name the
    seed where numbers are dropped at random.
    """
    modules = _modules(snapshot)
    text = snapshot.recipe.to_yaml()
    if modules and in_modules:
        text = snapshot.recipe.in_modules(modules).to_yaml()
    method = METHODS[snapshot.recipe.merge_method]
    if method.is_random:
        text = SEED_COMMENT.format(seed=snapshot.study.search.seed) + text
    if method.only_here:
        text = OWN_COMMENT + text
    elif modules == ():
        text = MODULES_COMMENT + text
    if snapshot.unbeaten is not None and snapshot.picked is None:
        text = f"# {unbeaten_sentence(snapshot.unbeaten)}\n{text}"
    return text


def _modules(snapshot: StudySnapshot) -> tuple[str, ...] | None:
    """The modules in which mergekit merges the recipe.

    None where they need no mention, as in recipes of whole models without gradients; none where
    mergekit cannot merge it.
    """
    modules, recipe = snapshot.ledger.facts.modules, snapshot.recipe
    whole = "models" in recipe.to_dict()
    if whole and (not snapshot.study.genome.smooth or recipe.merge_method == "passthrough"):
        return None
    if modules and not METHODS[recipe.merge_method].keeps_a_lone_base:
        return ()
    return modules


def card(snapshot: StudySnapshot) -> str:
    """The model card: mergekit's sections, and the verdict, or which trial it is."""
    name, about = snapshot.ledger.name, ABOUT
    if snapshot.picked is not None:
        name = f"{name}, trial {snapshot.picked.number}"
    exported = snapshot.picked or snapshot.winner
    if exported.role == "parent":
        about = NO_MERGE.format(name=reference_labels(snapshot).get(exported.number, "a parent"))
    outcome, text = outcome_markdown(snapshot), recipe_text(snapshot)
    only_here = _modules(snapshot) == ()
    return model_card(snapshot.recipe, name, outcome, text, about, only_here)


def outcome_markdown(snapshot: StudySnapshot) -> str:
    """The verdict as a Markdown section; for a trial that was picked, what it is."""
    if snapshot.picked is not None:
        return f"## Trial {snapshot.picked.number}\n\n{picked_sentence(snapshot)}\n"
    return verdict_markdown(snapshot.verdict, snapshot.winner, notes(snapshot.ledger.facts))


def picked_sentence(snapshot: StudySnapshot) -> str:
    """What the exported trial is, and that it is not the winner."""
    trial, winner = snapshot.picked, snapshot.winner
    assert trial is not None
    label = reference_labels(snapshot).get(trial.number)
    kind = trial.role if label is None else f"{trial.role}, {label}"
    if trial.role == "candidate":
        kind = f"a candidate of generation {trial.place[0]}"
    elif trial.role == "mean":
        kind = "the mean of the search's distribution"
    score = plus_minus(trial.score or 0.0, trial.stderr)
    text = f"This is trial {trial.number} ({kind}); its score on {trial.n} search tasks is {score}."
    if trial.number == winner.number:
        return f"{text} It is the winner."
    best = "the winner"
    if snapshot.verdict is None:
        best = "the best so far"
    text += f" It is not {best}, which is trial {winner.number}."
    if trial.number not in snapshot.ledger.facts.compared.values():
        text += " It has not been compared on held-out tasks."
    return text


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
        conclusion(verdict),
        "",
        f"On {verdict.n} tasks that the search never saw, metric `{verdict.metric}` "
        f"(trial {winner.number}, {winner.role}):",
        "",
        "| model | mean | standard error | cut off |",
        "|---|---|---|---|",
    ]
    for name, c in verdict.candidates.items():
        error = "n = 1" if c.stderr is None else f"{c.stderr:.3f}"
        lines.append(f"| {markdown_text(name)} | {c.mean:.3f} | {error} | {c.truncated:.0%} |")
    lines += ["", "| paired difference | mean | 95 % interval |", "|---|---|---|"]
    for name, p in verdict.leads.items():
        interval = "n = 1"
        if p.low is not None:
            interval = f"{p.low:+.3f} to {p.high:+.3f}"
        lines.append(f"| winner − {markdown_text(name)} | {p.diff:+.3f} | {interval} |")
    if notes:
        lines += ["", " ".join(notes)]
    return "\n".join(lines) + "\n"


def reference_labels(snapshot: StudySnapshot) -> dict[int, str]:
    """Trial number -> the label of a parent or uniform weight."""
    names = reference_names(snapshot.genome, snapshot.study.search.uniform)
    labels = {}
    for record in snapshot.records:
        if record.role in REFERENCES and record.vector in names:
            labels[record.number] = names[record.vector]
    return labels


def as_json(snapshot: StudySnapshot, pareto: bool = False) -> dict[str, Any]:
    """The stable form of `evomerge show --json`; `pareto` adds the front."""
    shown = {"pareto": asdict(snapshot.known_front)} if pareto else {}
    return shown | {
        "study": snapshot.ledger.name,
        "winner": snapshot.winner.number,
        "best": snapshot.winner.number,  # its name in version 0.1
        "unbeaten": snapshot.unbeaten,
        "trials": [shown_fields(r) | {"weights": r.vector} for r in snapshot.records],
        "verdict": None if snapshot.verdict is None else snapshot.verdict.to_dict(),
    }


def _writer(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text, encoding="utf-8")
