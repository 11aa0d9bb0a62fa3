"""How fast the judges grade on one core, in answers per second of CPU time. The last line is one
JSON object.

rules_per_s, learned_per_s: answers of `--answers` to `--tasks` (JSON lines), or where none are
named 2,000 answers made from a seed, of 20 to 800 Japanese characters to 50 tasks. The learned
judge is fitted first, on grades made from the answers' length, which changes no work that it does.
overlap_ratio: the wall time of a study with a slow judge over the larger of its two phases
(benchmarks/overlap.py, about a minute).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from overlap import overlap_ratio

from evomerge.judging.answer_files import AnswerLine, grade_lines, read_answers
from evomerge.judging.grade import Judge
from evomerge.judging.learned.fit import fit_file
from evomerge.judging.learned.judge import LearnedJudge
from evomerge.judging.rules.judge import RulesJudge
from evomerge.tasks import load_tasks

WORDS = [
    "東京",
    "仕事",
    "熱意",
    "方法",
    "です。",
    "ます。",
    "これは",
    "次に",
    "説明",
    "結果",
    "、",
    "を",
    "が",
    "に",
    "は",
    "123",
    "\n- ",
    "**",
    "AI",
]


def make(folder: Path) -> tuple[Path, Path]:
    """Random tasks and answers from a seed."""
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return "".join(rng.choices(WORDS, k=rng.randint(low, high)))

    rows = [
        {"task_id": i, "input": text(10, 40), "output": text(30, 200), "eval_aspect": text(10, 40)}
        for i in range(50)
    ]
    given = [
        {"model": f"m{m}", "task_id": i, "output": text(10, 400)}
        for m in range(40)
        for i in range(50)
    ]
    return write(folder / "tasks.jsonl", rows), write(folder / "answers.jsonl", given)


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    """JSON lines."""
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def per_second(judge: Judge, lines: list[AnswerLine]) -> float:
    """The best of three rounds; the first also fills what a judge caches for each task."""
    best = 0.0
    for _ in range(3):
        began = time.process_time()
        grade_lines(judge, lines)
        best = max(best, len(lines) / (time.process_time() - began))
    return round(best, 1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=Path)
    parser.add_argument("--answers", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tasks, answers = (args.tasks, args.answers) if args.answers else make(folder)
        lines = read_answers(answers, load_tasks(tasks))
        graded: list[dict[str, object]] = [
            {
                "model": x.model,
                "task_id": x.task.task_id,
                "judge": "length",
                "grade": 1 + len(x.answer.text) % 5,
            }
            for x in lines
        ]
        fit_file(
            tasks, answers, write(folder / "grades.jsonl", graded), ["length"], folder / "judge.npz"
        )
        learned = LearnedJudge(folder / "judge.npz")
        lines = random.Random(0).sample(lines, min(2000, len(lines)))
        found = {
            "rules_per_s": per_second(RulesJudge(), lines),
            "learned_per_s": per_second(learned, lines),
            "overlap_ratio": overlap_ratio(),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
