"""The parts of a search put together: once for tasks with a judge, once for those of lm-eval."""

from __future__ import annotations

from collections.abc import Mapping

from evomerge.answering.cache import AnswerCache
from evomerge.answering.engine import Engine
from evomerge.answering.lm_eval.harness import LmEvalRunner
from evomerge.answering.prompts import Prompter
from evomerge.console import Console
from evomerge.judging.grade import Judge
from evomerge.searching.choosing import compared_with
from evomerge.searching.evaluate import Evaluator, JudgedEvaluator, LikelihoodPart, LmEvalEvaluator
from evomerge.searching.final_test import FinalTest
from evomerge.searching.generation.generation_plan import AllTasksPlan, GenerationPlan
from evomerge.searching.generation.one_pass import OnePass
from evomerge.searching.ledger import Ledger
from evomerge.searching.loop import Search
from evomerge.searching.prefetch import Upcoming
from evomerge.searching.prepare import Problem
from evomerge.searching.scoring import Scorer, make_scorer
from evomerge.searching.starting.warm_start import GradientStart, find_warm_start
from evomerge.tasks import Task


def judged_search(
    problem: Problem,
    ledger: Ledger,
    console: Console,
    engine: Engine,
    *,
    prompter: Prompter,
    judge: Judge,
    cache: AnswerCache,
) -> Search:
    """A search whose answers are graded by a judge."""
    study = problem.study
    engine.limits.update(ledger.facts.limits)

    def remember_limits(limits: Mapping[str, int]) -> None:
        # a lack of memory has forced smaller batches: the study also uses them when it resumes
        ledger.remember("limits", dict(limits))

    def longest(task: Task) -> int:
        return prompter.prepare([task.input])[0].settings.max_new_tokens

    likelihood = None
    if study.objective.needs_likelihood:
        assert engine.likelihood is not None  # the study file was checked for it
        likelihood = LikelihoodPart(engine, engine.likelihood, prompter, cache)
    one_pass = OnePass(problem, engine, cache, ledger)
    evaluator = JudgedEvaluator(
        engine=engine,
        prompter=prompter,
        judge=judge,
        cache=cache,
        console=console,
        remember_limits=remember_limits,
        shared_seconds=one_pass.take_seconds,
        likelihood=likelihood,
    )
    scorer = make_scorer(problem, longest)
    plan = GenerationPlan(problem, ledger, evaluator, scorer, one_pass, console)
    start = find_warm_start(problem, engine, prompter, evaluator.answers)
    return _search(
        problem, ledger, console, evaluator=evaluator, plan=plan, scorer=scorer, warm_start=start
    )


def lm_eval_search(
    problem: Problem,
    ledger: Ledger,
    console: Console,
    engine: Engine,
    *,
    runner: LmEvalRunner,
    cache: AnswerCache,
) -> Search:
    """A search over tasks of lm-eval, whose prompts are prepared."""
    engine.limits.update(ledger.facts.limits)
    evaluator = LmEvalEvaluator(engine, runner, cache, console)
    study = problem.study
    scorer = make_scorer(problem, lambda task: study.generation.max_new_tokens)
    plan = AllTasksPlan(evaluator, problem.split.search)
    return _search(problem, ledger, console, evaluator=evaluator, plan=plan, scorer=scorer)


def _search(
    problem: Problem,
    ledger: Ledger,
    console: Console,
    *,
    evaluator: Evaluator,
    plan: GenerationPlan | AllTasksPlan,
    scorer: Scorer,
    warm_start: GradientStart | None = None,
) -> Search:
    def compared() -> list[tuple[float, ...]]:
        trials = compared_with(ledger.history(), problem.genome)
        return [trial.vector for trial in trials.values()]

    return Search(
        problem=problem,
        ledger=ledger,
        evaluator=evaluator,
        generation_plan=plan,
        scorer=scorer,
        upcoming=Upcoming(problem, ledger, plan, compared, warm_start is not None),
        final_test=FinalTest(problem, ledger, evaluator, scorer, console),
        console=console,
        warm_start=warm_start,
    )
