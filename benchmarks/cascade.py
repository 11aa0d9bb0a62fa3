"""What the cascade judge saves on real grades, and how often its better half is the LLM judge's.
The last line is one JSON object.

A learned judge is fitted on the models of the tuning families. Generations are 12 models of the
test families, drawn from neighbours in the order of their means by the LLM judge (gpt-4-turbo,
whose grades are on file), on tasks drawn at random. The cascade asks for grades from that file; the
better half (6) is compared with the one by all of them. Ties at the border are right either way.
The same for swapped families, to see both halves. Intervals: Wilson, 95 %, of the generations as
drawn, which share 37 or 51 models and so tell less than their number does.

`python benchmarks/cascade.py --data FOLDER` with tasks.jsonl, answers.jsonl and grades.jsonl; a
minute and a half on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from evomerge.judging.answer_files import read_answers
from evomerge.judging.cascade import completed, settle
from evomerge.judging.learned.fit import fit_file
from evomerge.judging.learned.judge import LearnedJudge
from evomerge.judging.validation.families import is_tuning
from evomerge.judging.validation.reference import pick, read_grades
from evomerge.searching.generation.racing import blocks
from evomerge.tasks import load_tasks

if TYPE_CHECKING:
    from evomerge.judging.cascade import Floats

POPULATION, KEEP, BLOCK = 12, 6, 4
GENERATIONS = 1000


@dataclass(frozen=True)
class Outcome:
    """Over many generations: share of grades asked, of the same better halves, and what the others'
    mean loses.
    """

    asked: float
    same: float
    low: float
    high: float
    loss: float
    proxy_same: float  # by the learned judge alone

    def line(self, label: str) -> str:
        """A row of the table in docs/JUDGES.md."""
        same = f"{self.same:.3f} [{self.low:.3f}, {self.high:.3f}]"
        return f"| {label} | {self.asked:.2f} | {same} | {self.loss:.4f} | {self.proxy_same:.2f} |"


def tables(
    data: Path, judge: str, references: list[str], fitted_on: Callable[[str | None], bool]
) -> tuple[Floats, Floats]:
    """([models, tasks] learned grades, the judge's), of the models that the learned judge was not
    fitted on; whole tasks only.
    """
    tasks = load_tasks(data / "tasks.jsonl")
    grades = pick(read_grades(data / "grades.jsonl", tasks), [judge], data / "grades.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "judge.npz"
        fit_file(
            data / "tasks.jsonl",
            data / "answers.jsonl",
            data / "grades.jsonl",
            references,
            file,
            fitted_on,
        )
        learned = LearnedJudge(file)
    known = {model for model, _ in grades if not fitted_on(model)}
    lines = [line for line in read_answers(data / "answers.jsonl", tasks) if line.model in known]
    place = {model: i for i, model in enumerate(sorted(known, key=str))}
    column = {str(task.task_id): t for t, task in enumerate(tasks)}
    proxy = np.full((len(place), len(tasks)), np.nan)
    expensive = proxy.copy()
    for line in lines:
        i, t = place[line.model], column[str(line.task.task_id)]
        proxy[i, t] = learned.grade(line.task, line.answer).value
        expensive[i, t] = grades.get((line.model or "", str(line.task.task_id)), np.nan)
    whole = ~np.isnan(proxy + expensive).any(axis=0)
    return proxy[:, whole], expensive[:, whole]


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n (Wilson 1927)."""
    z = 1.96
    middle = (share + z * z / 2 / n) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / 4 / n / n)
    return float(middle - half), float(middle + half)


def measure(
    proxy: Floats, expensive: Floats, tasks: int, window: int, error: float, seed: int = 0
) -> Outcome:
    """Generations of POPULATION out of `window` neighbours, on `tasks` of the tasks."""
    rng = np.random.default_rng([seed, tasks, window])
    order = np.argsort(-expensive.mean(axis=1), kind="stable")
    found = []
    for _ in range(GENERATIONS):
        first = rng.integers(0, len(order) - window + 1)
        rows = rng.permutation(order[first : first + window])[:POPULATION]
        columns = rng.permutation(expensive.shape[1])[:tasks]
        c, d = proxy[np.ix_(rows, columns)], expensive[np.ix_(rows, columns)]

        def ask(asked: list[int], chosen: list[int], grades: Floats = d) -> Floats:
            return grades[np.ix_(asked, chosen)]

        known = settle(c, ask, KEEP, error, blocks(c.shape[1], BLOCK))
        means = d.mean(axis=1)
        best = np.sort(means)[-KEEP:].mean()
        losses = [
            best - means[np.argsort(-m, kind="stable")[:KEEP]].mean()
            for m in (completed(c, known).mean(axis=1), c.mean(axis=1))
        ]
        found.append(
            (float((~np.isnan(known)).mean()), losses[0] < 1e-9, losses[0], losses[1] < 1e-9)
        )
    asked, same, loss, alone = (float(x) for x in np.mean(found, axis=0))
    return Outcome(asked, same, *wilson(same, GENERATIONS), loss, alone)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--judge", default="gpt-4-turbo")
    parser.add_argument(
        "--references",
        default="gpt-4-turbo",
        help="the judges whose grades the learned judge is fitted on, separated by commas",
    )
    parser.add_argument("--error", type=float, default=0.1)
    args = parser.parse_args()
    told: dict[str, Outcome] = {}
    halves: list[tuple[str, Callable[[str | None], bool]]] = [
        ("test", lambda model: is_tuning(model or "")),
        ("tuning", lambda model: not is_tuning(model or "")),
    ]
    for half, fitted_on in halves:
        proxy, expensive = tables(args.data, args.judge, args.references.split(","), fitted_on)
        print(
            f"{half} families: {expensive.shape[0]} models, {expensive.shape[1]} tasks "
            "for which all have grades"
        )
        for tasks in (16, 48, expensive.shape[1]):
            for window in (14, 24):
                label = f"{half}, {tasks} tasks, of {window} neighbours"
                told[f"{half}/{tasks}/{window}"] = outcome = measure(
                    proxy, expensive, tasks, window, args.error
                )
                print(outcome.line(label), flush=True)
    main_one = told["test/48/14"]
    found = {
        "asked_share": round(main_one.asked, 4),
        "same_half": round(main_one.same, 4),
        "same_half_low": round(main_one.low, 4),
        "same_half_high": round(main_one.high, 4),
        "loss": round(main_one.loss, 5),
        "same_half_learned_alone": round(main_one.proxy_same, 4),
        "lowest_same_half": round(min(outcome.same for outcome in told.values()), 4),
        "error": args.error,
        "generations": GENERATIONS,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
