"""Which judge grades: from a study's `judge:` section, or from what a command was given."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from evomerge.errors import InputError
from evomerge.judging.grade import Judge
from evomerge.study import EngineSection, JudgeSection, read_judge, read_setting
from evomerge.tasks import Task

CACHE = Path("storage/judge.grades.sqlite")  # of the commands, which belong to no study


def make_judge(
    section: JudgeSection,
    cache: Path | None = None,
    seed: int = 0,
    total: bool = True,
    engine: EngineSection | None = None,
) -> Judge:
    """The judge that a section names. `cache` is where the llm judge keeps its grades (None: in
    memory); with `total` what it spent before counts in the budget. `engine` says how the local
    judge's model is loaded. Raises InputError, ModelError, EngineError, JudgeError before anything
    is graded.
    """
    match section.kind:
        case "llm":
            from evomerge.judging.llm.judge import LlmJudge

            return LlmJudge(section, cache, seed, total)
        case "cascade":
            from evomerge.judging.cascade import CascadeJudge
            from evomerge.judging.llm.judge import LlmJudge

            cheap = _lazily("learned", "LearnedJudge")(section.file)
            return CascadeJudge(cheap, LlmJudge(section, cache, seed, total), section.error)
        case "learned":
            judge: Judge = _lazily("learned", "LearnedJudge")(section.file)
            return judge
        case "local":
            from evomerge.judging.local import make_local_judge

            return make_local_judge(section, engine)
        case "rules":
            from evomerge.judging.rules.judge import RulesJudge

            return RulesJudge()
    raise InputError(
        "lm-eval tasks bring metrics of their own", where="judge", remedy="Use another judge."
    )


def judge_from_options(
    judge: str, settings: Sequence[str] = (), cache: Path | None = CACHE
) -> Judge:
    """The judge of a command: `judge` is rules, llm, local or learned:FILE, `settings` are
    KEY=VALUE texts of the section.

    A budget is the command's own. Raises as `make_judge`, and StudyFileError for a setting.
    """
    return make_judge(section_from_options(judge, settings), cache, total=False)


def section_from_options(judge: str, settings: Sequence[str] = ()) -> JudgeSection:
    """The same as a section."""
    kind, colon, file = judge.partition(":")
    if kind == "cascade":
        raise InputError(
            "the cascade judge ranks a study's candidates",
            where="--judge",
            found=judge,
            remedy="Write llm or learned:FILE.",
        )
    if kind not in ("rules", "llm", "local", "learned") or (kind == "learned") != bool(
        colon and file
    ):
        raise InputError(
            "no such judge",
            where="--judge",
            found=judge,
            remedy="Write rules, llm, local or learned:FILE.",
        )
    data: dict[str, Any] = {"kind": kind} | ({"file": file} if file else {})
    for setting in settings:
        key, value = read_setting(setting)
        data[key.removeprefix("judge.")] = value
    return read_judge(data, "--set")


def check_tasks(judge: Judge, tasks: Iterable[Task]) -> None:
    """Let a judge that was fitted on certain tasks refuse others before anything is paid for.
    Raises TaskError.
    """
    check = getattr(judge, "check", None)
    if check is not None:
        check(tasks)


def _lazily(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(f"evomerge.judging.{module}.judge"), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"the {module} judge is not installed: {error}",
            where="judge.kind",
            remedy="Use rules or llm.",
        ) from error
