"""What the self-check and best of n are worth. The last line is one JSON object.

    python benchmarks/selfcheck.py --graded FOLDER  # tasks.jsonl, answers.jsonl and grades.jsonl:
                                                    # real graded answers of many models
    python benchmarks/selfcheck.py --pair FOLDER    # parent/ and tasks.jsonl as make_real_pair.py
                                                    # makes them: about 10 minutes

graded: the share of answers with each fault by the grade that REFERENCE gave them, and the gain of
choosing among the answers of N models to one task over their mean, by REFERENCE's grades, on the
test families only (judging/families.py). The learned judge is fitted on FITTED's grades of the
tuning families. `any`: N models at random; `near`: N that follow each other by mean grade, so that
knowing the better model helps little. Intervals by bootstrap over tasks, each the mean of DRAWS
groups.

pair: a model answers, and answers again what has a fault; the grades by the rules of the flagged
answers, the first ones and the better of each two. Then best of N against the first answers.
Intervals by bootstrap over tasks.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from evomerge.answering.engine import Answer, EngineSpec
from evomerge.answering.hf.engine import TransformersEngine
from evomerge.answering.prompts import Prompt, Prompter, make_prompter
from evomerge.inference.best_of import best_answer, grade_answers, sample_settings
from evomerge.inference.selfcheck import (
    SERIOUS,
    asked_for,
    better,
    faults,
    retry_settings,
    seriousness,
)
from evomerge.judging.answer_files import AnswerLine, read_answers
from evomerge.judging.learned.fit import fit_file
from evomerge.judging.learned.judge import LearnedJudge
from evomerge.judging.rules.judge import RulesJudge
from evomerge.judging.validation.families import is_tuning, wanted_models
from evomerge.judging.validation.reference import answer_key, join_grades, pick, read_grades
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.searching.estimates import paired_interval
from evomerge.study import EngineSection, GenerationSection, PromptSection
from evomerge.tasks import Task, load_tasks

REFERENCE, FITTED = "gpt-4-turbo", ["athene-v2", "tulu-405b"]
N, DRAWS = 4, 10
GOOD = 4  # the least grade of an answer that nobody should ask again for
# the second is not the small model's own format, which provokes faults
FORMATS: tuple[Literal["chat", "competition"], ...] = ("chat", "competition")
Cell = tuple[AnswerLine, float]  # an answer and its grade


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--graded", type=Path)
    parser.add_argument("--pair", type=Path)
    parser.add_argument("--tasks", type=int, default=140, help="number of the pair's tasks")
    parser.add_argument("--new-tokens", type=int, default=48, help="length of the pair's answers")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    if args.graded is not None:
        found |= fault_rates(args.graded) | choices(args.graded)
    if args.pair is not None:
        found |= pair(args.pair, args.tasks, args.new_tokens)
    print(json.dumps(found))


def fault_rates(folder: Path) -> dict[str, Any]:
    """Shares of answers with a fault, by grade; and of the references, which have none."""
    print(f"answers with a fault, by {REFERENCE}'s grade")
    by_grade: dict[int, list[tuple[str, ...]]] = defaultdict(list)
    for line, value in _cells(folder, lambda model: True):
        by_grade[round(value)].append(faults(line.answer, line.task.input))
    by_grade[0] = [
        faults(Answer(task.output, False, 0), task.input)
        for task in load_tasks(folder / "tasks.jsonl")
    ]
    found = {}
    for name, grades in (
        ("references", (0,)),
        *((str(g), (g,)) for g in range(1, 6)),
        ("4 and 5", (GOOD, 5)),
    ):
        rows = [fault for g in grades for fault in by_grade[g]]
        shares = {
            kind: sum(kind in fault for fault in rows) / len(rows)
            for kind in SERIOUS
            if kind != "cut"
        }
        print(
            f"  {name:10} {len(rows):5} answers  "
            + "  ".join(f"{kind} {share:.2%}" for kind, share in shares.items())
        )
        found[name] = {kind: round(share, 4) for kind, share in shares.items()}
    return {"faults": found}


def choices(folder: Path) -> dict[str, Any]:
    """The gain of each way to choose."""
    cells: dict[str, dict[str, Cell]] = defaultdict(dict)  # task -> model -> cell
    for line, value in _cells(folder, lambda model: not is_tuning(model)):
        cells[str(line.task.task_id)][line.model or ""] = (line, value)
    means = {
        model: fmean(row[model][1] for row in cells.values() if model in row)
        for row in cells.values()
        for model in row
    }
    ranked = sorted(means, key=lambda model: (means[model], model))
    with tempfile.TemporaryDirectory(prefix="evomerge-bench-") as name:
        out = Path(name) / "judge.npz"
        files = (folder / "tasks.jsonl", folder / "answers.jsonl", folder / "grades.jsonl")
        fit_file(*files, FITTED, out, wanted_models("tuning"))
        ways = _ways(LearnedJudge(out))
    print(
        f"gain of choosing 1 of {N} over their mean, {REFERENCE}'s grades, {len(ranked)} models "
        f"of the test families, {len(cells)} tasks"
    )
    found = {}
    for kind in ("any", "near"):
        gains = _gains(cells, ranked, kind, ways)
        for way, each in gains.items():
            found[f"{kind}, {way}"] = _told(f"  {kind:5} {way:32}", each)
    return {"best_of": found}


def _ways(learned: LearnedJudge) -> dict[str, Callable[[Task, Sequence[Answer]], int]]:
    """Ways to choose, by name. `bare` judges do not ask for faults first."""
    rules = RulesJudge()

    def blind(task: Task) -> Task:
        return replace(task, output="", eval_aspect="")

    def top(values: Sequence[float]) -> int:
        return max(range(len(values)), key=lambda i: values[i])

    return {
        "the first without a fault": lambda task, said: top(
            [-float(seriousness(faults(a, task.input))) for a in said]
        ),
        "the longest": lambda task, said: top([float(len(a.text)) for a in said]),
        "agreement, bare": lambda task, said: top(grade_answers(blind(task), said)),
        "agreement": lambda task, said: best_answer(blind(task), said),
        "rules with the reference, bare": lambda task, said: top(grade_answers(task, said, rules)),
        "rules with the reference": lambda task, said: best_answer(task, said, rules),
        "learned, bare": lambda task, said: top(grade_answers(task, said, learned)),
        "learned": lambda task, said: best_answer(task, said, learned),
    }


def _gains(
    cells: Mapping[str, Mapping[str, Cell]],
    ranked: Sequence[str],
    kind: str,
    ways: Mapping[str, Callable[[Task, Sequence[Answer]], int]],
) -> dict[str, list[float]]:
    """[tasks] mean gains by way, over DRAWS groups of N models that have answered the task; `best`
    is the most that there is.
    """
    rng, gains = random.Random(0), defaultdict[str, list[float]](list)
    for row in cells.values():
        there = [model for model in ranked if model in row]
        each = defaultdict[str, list[float]](list)
        for _ in range(DRAWS):
            start = rng.randrange(len(there) - N + 1)
            models = (
                rng.sample(there, N) if kind == "any" else rng.sample(there[start : start + N], N)
            )
            group = [row[model] for model in models]
            said, values = [line.answer for line, _ in group], [value for _, value in group]
            for way, chosen in ways.items():
                each[way].append(values[chosen(group[0][0].task, said)] - fmean(values))
            each["best"].append(max(values) - fmean(values))
        for way, values in each.items():
            gains[way].append(fmean(values))
    return gains


def pair(folder: Path, count: int, new_tokens: int) -> dict[str, Any]:
    """Each fault asked again for, and best of N, on a real small model."""
    generation, tasks = (
        GenerationSection(max_new_tokens=new_tokens),
        load_tasks(folder / "tasks.jsonl")[:count],
    )
    parent, section = open_model(str(folder / "parent")), EngineSection(threads=1)
    engine = TransformersEngine(EngineSpec(parent, [], section, generation, "bfloat16"))
    found: dict[str, Any] = {}
    for form in FORMATS:
        prompter = make_prompter(
            engine.tokenizer, PromptSection(format=form), generation, context=engine.context
        )
        prompts = prompter.prepare([task.input for task in tasks])
        first = _ask(engine, prompter, prompts)
        print(
            f"{form} prompts, {len(tasks)} tasks, {new_tokens} new tokens: mean grade "
            f"{fmean(_grades(tasks, first)):.2f}"
        )
        found[form] = {
            kind: _again(kind, engine, prompter, tasks, prompts, first) for kind in SERIOUS
        }
        if form == FORMATS[0]:
            found[f"best of {N}"] = _best_of(engine, prompter, tasks, prompts, first)
    return {"pair": found}


def _again(
    kind: str,
    engine: TransformersEngine,
    prompter: Prompter,
    tasks: Sequence[Task],
    prompts: Sequence[Prompt],
    first: Sequence[Answer],
) -> dict[str, Any]:
    """One more attempt for the answers that have this fault; a fault of language would need a model
    that can do two.
    """
    found = [
        asked_for(faults(answer, task.input), frozenset({kind}))
        for answer, task in zip(first, tasks, strict=True)
    ]
    flagged = [i for i, fault in enumerate(found) if fault]
    if not flagged:
        print(f"  {kind:10}   0 flagged")
        return {"flagged": 0}
    asked = [
        replace(prompts[i], settings=retry_settings(found[i], prompts[i].settings, 1))
        for i in flagged
    ]
    second = _ask(engine, prompter, asked)
    kept = [better(first[i], new, tasks[i].input) for i, new in zip(flagged, second, strict=True)]
    chosen = [tasks[i] for i in flagged]
    before, after = _grades(chosen, [first[i] for i in flagged]), _grades(chosen, kept)
    mended = sum(
        kind not in faults(answer, task.input) for answer, task in zip(kept, chosen, strict=True)
    )
    gains = [b - a for a, b in zip(before, after, strict=True)]
    told = _told(
        f"  {kind:10} {len(flagged):3} flagged, {mended:3} fixed afterwards, mean "
        f"{fmean(before):.2f} to {fmean(after):.2f}",
        gains,
    )
    return {
        "flagged": len(flagged),
        "mended": mended,
        "before": round(fmean(before), 3),
        "after": round(fmean(after), 3),
        **told,
    }


def _best_of(
    engine: TransformersEngine,
    prompter: Prompter,
    tasks: Sequence[Task],
    prompts: Sequence[Prompt],
    first: Sequence[Answer],
) -> dict[str, Any]:
    """N answers to each task, chosen by agreement, against the first ones; and the other answers'
    mean beside them.
    """
    drawn = sample_settings(N, prompter.generation)
    rounds = [
        first,
        *(
            _ask(engine, prompter, [replace(prompt, settings=own) for prompt in prompts])
            for own in drawn[1:]
        ),
    ]
    said = [list(answers) for answers in zip(*rounds, strict=True)]
    blind = [replace(task, output="", eval_aspect="") for task in tasks]
    before = _grades(tasks, first)
    found = {}
    for way, answers in {
        "agreement": [a[best_answer(task, a)] for task, a in zip(blind, said, strict=True)],
        "the reference (the most there is)": [
            a[best_answer(task, a, RulesJudge())] for task, a in zip(tasks, said, strict=True)
        ],
        "the first sampled": [a[1] for a in said],
    }.items():
        after = _grades(tasks, answers)
        gains = [b - a for a, b in zip(before, after, strict=True)]
        found[way] = _told(
            f"  best of {N} by {way:34} mean {fmean(before):.2f} to {fmean(after):.2f}", gains
        )
    return found


def _ask(engine: TransformersEngine, prompter: Prompter, prompts: Sequence[Prompt]) -> list[Answer]:
    texts, settings = [prompt.text for prompt in prompts], prompter.settings(prompts)
    answers: dict[int, Answer] = {}
    for batch in engine.batches(texts, settings):
        own = None if settings is None else [settings[i] for i in batch]
        answers |= zip(batch, engine.answer([texts[i] for i in batch], own), strict=True)
    return [answers[i] for i in range(len(prompts))]


def _grades(tasks: Sequence[Task], answers: Sequence[Answer]) -> list[float]:
    rules = RulesJudge()
    return [rules.grade(task, answer).value for task, answer in zip(tasks, answers, strict=True)]


def _cells(folder: Path, wanted: Callable[[str], bool]) -> list[Cell]:
    """Answers that REFERENCE has graded."""
    tasks = load_tasks(folder / "tasks.jsonl")
    grades = pick(read_grades(folder / "grades.jsonl", tasks), [REFERENCE], folder / "grades.jsonl")
    grades = {key: value for key, value in grades.items() if wanted(key[0] or "")}
    joined = join_grades(
        [
            line
            for line in read_answers(folder / "answers.jsonl", tasks)
            if answer_key(line) in grades
        ],
        grades,
    )
    return list(zip(joined.lines, joined.grades, strict=True))


def _told(name: str, gains: Sequence[float]) -> dict[str, Any]:
    """Print and return a mean with its interval."""
    low, high = paired_interval(gains)
    print(f"{name} {fmean(gains):+.3f} [{low:+.3f}, {high:+.3f}]", flush=True)
    return {"gain": round(fmean(gains), 4), "low": round(low, 4), "high": round(high, 4)}


if __name__ == "__main__":
    main()
