"""The loop: the only place where genome, merging, answering, judging and the study meet.

ask -> decode -> apply -> answer -> judge -> score -> record -> tell; then the winner is chosen and
stands before the held-out tasks.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from evomerge.answering.cache import MERGED, AnswerCache
from evomerge.answering.engine import Engine
from evomerge.answering.lm_eval.documents import LmEvalTasks
from evomerge.answering.prompts import Prompter
from evomerge.console import Console, duration
from evomerge.errors import EngineError, StudyFileError
from evomerge.genome.weights import Genome
from evomerge.judging.grade import Judge, WaitingJudge
from evomerge.judging.judge_facts import judge_facts
from evomerge.recipe import Recipe
from evomerge.searching import warm_start
from evomerge.searching.ahead import Item
from evomerge.searching.choosing import choose, finalists
from evomerge.searching.examine import Examined, Examiner
from evomerge.searching.ledger import Ledger, TrialRecord
from evomerge.searching.likelihood_part import make_likelihood_part
from evomerge.searching.one_pass import MODE as ONE_PASS
from evomerge.searching.one_pass import OnePass
from evomerge.searching.rounds import Rounds
from evomerge.searching.sampler import Distribution, ReplayedCmaEs, Slot
from evomerge.searching.samples import samples
from evomerge.searching.scoring import Scorer, task_levels, task_shares
from evomerge.searching.starting import remember_start
from evomerge.searching.stopping import Spent, why_converged, why_stop
from evomerge.searching.verdict import (
    best_uniform,
    choose_winner,
    make_verdict,
    mean_and_error,
    metric_values,
    sibling_names,
)
from evomerge.study import Study
from evomerge.tasks import Split, Task

MAX_ATTEMPTS = 3  # failures at one place of a generation before the run stops


class Search:
    """One study under way. `run` goes on from whatever the ledger holds."""

    def __init__(
        self,
        study: Study,
        genome: Genome,
        split: Split,
        engine: Engine,
        prompter: Prompter,
        judge: Judge,
        ledger: Ledger,
        cache: AnswerCache,
        console: Console,
        lm_eval: LmEvalTasks | None = None,
    ) -> None:
        """With `lm_eval`, whose documents the split holds, prompter and judge have nothing to do."""
        self.study, self.genome, self.split = study, genome, split
        self.engine, self.prompter, self.judge = engine, prompter, judge
        self.ledger, self.console, self.lm_eval = ledger, console, lm_eval
        engine.limits.update(ledger.facts.get("limits", {}))
        assert isinstance(ledger.study.sampler, ReplayedCmaEs)
        self.sampler = ledger.study.sampler
        self.one_pass = OnePass(study, genome, engine, cache, ledger, self.sampler)
        self._in_one_pass: bool | None = None
        likelihood = (
            make_likelihood_part(engine, prompter, cache) if study.objective.likelihood else None
        )
        self.examiner = Examiner(
            engine,
            prompter,
            judge,
            cache,
            console,
            self._remember_limits,
            self.one_pass.spent,
            lm_eval,
            likelihood,
        )
        self.scorer = Scorer(study, task_shares(study, split), self._longest)
        self.rounds = Rounds(study, split.search, self.sampler, ledger, self.examiner, self.scorer)
        # of this run: a mended cause lets a study go on
        self._failures: Counter[tuple[int, int]] = Counter()
        self._began, self._before = time.monotonic(), float(ledger.facts.get("elapsed", 0.0))

    def run(self) -> dict[str, Any]:
        """References, generations, the mean, the choice, the verdict. Returns the verdict; raises
        what stops a run.
        """
        stale = self.ledger.release_stale()
        if stale:
            self.console.say(f"{stale} interrupted trial(s) are taken up again")
        if self.study.engine.population:
            self._one_pass()  # refused before any work where it cannot be
        self._references()
        self._warm_start()
        if (reason := self._why_stop()) is None:
            self.ledger.remember("stopped", None)
        while (reason := self._why_stop()) is None:
            self._next_candidate()
        if not self._candidates_done():
            raise StudyFileError(
                f"the search ended before its first candidate: {reason}",
                where="search",
                remedy="Raise the limit.",
            )
        self.console.say(f"the search ends: {reason}")
        self.ledger.remember("stopped", reason)
        self._mean()
        return self._verdict()

    def _next_candidate(self) -> None:
        done = self._candidates_done()
        slot = self.sampler.next_slot(self.ledger.trials())
        if self._failures[slot.generation, slot.index] >= MAX_ATTEMPTS:
            reason = next(r.reason for r in reversed(self.ledger.records()) if r.state == "failed")
            raise EngineError(
                f"{MAX_ATTEMPTS} candidates in a row failed: {reason}",
                remedy="Mend the cause and run the same command.",
            )
        self._trial(
            "candidate",
            slot=slot,
            label=f"gen {slot.generation + 1}  trial {done + 1}/{self.study.search.trials}",
        )

    def _why_stop(self) -> str | None:
        """Why no further candidate begins; convergence is looked at between generations only."""
        s, spent = (
            self.study.search,
            Spent(self._elapsed(), float(getattr(self.judge, "cost", 0.0))),
        )
        reason = why_stop(s, self._candidates_done(), spent)
        if reason is not None or (s.min_sigma is None and s.patience is None):
            return reason
        trials = self.ledger.trials()
        slot, complete = self.sampler.next_slot(trials), self.sampler.complete_generations(trials)
        if slot.index or not complete:
            return None
        found = [
            r for r in self.ledger.records() if r.role == "candidate" and r.state == "complete"
        ]
        generations = [[r for r in found if r.generation == g] for g in range(complete)]
        levels = task_levels(self.ledger.records(), self.study.metric)
        return why_converged(
            s, generations, self.sampler.sigma(trials, complete), levels, self.study.metric
        )

    def _references(self) -> None:
        """The parents and the uniform weights, each once."""
        wanted = self.genome.references(self.study.search.uniform)
        for i, (role, weights) in enumerate(wanted):
            if not self._has(role, weights):
                after = [(r, w) for r, w in wanted[i + 1 :] if not self._has(r, w)]
                self._trial(
                    role, weights=weights, label=f"{role} {i + 1}/{len(wanted)}", after=after
                )

    def _warm_start(self) -> None:
        """Gradient steps on the references' likelihood, each recorded; their outcome is where the
        first generation is drawn.
        """
        if self.study.search.warm_start is None or "start" in self.ledger.facts:
            return
        done = [warm_start.Step.from_dict(step) for step in self.ledger.facts.get("warm_start", [])]

        def record(step: warm_start.Step) -> None:
            done.append(step)
            self.ledger.remember("warm_start", [asdict(s) for s in done])
            self._tick()

        tasks, say = self.split.search, lambda line: self.console.status(f"warm start  {line}")
        start = warm_start.warm_start(
            self.engine, self.genome, tasks, self.prompter, self.study, list(done), record, say
        )
        # of the first steps; the rest of the scales is their form
        size = float(np.exp(np.log(start.scales).mean()))
        cov = self.sampler.start.cov * np.outer(start.scales, start.scales) / size**2
        begin = Distribution(np.array(start.mean), self.sampler.first_sigma * size, cov)
        remember_start(self.sampler, begin, self.ledger, first=True)

    def _mean(self) -> None:
        generation, mean = self.sampler.mean(self.ledger.trials())
        weights = tuple(float(w) for w in mean)
        if not generation:
            few = f"no generation of {self.sampler.population} is complete, so there is no distribution's mean"
            self.console.say(
                f"{few}: the best trial wins, and the best of few noisy trials is mostly lucky"
            )
        if generation and not self._has("mean", weights):
            self._trial(
                "mean", weights=weights, generation=generation, label="the distribution's mean"
            )

    def _trial(
        self,
        role: str,
        label: str,
        slot: Slot | None = None,
        weights: tuple[float, ...] | None = None,
        generation: int | None = None,
        after: Sequence[tuple[str, tuple[float, ...]]] | None = None,
    ) -> None:
        """Start, examine, record. A candidate whose answers fail becomes a failed trial; all else
        stops the run.

        `after` are the references that follow a reference.
        """
        fixed = None if weights is None else dict(zip(self.genome.names, weights, strict=True))
        trial = self.ledger.start(role, slot, fixed, generation)
        recipe = self.genome.decode([trial.params[name] for name in self.genome.names])
        try:
            if slot is None:
                examined = self.examiner.examine(
                    recipe, [self.split.search], label, upcoming=self._upcoming(None, after)
                )
            else:
                examined = self._examine_candidate(slot, recipe, label)
        except EngineError as error:
            self.ledger.fail(trial, str(error))
            if slot is not None:
                self._failures[slot.generation, slot.index] += 1
            if role != "candidate":
                raise
            self.console.say(f"{label}: failed: {error}")
            return
        levels = task_levels(self.ledger.records(), self.study.metric) if slot is not None else {}
        self.ledger.finish(trial, self.scorer.result(examined, levels))
        self._tick()
        self._progress(label, sum(examined.seconds.values()))

    def _examine_candidate(self, slot: Slot, recipe: Recipe, label: str) -> Examined:
        """On the tasks that its generation is ranked on, and after what must be known of the whole
        generation.
        """
        generation = slot.generation
        if self.lm_eval is not None:
            return self.examiner.examine(recipe, [self.split.search], label)
        mode = ONE_PASS if self._one_pass() else MERGED
        named = f"gen {generation + 1}"
        if mode == ONE_PASS:
            prompts = self.prompter.prepare([task.input for task in self.rounds.tasks(generation)])
            texts, own = [prompt.text for prompt in prompts], self.prompter.settings(prompts)
            self.one_pass.ahead(
                generation,
                texts,
                lambda line: self.console.status(f"{named}  in one pass  {line}", detail=True),
                own,
            )
        if self.rounds.together:
            self.rounds.prepare(
                generation,
                [self.genome.decode(v) for v in self.one_pass.vectors(generation)],
                mode,
                named,
            )
        blocks, grades = self.rounds.of(generation, recipe), self.rounds.grades(recipe)
        return self.examiner.examine(recipe, blocks, label, mode, self._upcoming(slot), grades)

    def _one_pass(self) -> bool:
        if self._in_one_pass is None:
            size = len(self.rounds.tasks(0))
            self._in_one_pass = self.study.search.ranking != "race" and self.one_pass.wanted(size)
        return self._in_one_pass

    def _upcoming(
        self, slot: Slot | None, after: Sequence[tuple[str, tuple[float, ...]]] | None = None
    ) -> Iterator[Item]:
        """What will be examined whatever the grades under way will be: the references that are left
        and then the first generation, or the rest of a candidate's generation, whose draws are
        independent; then, once the references are graded, those of them that stand in the verdict.
        """
        if not isinstance(self.judge, WaitingJudge) or self.lm_eval is not None:
            return
        yield from (
            (self.genome.decode(weights), self.split.search, MERGED) for _, weights in after or ()
        )
        if slot is not None and not self.rounds.together:
            mode = ONE_PASS if self._one_pass() else MERGED
            tasks = self.rounds.tasks(slot.generation)
            yield from (
                (recipe, tasks, mode) for recipe in self._draws(slot.generation, slot.index + 1)
            )
        elif (
            after is not None
            and not self.rounds.together
            and self.study.search.warm_start is None
            and not self._one_pass()
        ):
            tasks = self.rounds.tasks(0)
            yield from ((recipe, tasks, MERGED) for recipe in self._draws(0, 0))
        if after is None:
            yield from (
                (self.genome.decode(r.weights), self.split.held_out, MERGED)
                for r in self._fixed(self.ledger.records()).values()
            )

    def _draws(self, generation: int, first: int) -> Iterator[Recipe]:
        """The generation's candidates from a place on that are not finished, up to the last trial."""
        trials, size = self.ledger.trials(), self.sampler.population
        finished = {
            (r.generation, r.index)
            for r in self.ledger.records()
            if r.role == "candidate" and r.state == "complete"
        }
        for place in range(first, size):
            if (
                generation * size + place < self.study.search.trials
                and (generation, place) not in finished
            ):
                drawn = self.sampler.draw(trials, self.sampler.slot(trials, generation, place))
                yield self.genome.decode(tuple(float(x) for x in drawn))

    def _longest(self, task: Task) -> int:
        return self.prompter.prepare([task.input])[0].settings.max_new_tokens

    def _remember_limits(self, limits: Mapping[str, int]) -> None:
        """Memory has forced smaller batches: the study uses them from here on, also when it is
        resumed.
        """
        self.ledger.remember("limits", dict(limits))

    def _elapsed(self) -> float:
        """Seconds that the study has taken in all its runs."""
        return self._before + time.monotonic() - self._began

    def _tick(self) -> None:
        self.ledger.remember("elapsed", round(self._elapsed(), 3))

    def _choose(self, records: Sequence[TrialRecord]) -> TrialRecord:
        """The winner: by the validation tasks where the study keeps some aside, else by the search
        tasks.
        """
        metric, tasks = self.study.metric, self.split.validation
        if not tasks:
            return choose_winner(records, metric)
        scores = {
            r.number: r.score
            for r in records
            if r.role == "candidate" and r.state == "complete" and r.score is not None
        }
        means = [r.number for r in records if r.role == "mean" and r.state == "complete"]
        by_number = {r.number: r for r in records}
        names = {
            str(number): by_number[number]
            for number in finalists(scores, self.study.search.finalists)
        }
        names |= {"mean": by_number[means[-1]]} if means else {}
        recipes = [self.genome.decode(r.weights) for r in names.values()]
        grades = {}
        for i, name in enumerate(names):
            later: list[Item] = [(recipe, tasks, MERGED) for recipe in recipes[i + 1 :]]
            examined = self.examiner.examine(
                recipes[i], [tasks], f"validation: trial {names[name].number}", upcoming=later
            )
            grades[name] = metric_values(self.scorer.by_task(examined), metric)
        if not all(grades.values()):
            self.console.say(
                "no validation task is closed, so the winner is chosen on the search tasks"
            )
            return choose_winner(records, metric)
        chosen = names[choose(grades)]
        figures = {
            str(names[name].number): list(mean_and_error(list(values.values())))
            for name, values in grades.items()
        }
        n = len(next(iter(grades.values())))
        self.ledger.remember("validation", {"n": n, "means": figures, "winner": chosen.number})
        return chosen

    def _verdict(self) -> dict[str, Any]:
        """Examine the finalists on the held-out tasks; what was paid for before the run was cut
        comes from the cache.

        Each look at the held-out tasks is counted: a winner that is chosen after one look and shown
        in the next was not chosen blindly any more.
        """
        records, metric, before = self.ledger.records(), self.study.metric, self.ledger.facts
        known = before.get("verdict")
        compared = {"winner": self._choose(records)} | self._fixed(records)
        numbers = {name: record.number for name, record in compared.items()}
        if known and before.get("finalists") == numbers:
            verdict: dict[str, Any] = known
            return verdict
        tasks = self.split.held_out
        recipes = [self.genome.decode(r.weights) for r in compared.values()]
        examined = {
            name: self.examiner.examine(
                recipes[i],
                [tasks],
                f"verdict: {name}",
                upcoming=[(r, tasks, MERGED) for r in recipes[i + 1 :]],
            )
            for i, name in enumerate(compared)
        }
        held_out = {name: self.scorer.by_task(e) for name, e in examined.items()}
        if not metric_values(held_out["winner"], metric):
            raise StudyFileError(
                "no held-out task is closed",
                where="judge.metric",
                found=metric,
                remedy="Use grade.",
            )
        verdict = make_verdict(held_out, metric, self.study.search.seed, self.scorer.group)
        if self.lm_eval is None:
            # of a cascade; a judge that was fitted knows how far it agrees
            learned = getattr(self.judge, "cheap", self.judge)
            held = getattr(getattr(learned, "facts", None), "held_out", None)
            self.ledger.remember(
                "judge_report",
                judge_facts(self.judge.name, self.judge.version, tasks, examined, held or None),
            )
        self.ledger.remember("samples", samples(tasks, examined))
        looks = int(before.get("look", 1)) + 1 if known else 1
        # one write: they belong together
        self.ledger.remember("verdict", {"verdict": verdict, "finalists": numbers, "look": looks})
        return verdict

    def _fixed(self, records: Sequence[TrialRecord]) -> dict[str, TrialRecord]:
        """Whom the winner is compared with: known once the references are graded."""
        parents = {r.weights: r for r in records if r.role == "parent" and r.state == "complete"}
        fixed = {"base": parents[self.genome.parent(None)]} if self.genome.has_base else {}
        fixed |= {
            name: parents[self.genome.parent(m)]
            for m, name in enumerate(sibling_names(self.genome.siblings))
        }
        return fixed | {"uniform": best_uniform(records, self.genome.is_uniform)}

    def _has(self, role: str, weights: tuple[float, ...]) -> bool:
        return any(
            r.role == role and r.state == "complete" and r.weights == weights
            for r in self.ledger.records()
        )

    def _candidates_done(self) -> int:
        return sum(r.role == "candidate" and r.state == "complete" for r in self.ledger.records())

    def _progress(self, label: str, seconds: float) -> None:
        records = [
            r for r in self.ledger.records() if r.state == "complete" and r.score is not None
        ]
        best = max(records, key=lambda r: r.score or 0.0)
        paces = [sum(r.seconds.values()) for r in records[-20:]]
        # the mean and the verdict
        left = self.study.search.trials - sum(r.role == "candidate" for r in records) + 5
        eta = duration(left * float(np.mean(paces)))
        last = f"{records[-1].score:.3f}"
        self.console.status(
            f"{label}  {last}  best {best.score:.3f} ± {best.stderr:.3f} (#{best.number})  {seconds:.1f} s/candidate  ETA {eta}"
        )
