"""Answer tasks with two models, and compare their answers by a judge.

    python examples/judge_answers.py demo/tasks.jsonl demo/base demo/instruct
    python examples/judge_answers.py tasks.jsonl model-a/ model-b/ --judge learned:judge.npz

The rules judge grades by each task's reference, offline. The difference is paired by task, so its
standard error is smaller than those of the two means.
"""

import argparse
from pathlib import Path
from statistics import fmean, stdev

import evomerge
from evomerge.answering.engine import Answer
from evomerge.judging.factory import judge_from_options
from evomerge.tasks import load_tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", type=Path, help="JSON lines: task_id, input, output")
    parser.add_argument("models", nargs=2, help="two model folders")
    parser.add_argument("--judge", default="rules", help="rules, learned:FILE, llm or local:MODEL")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()

    tasks = load_tasks(args.tasks)
    judge = judge_from_options(args.judge)
    grades: list[list[float]] = []
    for model in args.models:
        answers = evomerge.infer(tasks, model=model, max_new_tokens=args.max_new_tokens)
        graded = []
        for task, record in zip(tasks, answers, strict=True):
            answer = Answer(record.output, truncated=False, tokens=0)
            graded.append(judge.grade(task, answer).value)
        grades.append(graded)
        print(f"{model}: mean grade {fmean(graded):.3f} ± {error(graded):.3f}")

    differences = [a - b for a, b in zip(*grades, strict=True)]
    print(f"difference: {fmean(differences):+.3f} ± {error(differences):.3f}")


def error(values: list[float]) -> float:
    """The standard error of the mean."""
    return stdev(values) / len(values) ** 0.5


if __name__ == "__main__":
    main()
