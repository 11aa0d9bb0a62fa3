"""A language model on any OpenAI-compatible server as a judge.

Answers are graded blind and on their own: a request holds a task and one answer, never who gave it,
and the order in which answers are sent is a hash. `submit` returns at once, so that a search merges
and answers meanwhile. A grade is the median of the votes that the server gave; where one is missing
there is no grade, and the run pauses.
"""

from __future__ import annotations

import json
import statistics
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from evomerge.answering.engine import Answer
from evomerge.errors import EvomergeError, JudgeError, JudgePaused
from evomerge.judging.grade import Grade
from evomerge.judging.llm.asker import Asker, Stopped, TooLong
from evomerge.judging.llm.budget import GOES_ON, Budget
from evomerge.judging.llm.grades_cache import GradesCache, Spent, grade_key
from evomerge.judging.llm.rubric import RUBRIC, Reading, Rubric, one_line, read_reply
from evomerge.study import JudgeSection
from evomerge.tasks import Task


class NoGrade(JudgePaused):
    """One answer got no grade that can be read."""


@dataclass(frozen=True)
class Job:
    """One vote on one answer, wanted."""

    key: str
    vote: int
    task: Task
    answer: Answer
    future: Future[Reading]


@dataclass(frozen=True)
class Pending:
    """The grades of some answers, on their way."""

    votes: list[dict[int, Future[Reading] | Reading]]  # by answer, by vote

    @property
    def _futures(self) -> list[Future[Reading]]:
        return [vote for votes in self.votes for vote in votes.values() if isinstance(vote, Future)]

    def done(self) -> bool:
        return all(future.done() for future in self._futures)

    def result(self) -> list[Grade]:
        """The grades, in the answers' order, when all are there. Raises JudgePaused and what else
        ends a run, after everything that was under way is kept.
        """
        futures = self._futures
        wait(futures)
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            fatal = next((e for e in errors if not isinstance(e, NoGrade | Stopped)), None)
            missing = [e for e in errors if isinstance(e, NoGrade)]
            if fatal is None and len(missing) > 1:
                raise NoGrade(
                    f"paused: {len(missing)} grades are missing; {missing[0].what.removeprefix('paused: ')}",
                    remedy=GOES_ON,
                )
            raise fatal or (missing[0] if missing else JudgePaused("paused", remedy=GOES_ON))
        return [
            _median([v.result() if isinstance(v, Future) else v for v in votes.values()])
            for votes in self.votes
        ]


class LlmJudge:
    """See the module. `close` it when done: what is under way is waited for and kept."""

    def __init__(
        self, section: JudgeSection, cache: Path | None = None, seed: int = 0, total: bool = True
    ) -> None:
        """`cache` None keeps the grades in memory. `total`: what earlier runs spent counts in the
        budget.

        Raises InputError, ModelError, OutputError; nothing is graded before the server has answered
        once.
        """
        self.section, self.seed = section, seed
        self.rubric = Rubric(section.template or RUBRIC)
        self.cache = GradesCache(cache)
        s = section
        before = self.cache.spent if total else Spent()
        self.budget = Budget(
            s.max_requests, s.max_tokens, s.max_cost, s.input_price, s.output_price, before
        )
        try:
            self.asker = Asker(section, self.budget, self.cache.put)
        except EvomergeError:
            self.cache.close()
            raise
        self.name = f"llm:{self.asker.model}"
        self.identity = json.dumps([self.asker.model, s.temperature, s.reply_tokens])
        self.version = sha256(
            json.dumps([self.identity, self.rubric.digest, s.votes]).encode()
        ).hexdigest()[:12]
        self.failure: EvomergeError | None = None  # the first that ended the run
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._wanted: dict[tuple[str, int], Future[Reading]] = {}  # queued or under way
        self._workers: list[threading.Thread] = []
        self._stop, self._lock = threading.Event(), threading.Lock()

    @property
    def spent(self) -> Spent:
        """What was asked so far, earlier runs included where the budget is a total."""
        return self.budget.spent

    @property
    def cost(self) -> float:
        """The same in the currency of the prices."""
        return self.budget.cost(self.budget.spent)

    def grade(self, task: Task, answer: Answer) -> Grade:
        """Grade one answer. Raises as `Pending.result`."""
        return self.grade_all([task], [answer])[0]

    def grade_all(self, tasks: Sequence[Task], answers: Sequence[Answer]) -> list[Grade]:
        """Grade answers, `concurrency` at once; after a failure it is a new attempt. Raises as
        `Pending.result`.
        """
        with self._lock:
            if not self._wanted:
                self._stop.clear()
                self.failure = None
        return self.submit(tasks, answers).result()

    def submit(self, tasks: Sequence[Task], answers: Sequence[Answer]) -> Pending:
        """Ask for the grades that are not there yet. Raises what has ended the run, if it has."""
        if self.failure is not None:
            raise self.failure
        keys = [
            grade_key(self.identity, self.rubric.digest, t, a)
            for t, a in zip(tasks, answers, strict=True)
        ]
        votes: list[dict[int, Future[Reading] | Reading]] = [{} for _ in keys]
        jobs: list[Job] = []
        with self._lock:
            for i, (key, found) in enumerate(
                zip(keys, self.cache.get(keys, self.section.votes), strict=True)
            ):
                for vote in range(self.section.votes):
                    if (future := self._wanted.get((key, vote))) is not None or (
                        reading := found.get(vote)
                    ) is None:
                        if future is None:
                            future = self._wanted[key, vote] = Future()
                            jobs.append(Job(key, vote, tasks[i], answers[i], future))
                        votes[i][vote] = future
                    else:
                        votes[i][vote] = reading
            for job in sorted(
                jobs, key=lambda job: sha256(f"{self.seed}/{job.vote}/{job.key}".encode()).digest()
            ):
                self._jobs.put(job)
            while len(self._workers) < min(self.section.concurrency, len(self._wanted)):
                # daemons: Ctrl-C waits for no server
                self._workers.append(threading.Thread(target=self._work, daemon=True))
                self._workers[-1].start()
        return Pending(votes)

    def close(self, drain: bool = True) -> None:
        """Nothing new is asked. `drain` waits for the requests under way, whose grades are paid
        for.
        """
        self._stop.set()
        for _ in self._workers:
            self._jobs.put(None)
        if drain:
            for worker in self._workers:
                worker.join()
            self.cache.close()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            done: Callable[[Any], None]
            outcome: Any
            try:
                done, outcome = job.future.set_result, self._vote(job)
            except Stopped as error:
                done, outcome = job.future.set_exception, self.failure or error
            except EvomergeError as error:
                done, outcome = job.future.set_exception, error
            except Exception as error:  # a worker must not end without a word
                done, outcome = (
                    job.future.set_exception,
                    JudgeError(f"{type(error).__name__}: {error}", where=self.name, remedy=GOES_ON),
                )
            with self._lock:
                if isinstance(outcome, EvomergeError) and not isinstance(outcome, NoGrade):
                    self.failure = self.failure or outcome
                    self._stop.set()
                del self._wanted[job.key, job.vote]
            done(outcome)

    def _vote(self, job: Job) -> Reading:
        """Ask until a reply can be read; every cost is kept, and the vote with the cost of its own
        request.
        """
        text = ""
        for ask in range(self.section.asks):
            messages = self.rubric.messages(
                job.task, job.answer.text, job.answer.truncated, again=ask > 0
            )
            seed = job.vote + ask * self.section.votes
            try:
                # the first vote as without votes
                reply = self.asker.ask(messages, seed or None, self._stop)
            except TooLong as error:
                raise NoGrade(
                    f"paused: task {job.task.task_id} with its answer is too long for the judge: {error}",
                    where=self.name,
                    remedy=f"Give the server a longer context, or lower judge.reply_tokens. {GOES_ON}",
                ) from error
            reading, text = read_reply(reply.text), reply.text
            self.cache.put(reply.cost, job.key, job.vote, reading)
            if reading is not None:
                return reading
        raise NoGrade(
            f"paused: no grade can be read in {self.section.asks} replies on task {job.task.task_id}",
            where=self.name,
            found=one_line(text, 60),
            remedy=f"It has no grade. {GOES_ON}",
        )


def _median(readings: Sequence[Reading]) -> Grade:
    """The votes' median with the reason of a vote next to it."""
    value = float(statistics.median(reading.grade for reading in readings))
    nearest = min(readings, key=lambda reading: abs(reading.grade - value))
    votes = (
        f"votes {', '.join(str(reading.grade) for reading in readings)}: "
        if len(readings) > 1
        else ""
    )
    return Grade(value, None, votes + nearest.reason)
