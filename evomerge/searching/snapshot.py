"""A finished or running study, for showing, exporting and inference."""

from __future__ import annotations

from dataclasses import dataclass, replace

from evomerge.errors import StudyError
from evomerge.genome.weights import Genome, make_genome
from evomerge.recipe import Recipe
from evomerge.searching.choosing import choose_winner, finalists, unbeaten_name
from evomerge.searching.history import History
from evomerge.searching.ledger import Ledger, open_ledger
from evomerge.searching.records.study_facts import StudyFacts
from evomerge.searching.records.trial_record import TrialRecord
from evomerge.searching.records.verdict_record import Verdict
from evomerge.study import Study


@dataclass(frozen=True)
class StudySnapshot:
    """The contents of a study: its trials by number, the winner so far, and any verdict.

    `picked` is a trial to export in the winner's place.
    """

    ledger: Ledger
    study: Study
    genome: Genome
    records: list[TrialRecord]
    winner: TrialRecord
    verdict: Verdict | None
    picked: TrialRecord | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe of the trial that was picked, else the winner's."""
        return self.genome.decode((self.picked or self.winner).weights)

    def with_trial(self, number: int) -> StudySnapshot:
        """The same study with another trial picked for export.

        Raises StudyError for one that is unknown or not finished.
        """
        name = self.ledger.name
        by_number = {record.number: record for record in self.records}
        trial = by_number.get(number)
        if trial is None:
            raise StudyError(
                f"has no trial {number}",
                where=name,
                remedy=f"Numbers go from {min(by_number)} to {max(by_number)}; `evomerge show "
                f"{name}` lists them.",
            )
        if trial.state != "complete":
            ended = "has failed" if trial.state == "failed" else "is not finished"
            reason = f": {trial.reason}" if trial.reason else ""
            raise StudyError(
                f"the trial {ended}{reason}",
                where=name,
                found=number,
                remedy=f"Choose a complete one; `evomerge show {name}` lists them.",
            )
        return replace(self, picked=trial)

    @property
    def unbeaten(self) -> str | None:
        """The reference that wins because no merge was found that beats it; as in `Verdict`."""
        return unbeaten_name(self.winner, self.genome, self.study.search.uniform)


def load_snapshot(url: str, name: str) -> StudySnapshot:
    """A study by name. Raises StudyError when it is unknown or has no finished candidate yet."""
    ledger = open_ledger(url, name)
    facts, history = ledger.facts, ledger.history()
    if not facts.begun or not history.candidates:
        raise StudyError(
            "the study has no finished candidate yet",
            where=name,
            remedy="Run `evomerge search` until it has one.",
        )
    assert facts.n_layers is not None
    study = facts.study
    genome = make_genome(study, facts.n_layers)
    winner = winner_of(facts, history, study)
    return StudySnapshot(ledger, study, genome, list(history.trials), winner, facts.verdict)


def winner_of(facts: StudyFacts, history: History, study: Study) -> TrialRecord:
    """The trial that the verdict names, or the choice by the trials so far."""
    named = None
    if "winner" in facts.compared:
        named = history.trial(facts.compared["winner"])
    if named is not None:
        return named
    found = finalists(history, study.search.finalists, facts.references_win)
    return choose_winner(found, study.metric)
