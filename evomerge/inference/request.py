"""A request for answers: the model and the settings, their checks, and carrying it out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from evomerge.console import LONGEST
from evomerge.errors import InputError
from evomerge.finished import hash_of, is_finished

if TYPE_CHECKING:
    from evomerge.inference.answer_file import Done
    from evomerge.inference.opening import Opened
    from evomerge.inference.run import Progress, Refining
    from evomerge.judging.grade import Judge
    from evomerge.recipe import Recipe
    from evomerge.tasks import Task

Say = Callable[[str], None]
Classify = Literal["neighbours", "model", "both"]


@dataclass(frozen=True)
class InferenceRequest:
    """One of model, recipe, study and server answers; with a server, `model` is its name there.

    `storage` is the study's URL. `overrides` are "a.b=value" texts for keys of a study file;
    `max_new_tokens` limits every answer, whatever a class of the knowledge base says. `self_check`
    names faults of an answer, `time_limit` is in seconds, `overwrite` gives up other answers.
    """

    model: str | None = None
    recipe: Recipe | Path | None = None
    study: str | None = None
    storage: str | None = None
    server: str | None = None
    concurrency: int | None = None
    overrides: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    classify: Classify = "neighbours"
    best_of: int | None = None
    judge: Judge | str | None = None
    self_check: tuple[str, ...] = ()
    time_limit: float | None = None
    overwrite: bool = False

    @property
    def settings(self) -> tuple[str, ...]:
        """All overrides of a study's settings."""
        if self.max_new_tokens is None:
            return self.overrides
        return (f"generation.max_new_tokens={self.max_new_tokens}", *self.overrides)


def parameter(name: str) -> str:
    """What a message calls an option: here as in Python."""
    return f"infer: {name}"


def check_request(request: InferenceRequest, called: Callable[[str], str] = parameter) -> None:
    """Raise InputError for options that do not go together; `called` gives their names."""
    check_answerer(request, called)
    if request.classify != "neighbours" and request.time_limit is not None:
        raise InputError(
            "cannot be combined with a time limit",
            where=called("classify"),
            found=request.classify,
            remedy="Use one of the two.",
        )
    if request.server is None and request.concurrency is not None:
        raise InputError(
            "applies to a server only",
            where=called("concurrency"),
            remedy="Set engine.batch_size (--batch-size).",
        )
    for name, value, least, most in (
        ("concurrency", request.concurrency, 1, 1024),
        ("max_new_tokens", request.max_new_tokens, 1, 10**7),
        ("best_of", request.best_of, 2, 10_000),
    ):
        if value is not None and not least <= value <= most:
            what = f"must be at most {most}"
            if value < least:
                what = f"must be {least} or more"
            raise InputError(what, where=called(name), found=value)
    limit = request.time_limit
    if limit is not None and not 0 < limit <= LONGEST:
        raise InputError(
            "is not a number of seconds above 0, or longer than ten years",
            where=called("time_limit"),
            found=limit,
        )
    if request.judge is not None and request.best_of is None:
        raise InputError(
            "chooses among several answers",
            where=called("judge"),
            remedy=f"Add {called('best_of')}.",
        )
    check_faults(request, called)


def check_answerer(request: InferenceRequest, called: Callable[[str], str] = parameter) -> None:
    """Raise InputError unless it is clear which model answers."""
    named = {
        "model": request.model,
        "recipe": request.recipe,
        "study": request.study,
        "server": request.server,
    }
    given = [name for name, value in named.items() if value is not None]
    if len(given) != 1 and given != ["model", "server"]:
        *names, last = map(called, named)
        raise InputError(
            "it is not clear which model answers",
            remedy=f"Give exactly one of {', '.join(names)} and {last}.",
        )
    uses_vllm = any("engine.kind" in text and "vllm" in text for text in request.overrides)
    if request.classify != "neighbours" and (request.server is not None or uses_vllm):
        raise InputError(
            "needs a transformers model",
            where=called("classify"),
            found=request.classify,
            remedy="Use neighbours.",
        )


def check_faults(request: InferenceRequest, called: Callable[[str], str] = parameter) -> None:
    """Raise InputError for a name in `self_check` that is not a fault."""
    from evomerge.inference.selfcheck import SERIOUS

    for kind in request.self_check:
        if kind not in SERIOUS:
            raise InputError(
                "is not a known fault",
                where=called("self_check"),
                found=kind,
                remedy=f"Use {', '.join(SERIOUS)}, or all.",
            )


def open_request(request: InferenceRequest, say: Say) -> Opened:
    """The engine that answers, with the settings that it answers by."""
    from evomerge.inference import opening

    settings = request.settings
    if request.server is not None:
        return opening.open_server_at(request.server, request.model, settings, request.concurrency)
    if request.study is not None and request.storage is not None:
        return opening.open_study(request.storage, request.study, settings, say)
    if request.recipe is not None:
        return opening.open_merged(request.recipe, settings, say)
    assert request.model is not None, "check_request comes first"
    return opening.open_folder(request.model, settings)


def answer_tasks(
    request: InferenceRequest,
    tasks: Sequence[Task],
    out: Path,
    progress: Progress | None,
    say: Say,
) -> Done:
    """Answer the tasks and write `out`; `say` receives notes. Raises as `run_inference` does."""
    from evomerge.answering.prompts import make_prompter
    from evomerge.inference.answer_file import Done, run_inference
    from evomerge.inference.opening import open_chooser

    began = time.monotonic()
    opened = open_request(request, say)
    facts = _facts(request, opened, tasks)
    going_on = out.with_name(f"{out.name}.part").exists()
    if not request.overwrite and is_finished(out, facts, "answers", going_on):
        line = f"{out} holds these answers already: nothing to do (--overwrite answers again)"
        return Done(len(tasks), told=(line,), made=False)
    steps = _refining_steps(request, tasks, say)
    if opened.prompt.knowledge is None and request.classify != "neighbours":
        raise InputError(
            "there is no knowledge base to classify by",
            where="infer",
            found=request.classify,
            remedy="Name a knowledge base.",
        )
    prompter = make_prompter(
        opened.engine.tokenizer,
        opened.prompt,
        opened.study.generation,
        open_chooser(opened, request.classify, say),
        opened.engine.context,
        request.max_new_tokens,
    )
    return run_inference(
        opened.engine,
        prompter,
        tasks,
        out,
        progress,
        model=_identity(opened),
        deadline=None if request.time_limit is None else began + request.time_limit,
        refine=steps,
        facts=facts,
        overwrite=request.overwrite,
    )


def _identity(opened: Opened) -> str:
    """All that the answers depend on besides the prompts."""
    if opened.identity is None:
        return str(getattr(opened.engine, "identity", ""))
    marks = opened.engine.marks
    if marks is None:
        return opened.identity
    return f"{opened.identity} {marks}"


def _facts(request: InferenceRequest, opened: Opened, tasks: Sequence[Task]) -> dict[str, str]:
    """Hashes of all that the answers depend on, as far as it is known before a model is loaded."""
    from evomerge.knowledge.read_base import read_knowledge

    study, search = opened.study, opened.study.search
    base = study.prompt.knowledge
    judge = getattr(request.judge, "name", request.judge)
    references = []
    if request.best_of:
        references = [task.output for task in tasks]
    found: dict[str, object] = {
        "model": opened.model,
        "tasks": [(task.task_id, task.input) for task in tasks],
        "prompts": _with(
            (study.prompt.model_copy(update={"knowledge": None}), request.classify),
            study.prompt.chat_template_kwargs,
        ),
        "knowledge base": None if base is None else read_knowledge(base).digest(),
        "generation settings": _with(
            (study.generation, request.max_new_tokens, search.seed),
            [text for text in request.overrides if text.startswith("generation.reasoning")],
        ),
        "engine": (study.engine, search.dtype),
        "choice among answers": (request.best_of, judge, request.self_check, references),
    }
    return {name: hash_of(value) for name, value in found.items()}


def _with(known: tuple[object, ...], more: object) -> tuple[object, ...]:
    """With what newer versions know, where it is given: else the hashes of older ones hold."""
    return (*known, more) if more else known


def _refining_steps(request: InferenceRequest, tasks: Sequence[Task], say: Say) -> list[Refining]:
    """The steps that answer again: best of n first, so that the self-check sees its choice."""
    from evomerge.inference.best_of import BestOf
    from evomerge.inference.selfcheck import SelfCheck
    from evomerge.judging.factory import check_tasks

    steps: list[Refining] = []
    if request.best_of is not None:
        judge = _make_judge(request.judge)
        if judge is not None:
            check_tasks(judge, tasks)
            if judge.name == "rules" and any(task.output for task in tasks):
                say(
                    "note: the rules choose answers by the tasks' references: do not grade these "
                    "answers with the rules"
                )
        steps.append(BestOf(request.best_of, judge))
    if request.self_check:
        steps.append(SelfCheck(frozenset(request.self_check)))
    return steps


def _make_judge(judge: Judge | str | None) -> Judge | None:
    """None: the agreement of the answers. Raises InputError, JudgeError, ModelError."""
    from evomerge.judging.factory import judge_from_options

    if judge is None or judge == "agreement":
        return None
    if not isinstance(judge, str):
        return judge
    return judge_from_options(judge)
