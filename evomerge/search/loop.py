"""The loop: the only place where genome, merging, answering, judging and the study meet.

ask -> decode -> apply -> answer -> judge -> score -> record -> tell; then the verdict on the held-out tasks.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.answering.cache import MERGED, AnswerCache, answer_all
from evomerge.answering.engine import Answer, Engine
from evomerge.answering.lm_eval_tasks import LmEvalTasks
from evomerge.answering.pace import Pace
from evomerge.answering.prompts import Prompter
from evomerge.console import Console, duration
from evomerge.errors import EngineError, StudyFileError
from evomerge.genome import Genome
from evomerge.judging.grade import Grade, Judge, WaitingJudge
from evomerge.recipe import Recipe
from evomerge.search.ahead import Ahead, Begun, Item
from evomerge.search.ledger import Ledger, Result, TrialRecord
from evomerge.search.one_pass import MODE as ONE_PASS
from evomerge.search.one_pass import OnePass
from evomerge.search.sampler import ReplayedCmaEs, Slot
from evomerge.search.verdict import best_uniform, choose_winner, make_verdict, mean_and_error, metric_values
from evomerge.study import Study
from evomerge.tasks import Split, Task

SAMPLE_CHARACTERS = 600  # of each text kept for the report
MAX_ATTEMPTS = 3  # failures at one place of a generation before the run stops


@dataclass(frozen=True)
class Examined:
    """What one recipe did on some tasks."""

    answers: list[Answer]
    grades: list[Grade]
    seconds: dict[str, float]
    tokens_per_second: float | None = None  # None: every answer was paid for before
    figure: str = "grade"  # what a grade's value is called: a judge's grade, or a document's part of lm-eval's score

    def by_task(self, tasks: Sequence[Task]) -> dict[str, dict[str, Any]]:
        """task_id -> grade (or score), correct, truncated."""
        return {
            str(task.task_id): {self.figure: grade.value, "correct": grade.correct, "truncated": answer.truncated}
            for task, answer, grade in zip(tasks, self.answers, self.grades, strict=True)
        }


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
        self.lm_eval = lm_eval
        self.study, self.genome, self.split = study, genome, split
        self.engine, self.prompter, self.judge = engine, prompter, judge
        self.ledger, self.cache, self.console = ledger, cache, console
        engine.limits.update(ledger.facts.get("limits", {}))
        assert isinstance(ledger.study.sampler, ReplayedCmaEs)
        self.sampler = ledger.study.sampler
        self.one_pass = OnePass(study, genome, engine, cache, ledger, self.sampler)
        self._in_one_pass: bool | None = None
        self.ahead = Ahead()

    def run(self) -> dict[str, Any]:
        """References, generations, the mean, the verdict. Returns the verdict; raises what stops a run."""
        stale = self.ledger.release_stale()
        if stale:
            self.console.say(f"{stale} interrupted trial(s) are taken up again")
        if self.study.engine.population:
            self._one_pass()  # refused before any work where it cannot be
        self._references()
        while (done := self._candidates_done()) < self.study.search.trials:
            slot = self.sampler.next_slot(self.ledger.trials())
            if slot.attempt >= MAX_ATTEMPTS:
                reason = next(r.reason for r in reversed(self.ledger.records()) if r.state == "failed")
                raise EngineError(f"{MAX_ATTEMPTS} candidates in a row failed: {reason}", remedy="Mend the cause and run the same command.")
            self._trial("candidate", slot=slot, label=f"gen {slot.generation + 1}  trial {done + 1}/{self.study.search.trials}")
        self._mean()
        return self._verdict()

    def _references(self) -> None:
        """The parents and the uniform weights, each once."""
        wanted = self.genome.references(self.study.search.uniform)
        for i, (role, weights) in enumerate(wanted):
            if not self._has(role, weights):
                after = [(r, w) for r, w in wanted[i + 1 :] if not self._has(r, w)]
                self._trial(role, weights=weights, label=f"{role} {i + 1}/{len(wanted)}", after=after)

    def _mean(self) -> None:
        generation, mean = self.sampler.mean(self.ledger.trials())
        weights = tuple(float(w) for w in mean)
        if generation and not self._has("mean", weights):
            self._trial("mean", weights=weights, generation=generation, label="the distribution's mean")

    def _trial(
        self,
        role: str,
        label: str,
        slot: Slot | None = None,
        weights: tuple[float, ...] | None = None,
        generation: int | None = None,
        after: Sequence[tuple[str, tuple[float, ...]]] | None = None,
    ) -> None:
        """Start, examine, record. A candidate whose answers fail becomes a failed trial; all else stops the run.

        `after` are the references that follow a reference.
        """
        fixed = None if weights is None else dict(zip(self.genome.names, weights, strict=True))
        trial = self.ledger.start(role, slot, fixed, generation)
        vector = [trial.params[name] for name in self.genome.names]
        try:
            mode = self._answer_generation(slot) if slot is not None else MERGED
            examined = self.examine(self.genome.decode(vector), self.split.search, label, mode, self._upcoming(slot, after, mode))
        except EngineError as error:
            self.ledger.fail(trial, str(error))
            if role != "candidate":
                raise
            self.console.say(f"{label}: failed: {error}")
            return
        self.ledger.finish(trial, self._result(examined))
        self._progress(label, sum(examined.seconds.values()))

    def _answer_generation(self, slot: Slot) -> str:
        """Let the whole generation answer in one pass, where that is wanted. The mode in which its answers are kept."""
        if self.lm_eval is not None:
            return MERGED
        if not self._one_pass():
            return MERGED
        prompts = [self.prompter.render(task.input) for task in self.split.search]
        label = f"gen {slot.generation + 1}  in one pass"
        self.one_pass.ahead(slot.generation, prompts, lambda line: self.console.status(f"{label}  {line}", detail=True))
        return ONE_PASS

    def _one_pass(self) -> bool:
        if self._in_one_pass is None:
            self._in_one_pass = self.one_pass.wanted(len(self.split.search))
        return self._in_one_pass

    def _upcoming(self, slot: Slot | None, after: Sequence[tuple[str, tuple[float, ...]]] | None, mode: str) -> Iterator[Item]:
        """What will be examined whatever the grades under way will be: the references that are left and then the first
        generation, or the rest of a candidate's generation, whose draws are independent; then, once the references are
        graded, those of them that stand in the verdict."""
        if not isinstance(self.judge, WaitingJudge) or self.lm_eval is not None:
            return
        yield from ((self.genome.decode(weights), self.split.search, mode) for _, weights in after or ())
        if slot is not None:
            yield from ((recipe, self.split.search, mode) for recipe in self._draws(slot.generation, slot.index + 1))
        elif after is not None and not self._one_pass():  # which answers in another mode
            yield from ((recipe, self.split.search, mode) for recipe in self._draws(0, 0))
        if after is None:
            yield from ((self.genome.decode(r.weights), self.split.held_out, MERGED) for r in self._fixed(self.ledger.records()).values())

    def _draws(self, generation: int, first: int) -> Iterator[Recipe]:
        """The generation's candidates from a place on that are not finished, up to the last trial."""
        trials, size = self.ledger.trials(), self.sampler.population
        finished = {(r.generation, r.index) for r in self.ledger.records() if r.role == "candidate" and r.state == "complete"}
        for place in range(first, size):
            if generation * size + place < self.study.search.trials and (generation, place) not in finished:
                drawn = self.sampler.draw(trials, self.sampler.slot(trials, generation, place))
                yield self.genome.decode(tuple(float(x) for x in drawn))

    def examine(
        self, recipe: Recipe, tasks: Sequence[Task], label: str = "", mode: str = MERGED, upcoming: Iterable[Item] = ()
    ) -> Examined:
        """Merge, answer, judge. Merging is skipped when every answer is already paid for.

        While a judge is waited for, what is `upcoming` is begun.
        """
        if self.lm_eval is not None:
            return self._examine_lm_eval(self.lm_eval, recipe, tasks, label)
        begun = self.ahead.take((recipe, tasks, mode), lambda item: self._begin(item, label))
        self.ahead.while_waiting(begun, iter(upcoming), lambda item: self._begin(item, f"{label}, ahead"))
        grades = begun.wait()
        seconds = {phase: round(s, 4) for phase, s in begun.seconds.items()}
        return Examined(begun.answers, grades, seconds, tokens_per_second=begun.tokens_per_second)

    def _begin(self, item: Item, label: str) -> Begun:
        """Merge and answer; each batch of answers goes to the judge when it is there."""
        recipe, tasks, mode = item
        begun = Begun(self.judge, tasks)

        def apply() -> None:
            began = time.perf_counter()
            self.engine.apply(recipe)
            begun.seconds["merge"] = time.perf_counter() - began

        began = time.perf_counter()
        prompts = [self.prompter.render(task.input) for task in tasks]
        pace = Pace(len(tasks), lambda line: self.console.status(f"{label}  {line}", detail=True))
        begun.answers = answer_all(self.engine, self.cache, recipe.digest(), prompts, apply, pace, self._remember_limits, mode, begun.got)
        spent = time.perf_counter() - began - begun.seconds["merge"] - begun.seconds["judge"]
        shared = self.one_pass.spent(recipe)
        begun.seconds["answer"] = spent + shared
        begun.tokens_per_second = pace.rate if not shared else sum(answer.tokens for answer in begun.answers) / shared
        return begun

    def _examine_lm_eval(self, lm_eval: LmEvalTasks, recipe: Recipe, tasks: Sequence[Task], label: str) -> Examined:
        """Merge and let lm-eval ask and score."""
        merging = 0.0

        def apply() -> None:
            nonlocal merging
            began = time.perf_counter()
            self.engine.apply(recipe)
            merging = round(time.perf_counter() - began, 4)

        def progress(n: int) -> None:
            self.console.status(f"{label}  answered {n}/{len(tasks)}", detail=True)

        began = time.perf_counter()
        outcomes = lm_eval.examine(recipe.digest(), tasks, self.cache, apply, progress)
        seconds = {"merge": merging, "answer": round(time.perf_counter() - began - merging, 4), "judge": 0.0}
        parts = [Grade(score, None, str(o.values)) for score, o in zip(lm_eval.scores(tasks, outcomes), outcomes, strict=True)]
        return Examined([o.answer for o in outcomes], parts, seconds, figure="score")

    def _remember_limits(self, limits: Mapping[str, int]) -> None:
        """Memory has forced smaller batches: the study uses them from here on, also when it is resumed."""
        self.ledger.remember("limits", dict(limits))

    def _result(self, examined: Examined) -> Result:
        grades = examined.by_task(self.split.search)
        values = list(metric_values(grades, self.study.judge.metric).values())
        if not values:
            raise StudyFileError(
                "no search task is closed, so none can be right or wrong", where="judge.metric", found="correct", remedy="Use grade."
            )
        score, error = mean_and_error(values)
        cut = float(np.mean([answer.truncated for answer in examined.answers]))
        tokens = sum(answer.tokens for answer in examined.answers)
        return Result(score, error, len(values), cut, examined.seconds, grades, tokens, examined.tokens_per_second)

    def _verdict(self) -> dict[str, Any]:
        """Examine the finalists on the held-out tasks; what was paid for before the run was cut comes from the cache."""
        records = self.ledger.records()
        metric = self.study.judge.metric
        finalists = self._finalists(records)
        before = self.ledger.facts
        numbers = {name: record.number for name, record in finalists.items()}
        if before.get("verdict") and before.get("finalists") == numbers:
            verdict: dict[str, Any] = before["verdict"]
            return verdict
        tasks = self.split.held_out
        recipes = [self.genome.decode(r.weights) for r in finalists.values()]
        examined = {
            name: self.examine(recipes[i], tasks, f"verdict: {name}", upcoming=[(r, tasks, MERGED) for r in recipes[i + 1 :]])
            for i, name in enumerate(finalists)
        }
        held_out = {name: e.by_task(tasks) for name, e in examined.items()}
        if not metric_values(held_out["winner"], metric):
            raise StudyFileError("no held-out task is closed", where="judge.metric", found=metric, remedy="Use grade.")
        verdict = make_verdict(held_out, metric, self.study.search.seed)
        self.ledger.remember("samples", samples(tasks, examined))
        self.ledger.remember("finalists", numbers)
        self.ledger.remember("verdict", verdict)
        return verdict

    def _finalists(self, records: Sequence[TrialRecord]) -> dict[str, TrialRecord]:
        return {"winner": choose_winner(records, self.study.judge.metric)} | self._fixed(records)

    def _fixed(self, records: Sequence[TrialRecord]) -> dict[str, TrialRecord]:
        """Whom the winner is compared with: known once the references are graded."""
        parents = {r.weights: r for r in records if r.role == "parent" and r.state == "complete"}
        fixed = {"base": parents[self.genome.parent(None)]} if self.genome.has_base else {}
        fixed |= {name: parents[self.genome.parent(m)] for m, name in enumerate(sibling_names(self.genome.siblings))}
        return fixed | {"uniform": best_uniform(records, self.genome.is_uniform)}

    def _has(self, role: str, weights: tuple[float, ...]) -> bool:
        return any(r.role == role and r.state == "complete" and r.weights == weights for r in self.ledger.records())

    def _candidates_done(self) -> int:
        return sum(r.role == "candidate" and r.state == "complete" for r in self.ledger.records())

    def _progress(self, label: str, seconds: float) -> None:
        records = [r for r in self.ledger.records() if r.state == "complete" and r.score is not None]
        best = max(records, key=lambda r: r.score or 0.0)
        paces = [sum(r.seconds.values()) for r in records[-20:]]
        left = self.study.search.trials - sum(r.role == "candidate" for r in records) + 5  # the mean and the verdict
        eta = duration(left * float(np.mean(paces)))
        last = f"{records[-1].score:.3f}"
        self.console.status(
            f"{label}  {last}  best {best.score:.3f} ± {best.stderr:.3f} (#{best.number})  {seconds:.1f} s/candidate  ETA {eta}"
        )


def samples(tasks: Sequence[Task], examined: Mapping[str, Examined], limit: int = 12) -> list[dict[str, Any]]:
    """Held-out answers side by side, those first on which the candidates' grades differ most; long texts are cut."""

    def spread(i: int) -> float:
        grades = [e.grades[i].value for e in examined.values()]
        return max(grades) - min(grades)

    def text(value: str) -> str:
        return value if len(value) <= SAMPLE_CHARACTERS else value[:SAMPLE_CHARACTERS] + " …"

    order = sorted(range(len(tasks)), key=lambda i: (-spread(i), i))[:limit]
    return [
        {
            "task_id": tasks[i].task_id,
            "input": text(tasks[i].input),
            "reference": text(tasks[i].output),
            "answers": {name: {"text": text(e.answers[i].text), "grade": e.grades[i].value} for name, e in examined.items()},
        }
        for i in order
    ]


def sibling_names(siblings: Sequence[str]) -> list[str]:
    """What the siblings are called in a verdict: "instruct" alone, else "sibling:NAME" by folder name."""
    if len(siblings) == 1:
        return ["instruct"]
    stems = [Path(ref).name for ref in siblings]
    return [f"sibling:{stem}" if stems.count(stem) == 1 else f"sibling:{stem}-{i}" for i, stem in enumerate(stems)]


def cache_scope(study: Study, models: Mapping[str, Any]) -> str:
    """All that answers depend on beside recipe, mode and prompts: a batch is known by its prompts, however it was packed."""
    data = study.to_dict()
    engine = {key: value for key, value in data["engine"].items() if key not in ("batch_size", "batch_tokens", "residency")}
    parts = [data["generation"], data["prompt"]["too_long"], engine, data["search"]["dtype"], data["search"]["seed"], models]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
