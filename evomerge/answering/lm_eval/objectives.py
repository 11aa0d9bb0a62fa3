"""Which of lm-eval's tasks a study names, and whether their metrics can be optimised."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from evomerge.errors import InputError, TaskError

if TYPE_CHECKING:
    from evomerge.study import Study, TaskSource


@dataclass(frozen=True)
class Objective:
    """One entry of the study file: a metric over the documents of some leaves.

    A leaf is one of lm-eval's single tasks.
    """

    name: str
    metric: str
    weight: float
    leaves: tuple[str, ...]
    # a mean over all documents; else a mean of the leaves' means, as the group's YAML says
    pooled: bool


def load_objectives(study: Study) -> tuple[dict[str, Any], tuple[Objective, ...], list[str]]:
    """lm-eval's single tasks by name, the objectives over them, and warnings.

    Raises InputError without lm-eval, TaskError for an unknown task, metric or dataset.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            "lm-eval tasks need lm-eval",
            where="tasks",
            remedy="Run pip install 'evomerge[lm-eval]'.",
        )
    names = list(dict.fromkeys(str(source.name) for source in study.tasks))
    leaves: dict[str, Any] = {}
    objectives: list[Objective] = []
    warnings: list[str] = []
    with quiet():
        loaded = _load(names, list(study.task_search_path))
        for source in study.tasks:
            found = loaded[str(source.name)]
            single = [found]
            if hasattr(found, "get_all_tasks"):
                single = found.get_all_tasks()
            own = {leaf.task_name: leaf for leaf in single}
            for name, leaf in own.items():
                if name not in leaves:
                    _check_runs(name, leaf)
                    _set_fewshot(leaf, study.num_fewshot)
                    leaves[name] = leaf
            objective = _objective(source, found, own)
            objectives.append(objective)
            if objective.weight > 0 and _is_better_low(objective, leaves):
                warnings.append(
                    f"task {source.name}: lower {source.metric} is better, but a weight above 0 "
                    "rewards higher values"
                )
    return leaves, tuple(objectives), warnings


def _is_better_low(objective: Objective, leaves: Mapping[str, Any]) -> bool:
    title = objective.metric.partition(",")[0]
    directions = [leaves[name].higher_is_better() for name in objective.leaves]
    return not all(higher.get(title, True) for higher in directions)


def _load(names: Sequence[str], folders: list[str]) -> dict[str, Any]:
    """lm-eval's task or group by name, from the study's own folders where they hold all of it."""
    from lm_eval.tasks import TaskManager

    if folders:  # indexing lm-eval's own thousands of tasks takes many seconds
        own = TaskManager(include_path=folders, include_defaults=False)
        if set(names) <= set(own.all_tasks):
            try:
                return {name: _load_one(own, name) for name in names}
            except TaskError:
                if not set(names) & set(own.all_groups):
                    raise  # otherwise a group may contain lm-eval's own tasks
    manager = TaskManager(include_path=folders or None)
    return {name: _load_one(manager, name) for name in names}


def _objective(source: TaskSource, found: Any, leaves: Mapping[str, Any]) -> Objective:
    """A study file's entry with its leaves.

    Raises TaskError for a metric that is not a mean over documents: no document would have a value
    of its own.
    """
    from lm_eval.api.metrics import mean

    name, metric = str(source.name), source.metric
    title, _, filter_name = metric.partition(",")
    known = {key: _metrics(leaf) for key, leaf in leaves.items()}
    having = tuple(key for key in leaves if metric in known[key])
    pooled = True
    if hasattr(found, "get_all_tasks"):
        rule = _aggregation(found, title, filter_name)
        if rule is None:
            having = ()
        else:
            pooled = rule.weight_by_size
    if not having:
        names = dict.fromkeys(chain.from_iterable(known.values()))
        raise TaskError(
            "the task has no such metric",
            where=f"task {name}",
            found=metric,
            remedy=f"Use one of {', '.join(names)}.",
        )
    if any(leaves[key].aggregation()[title] is not mean for key in having):
        raise TaskError(
            "this metric is not a mean over documents, so no verdict can compare it document by "
            "document",
            where=f"task {name}",
            found=metric,
            remedy="Use a metric such as acc or exact_match.",
        )
    return Objective(name, metric, source.weight, having, pooled)


def _metrics(leaf: Any) -> list[str]:
    """Every "metric,filter" of a leaf."""
    found = []
    for metric in leaf.aggregation():
        found += [f"{metric},{f.name}" for f in leaf._filters]
    return found


def _aggregation(group: Any, metric: str, filter_name: str) -> Any:
    """The group's first rule for a metric and a filter; None without one."""
    for rule in group.aggregate_metric_list or []:
        if rule.metric == metric and filter_name in (rule.filter_list or [filter_name]):
            return rule
    return None


def _set_fewshot(leaf: Any, wanted: int | None) -> None:
    """Set `num_fewshot` as lm-eval does: a task that sets 0 keeps it."""
    own = leaf.get_config("num_fewshot")
    if own is None or (wanted is not None and own != 0):
        leaf.set_config(key="num_fewshot", value=wanted or 0)


def _load_one(manager: Any, name: str) -> Any:
    """A task or group by name. Raises TaskError."""
    known: list[str] = [*manager.all_subtasks, *manager.all_groups]
    if name in manager.all_tags:
        raise TaskError(
            "this is a tag, and a tag has no metric",
            where="tasks",
            found=name,
            remedy="Name its tasks individually.",
        )
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        remedy = "A task of your own needs `task_search_path`."
        if near:
            remedy = f"Did you mean {' or '.join(near)}?"
        raise TaskError("lm-eval has no such task", where="tasks", found=name, remedy=remedy)
    try:
        loaded = manager.load([name])
    # datasets, its hub client and the tasks' code raise many kinds of errors
    except Exception as error:
        raise TaskError(
            f"the task cannot be loaded: {line(error)}",
            where=f"task {name}",
            remedy="Check its YAML, and the network or the dataset's path.",
        ) from error
    return loaded["groups"].get(name) or loaded["tasks"][name]


def _check_runs(name: str, leaf: Any) -> None:
    if getattr(leaf, "UNSAFE_CODE", False):
        raise TaskError(
            "the task runs code that the model wrote",
            where=f"task {name}",
            remedy="Name another task: evomerge does not run such code.",
        )
    if getattr(leaf, "MULTIMODAL", False):
        raise TaskError(
            "the task contains images or audio", where=f"task {name}", remedy="Name a text task."
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the bars and remarks of lm-eval and datasets, which would mix with our own lines."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)


def line(error: Exception) -> str:
    """An error as one line: its kind and the first line of its text."""
    text = str(error).strip()
    if text:
        return f"{type(error).__name__}: {text.splitlines()[0]}"
    return type(error).__name__
