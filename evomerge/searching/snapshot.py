"""A finished or running study, for showing, exporting and inference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from evomerge.errors import StudyError
from evomerge.genome.genome import Genome, make_genome
from evomerge.recipe import Recipe
from evomerge.searching.choosing import (
    choose_winner,
    finalists,
    reference_names,
    unbeaten_name,
)
from evomerge.searching.front.make_front import recorded_front
from evomerge.searching.front.objective_values import study_objectives
from evomerge.searching.front.picking import picked_point
from evomerge.searching.history import History
from evomerge.searching.ledger import Ledger, open_ledger
from evomerge.searching.records.front_record import Front
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
        return self.genome.decode((self.picked or self.winner).vector)

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
            ended = "is not finished"
            if trial.state == "failed":
                ended = "has failed"
            reason = f": {trial.reason}" if trial.reason else ""
            raise StudyError(
                f"the trial {ended}{reason}",
                where=name,
                found=number,
                remedy=f"Choose a complete one; `evomerge show {name}` lists them.",
            )
        return replace(self, picked=trial)

    def with_point(self, wanted: str) -> StudySnapshot:
        """The same study with a point of its front picked for export, as of `picked_point`.

        Raises InputError, StudyError for a study that has no front.
        """
        return self.with_trial(picked_point(self.known_front, wanted).trial)

    @property
    def known_front(self) -> Front:
        """The front. Raises StudyError for a study that has none."""
        if self.front is None:
            raise StudyError(
                "the trials have not recorded the tokens of their answers, so there is no front",
                where=self.ledger.name,
                remedy="Search again with this version.",
            )
        return self.front

    @cached_property
    def front(self) -> Front | None:
        """The verdict's front, or that of the trials so far.

        None where they have recorded too little for one.
        """
        if self.verdict is not None and self.verdict.front is not None:
            return self.verdict.front
        history = self.ledger.history()
        return front_so_far(self.ledger.facts, history, self.study, self.genome)

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
    winner = winner_of(facts, history, study, genome)
    return StudySnapshot(ledger, study, genome, list(history.trials), winner, facts.verdict)


def front_so_far(facts: StudyFacts, history: History, study: Study, genome: Genome) -> Front | None:
    """The front that the trials have recorded; None of a study that recorded too little for one."""
    names = reference_names(genome, study.search.uniform)
    return recorded_front(
        history,
        study_objectives(study, facts.task_groups),
        several=bool(study.objective.several),
        metric=study.metric,
        labels={t.number: names.get(t.vector, t.role) for t in history.references},
    )


def winner_of(facts: StudyFacts, history: History, study: Study, genome: Genome) -> TrialRecord:
    """The trial that the verdict names, or the choice by the trials so far.

    With several objectives that is the compromise on the front.
    """
    named = None
    if "winner" in facts.compared:
        named = history.trial(facts.compared["winner"])
    if named is not None:
        return named
    if study.objective.several:
        front = front_so_far(facts, history, study, genome)
        assert front is not None  # the references have every objective
        chosen = history.trial(front.middle.trial)
        assert chosen is not None
        return chosen
    found = finalists(history, study.search.finalists, facts.references_win)
    return choose_winner(found, study.metric)
