"""A language model on any OpenAI-compatible server as a judge.

Answers are graded blind and one by one: a request holds a task and one answer, never the model it
came from, and the order in which answers are sent is a hash. `submit` returns immediately, so that
a search can merge and answer in the meantime. A grade is the median of the votes that the server
gave; if one is missing, there is no grade, and the run pauses.
"""

from __future__ import annotations

import json
import logging
import statistics
import threading
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from queue import SimpleQueue
from typing import TypeAlias

from evomerge.answering.engine import Answer
from evomerge.errors import EvomergeError, JudgeError, JudgePaused
from evomerge.judging.grade import Grade
from evomerge.judging.llm.budget import GOES_ON, Budget
from evomerge.judging.llm.grades_cache import GradesCache, Usage, grade_key
from evomerge.judging.llm.judge_client import JudgeClient, Refused, Reply, Stopped, TooLong
from evomerge.judging.llm.judge_prompt import RUBRIC, Rubric, Vote, one_line, read_vote, shorter
from evomerge.study import JudgeSection
from evomerge.tasks import Task

log = logging.getLogger(__name__)
REFUSED = "refused by the judge's server"

Votes: TypeAlias = "dict[int, Future[Vote] | Vote]"  # by the vote's number: pending or received


class NoGrade(JudgePaused):
    """No readable grade of one answer was received."""


@dataclass(frozen=True)
class VoteRequest:
    """One vote on one answer, still to be given."""

    key: str
    number: int
    task: Task
    answer: Answer
    future: Future[Vote]

    def order(self, seed: int) -> bytes:
        """Its place in the queue: a hash, so that the order carries no information."""
        return sha256(f"{seed}/{self.number}/{self.key}".encode()).digest()


@dataclass(frozen=True)
class PendingVotes:
    """Grades of some answers, some still missing; `votes` are by answer."""

    votes: list[Votes]

    @property
    def _futures(self) -> list[Future[Vote]]:
        found = []
        for votes in self.votes:
            for vote in votes.values():
                if isinstance(vote, Future):
                    found.append(vote)
        return found

    def done(self) -> bool:
        """Whether every vote has arrived, or never will."""
        return all(future.done() for future in self._futures)

    def result(self) -> list[Grade]:
        """Wait for all grades, in the order of the answers.

        Raises JudgePaused and whatever else ends a run, after all that was running is stored.
        """
        futures = self._futures
        wait(futures)
        errors = [future.exception() for future in futures]
        _raise_first([error for error in errors if error is not None])
        grades = []
        for votes in self.votes:
            given = [v.result() if isinstance(v, Future) else v for v in votes.values()]
            grades.append(_median(given))
        return grades


class LlmJudge:
    """See the module. `close` it when done: running requests are waited for, their votes kept."""

    def __init__(
        self, section: JudgeSection, cache: Path | None = None, seed: int = 0, total: bool = True
    ) -> None:
        """The grades are kept in memory if `cache` is None.

        `total`: what earlier runs spent counts towards the budget. Raises InputError, ModelError,
        OutputError; nothing is graded before the server has replied once.
        """
        self.section, self.seed = section, seed
        self.rubric = Rubric(section.template or RUBRIC)
        self.cache = GradesCache(cache)
        s = section
        before = Usage()
        if total:
            before = self.cache.spent
        self.budget = Budget(
            s.max_requests, s.max_tokens, s.max_cost, s.input_price, s.output_price, before
        )
        try:
            self.client = JudgeClient(section, self.budget, self.cache.put)
        except EvomergeError:
            self.cache.close()
            raise
        self.name = f"llm:{self.client.model}"
        self.identity = json.dumps([self.client.model, s.temperature, s.reply_tokens])
        identity = json.dumps([self.identity, self.rubric.digest, s.votes])
        self.version = sha256(identity.encode()).hexdigest()[:12]
        self.refused = 0  # answers that the server has refused
        self.failure: EvomergeError | None = None  # the first error, which ended the run
        self._queue: SimpleQueue[VoteRequest | None] = SimpleQueue()
        self._wanted: dict[tuple[str, int], Future[Vote]] = {}  # queued or running
        self._workers: list[threading.Thread] = []
        self._stop, self._lock = threading.Event(), threading.Lock()

    @property
    def spent(self) -> Usage:
        """What was used so far, including earlier runs where the budget is a total."""
        return self.budget.spent

    @property
    def cost(self) -> float:
        """What was spent, in the currency of the prices."""
        return self.budget.cost(self.budget.spent)

    def grade(self, task: Task, answer: Answer) -> Grade:
        """Grade one answer. Raises as `PendingVotes.result`."""
        return self.grade_all([task], [answer])[0]

    def grade_all(self, tasks: Sequence[Task], answers: Sequence[Answer]) -> list[Grade]:
        """Grade answers, `concurrency` at a time. Raises as `PendingVotes.result`.

        After a failure this is a new attempt.
        """
        with self._lock:
            if not self._wanted:
                self._stop.clear()
                self.failure = None
        return self.submit(tasks, answers).result()

    def submit(self, tasks: Sequence[Task], answers: Sequence[Answer]) -> PendingVotes:
        """Request the grades that are not stored yet. Raises what has ended the run, if any."""
        if self.failure is not None:
            raise self.failure
        keys = []
        for task, answer in zip(tasks, answers, strict=True):
            keys.append(grade_key(self.identity, self.rubric.digest, task, answer))
        votes: list[Votes] = []
        requests: list[VoteRequest] = []
        with self._lock:
            stored = self.cache.get(keys, self.section.votes)
            for key, found, task, answer in zip(keys, stored, tasks, answers, strict=True):
                own: Votes = {}
                for number in range(self.section.votes):
                    future = self._wanted.get((key, number))
                    if future is None and number in found:
                        own[number] = found[number]
                        continue
                    if future is None:
                        future = self._wanted[key, number] = Future()
                        requests.append(VoteRequest(key, number, task, answer, future))
                    own[number] = future
                votes.append(own)
            for request in sorted(requests, key=lambda request: request.order(self.seed)):
                self._queue.put(request)
            while len(self._workers) < min(self.section.concurrency, len(self._wanted)):
                worker = threading.Thread(target=self._work, daemon=True)  # Ctrl-C must not wait
                self._workers.append(worker)
                worker.start()
        return PendingVotes(votes)

    def close(self, drain: bool = True) -> None:
        """Send no further request. `drain` waits for running ones, which cost money already."""
        self._stop.set()
        for _ in self._workers:
            self._queue.put(None)
        if drain:
            for worker in self._workers:
                worker.join()
            self.cache.close()

    def _work(self) -> None:
        while (request := self._queue.get()) is not None:
            outcome = self._outcome(request)
            with self._lock:
                if isinstance(outcome, EvomergeError) and not isinstance(outcome, NoGrade):
                    self.failure = self.failure or outcome
                    self._stop.set()
                del self._wanted[request.key, request.number]
            if isinstance(outcome, Vote):
                request.future.set_result(outcome)
            else:
                request.future.set_exception(outcome)

    def _outcome(self, request: VoteRequest) -> Vote | Exception:
        """The vote, or why there is none."""
        try:
            return self._vote(request)
        except Stopped as error:
            return self.failure or error
        except EvomergeError as error:
            return error
        except Exception as error:  # a thread must not end without a message
            what = f"{type(error).__name__}: {error}"
            return JudgeError(what, where=self.name, remedy=GOES_ON)

    def _vote(self, request: VoteRequest) -> Vote:
        """Ask until a reply can be read; the usage of every request is stored, with its vote."""
        text = ""
        for ask in range(self.section.asks):
            seed = request.number + ask * self.section.votes
            try:
                # 0, the first vote's, is not sent: it is the request of a judge without votes
                reply = self._reply(request, ask > 0, seed or None)
            except Refused as refusal:
                return self._lowest(request, str(refusal))
            text = reply.text
            vote = read_vote(text)
            self.cache.put(reply.usage, request.key, request.number, vote)
            if vote is not None:
                return vote
        raise NoGrade(
            f"paused: no grade could be read from {self.section.asks} replies on task "
            f"{request.task.task_id}",
            where=self.name,
            found=one_line(text, 60),
            remedy=f"The answer has no grade. {GOES_ON}",
        )

    def _reply(self, request: VoteRequest, again: bool, seed: int | None) -> Reply:
        """The reply on an answer, or on half of it, and so on, where the server has no more room.

        Raises Refused, NoGrade: the task itself is too long.
        """
        task, shown, cut = request.task, request.answer.text, request.answer.truncated
        while True:
            messages = self.rubric.messages(task, shown, cut, again)
            try:
                return self.client.ask(messages, seed, self._stop, self.rubric.shortest)
            except TooLong as error:
                if not shown:
                    raise NoGrade(
                        f"paused: task {task.task_id} is too long for the judge: {error}",
                        where=self.name,
                        remedy="Give the server a longer context, or lower judge.reply_tokens. "
                        + GOES_ON,
                    ) from error
            shown, cut = shorter(shown), True

    def _lowest(self, request: VoteRequest, why: str) -> Vote:
        """The vote on an answer that the server refuses; the first one is reported."""
        with self._lock:
            self.refused += 1
            first = self.refused == 1
        if first:
            what = "%s refuses the answer to task %s (%s): refused answers get the lowest grade"
            log.warning(what, self.name, request.task.task_id, why)
        return Vote.lowest(f"{REFUSED}: {why}")


def _raise_first(errors: Sequence[BaseException]) -> None:
    """Raise what ended the run, else that grades are missing, else that it was stopped."""
    if not errors:
        return
    for error in errors:
        if not isinstance(error, NoGrade | Stopped):
            raise error
    missing = [error for error in errors if isinstance(error, NoGrade)]
    if not missing:
        raise JudgePaused("paused", remedy=GOES_ON)
    if len(missing) == 1:
        raise missing[0]
    reason = missing[0].what.removeprefix("paused: ")
    raise NoGrade(f"paused: {len(missing)} grades are missing; {reason}", remedy=GOES_ON)


def _median(votes: Sequence[Vote]) -> Grade:
    """The median of the votes, with the reason of a vote closest to it."""
    value = float(statistics.median(vote.grade for vote in votes))
    nearest = min(votes, key=lambda vote: abs(vote.grade - value))
    if len(votes) == 1:
        return Grade(value, None, nearest.reason)
    listed = ", ".join(str(vote.grade) for vote in votes)
    return Grade(value, None, f"votes {listed}: {nearest.reason}")
