"""lm-eval's documents as tasks: the same for every candidate, with the weight of each.

A document is a Task with the id "NAME/number". What is optimised is the weighted mean of the tasks'
metrics: each document's value is scaled so that the plain mean of all of them is that
(`LmEvalTasks.scores`).
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evomerge.answering.engine import Answer
from evomerge.answering.lm_eval.objectives import Objective, load_objectives
from evomerge.errors import TaskError
from evomerge.tasks import Split, Task

if TYPE_CHECKING:
    from evomerge.study import Study


@dataclass(frozen=True)
class Outcome:
    """One document's response, and the value of each "metric,filter" that some objective uses."""

    answer: Answer
    values: dict[str, float]


class LmEvalTasks:
    """The documents of a study's lm-eval tasks. A leaf is one of lm-eval's single tasks."""

    def __init__(self, study: Study) -> None:
        """Raises InputError without lm-eval, TaskError for an unknown task, metric or dataset."""
        self.study = study
        self.leaves, self.objectives, self.warnings = load_objectives(study)
        self.documents: dict[str, list[int]] = {}  # leaf -> numbers
        self.configs: dict[str, str] = {}  # leaf -> hash of its settings
        self.numbers: dict[str, int] = {}  # task key -> number of its document in its leaf
        tasks = []
        for name, leaf in self.leaves.items():
            self.configs[name] = digest(leaf.dump_config())
            self.documents[name] = self._chosen(name, len(leaf.eval_docs))
            for number in self.documents[name]:
                task = self._task(name, leaf, number)
                self.numbers[task.key] = number
                tasks.append(task)
        self.tasks = tuple(tasks)

    def _chosen(self, name: str, n: int) -> list[int]:
        """The first `limit` of n documents, or with `shuffle` random ones, the same for all."""
        limit = self.study.limit
        if limit is None or limit >= n:
            return list(range(n))
        if not self.study.shuffle:
            return list(range(limit))
        return sorted(random.Random(f"{self.study.split.seed}/{name}").sample(range(n), limit))

    def _task(self, name: str, leaf: Any, number: int) -> Task:
        document = leaf.eval_docs[number]
        shown, target = leaf.doc_to_text(document), leaf.doc_to_target(document)
        if not isinstance(shown, str) or not shown.strip():
            shown = as_json(document)
        if not isinstance(target, str):
            target = as_json(target)
        rules = "; ".join(f"{o.weight:g} x {o.metric}" for o in self.of(name))
        aspect = (
            f"{rules}; lm-eval {version()}, task {self.configs[name]}, document {digest(document)}"
        )
        return Task(f"{name}/{number}", shown, target, aspect, name)

    def of(self, name: str) -> list[Objective]:
        """The objectives that a leaf's documents count for."""
        return [o for o in self.objectives if name in o.leaves]

    def metrics(self, name: str) -> set[str]:
        """Each "metric,filter" that some objective uses on a leaf's documents."""
        return {o.metric for o in self.of(name)}

    def coefficients(self, tasks: Sequence[Task]) -> dict[str, dict[str, float]]:
        """leaf -> metric -> factor of a document's metric; the plain mean over `tasks` is the score

            sum_o weight_o m_o / sum_o |weight_o|,    m_o: objective o's metric over its documents
            among `tasks`.

        Raises TaskError when an objective has none among them.
        """
        counts = Counter(task.kind for task in tasks)
        scale = len(tasks) / sum(abs(o.weight) for o in self.objectives)
        result: dict[str, dict[str, float]] = {name: {} for name in self.leaves}
        for o in self.objectives:
            pool = sum(counts[name] for name in o.leaves)
            empty = [name for name in o.leaves if not counts[name]]
            if pool == 0 or (empty and not o.pooled):
                raise TaskError(
                    "too few documents for both search and verdict",
                    where=f"task {o.name if pool == 0 else empty[0]}",
                    remedy="Raise `limit`, or move split.held_out closer to 0.5.",
                )
            for name in o.leaves:
                share = pool if o.pooled else counts[name] * len(o.leaves)
                if share:
                    known = result[name].get(o.metric, 0.0)
                    result[name][o.metric] = known + scale * o.weight / share
        return result

    def check_split(self, split: Split) -> None:
        """Raise TaskError when search or verdict lacks documents of some task."""
        for part in (split.search, split.held_out):
            self.coefficients(part)

    def scores(self, tasks: Sequence[Task], outcomes: Sequence[Outcome]) -> list[float]:
        """One value per document; their plain mean is the candidate's score."""
        by_leaf = self.coefficients(tasks)
        scores = []
        for task, outcome in zip(tasks, outcomes, strict=True):
            score = 0.0
            for metric, factor in by_leaf[task.kind].items():
                score += factor * outcome.values[metric]
            scores.append(score)
        return scores


def as_json(value: Any) -> str:
    """A document or setting as text that is the same in every process."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=_text)


def digest(value: Any) -> str:
    """A short hash of `as_json`."""
    return hashlib.sha256(as_json(value).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def version() -> str:
    """lm-eval's version."""
    import lm_eval

    return str(lm_eval.__version__)


def _text(value: Any) -> str:
    # the address of a function differs from process to process
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
