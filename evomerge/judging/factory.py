"""Makes the judge that a study's `judge:` section or a command's options name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from evomerge.errors import InputError
from evomerge.judging.grade import Judge
from evomerge.study import EngineSection, JudgeSection, read_judge, read_setting
from evomerge.tasks import Task

CACHE = Path("storage/judge.grades.sqlite")  # the section of the commands, which belong to no study


def make_judge(
    section: JudgeSection,
    cache: Path | None = None,
    seed: int = 0,
    total: bool = True,
    engine: EngineSection | None = None,
) -> Judge:
    """The judge that a section names.

    `cache` is where the llm judge keeps its grades (None: in memory); with `total` its budget
    includes what it spent in earlier runs. `engine` says how the local judge's model is loaded.
    Raises InputError, ModelError, EngineError or JudgeError before anything is graded.
    """
    match section.kind:
        case "llm":
            from evomerge.judging.llm.judge import LlmJudge

            return LlmJudge(section, cache, seed, total)
        case "cascade":
            from evomerge.judging.cascade import CascadeJudge
            from evomerge.judging.learned.judge import LearnedJudge
            from evomerge.judging.llm.judge import LlmJudge

            proxy = LearnedJudge(_file_of(section))
            return CascadeJudge(proxy, LlmJudge(section, cache, seed, total), section.error)
        case "learned":
            from evomerge.judging.learned.judge import LearnedJudge

            return LearnedJudge(_file_of(section))
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
    """The judge of a command line.

    `judge` is rules, llm, local or learned:FILE; `settings` are KEY=VALUE texts of the `judge:`
    section. A budget covers this command alone. Raises as `make_judge`, and StudyFileError for a
    bad setting.
    """
    return make_judge(section_from_options(judge, settings), cache, total=False)


def section_from_options(judge: str, settings: Sequence[str] = ()) -> JudgeSection:
    """The `judge:` section that a command's options describe. Raises as `judge_from_options`."""
    kind, colon, file = judge.partition(":")
    if kind == "cascade":
        raise InputError(
            "the cascade judge ranks a study's candidates",
            where="--judge",
            found=judge,
            remedy="Write llm or learned:FILE.",
        )
    named = {"learned": "file", "local": "model"}  # what KIND:NAME names
    lacks_file = kind == "learned" and not file
    if kind not in ("rules", "llm", *named) or lacks_file or (colon and kind not in named):
        raise InputError(
            "no such judge",
            where="--judge",
            found=judge,
            remedy="Write rules, llm, local:MODEL or learned:FILE.",
        )
    data: dict[str, object] = {"kind": kind}
    if file:
        data[named[kind]] = file
    for setting in settings:
        key, value = read_setting(setting)
        data[key.removeprefix("judge.")] = value
    return read_judge(data, "--set")


def check_tasks(judge: Judge, tasks: Iterable[Task]) -> None:
    """Let a judge that knows only certain tasks reject others before anything is spent.

    Raises TaskError.
    """
    check = getattr(judge, "check", None)
    if check is not None:
        check(tasks)


def _file_of(section: JudgeSection) -> str:
    assert section.file is not None, "read_judge requires a file of these kinds"
    return section.file
