"""Search the best merge of your own base and fine-tuned sibling.

    evomerge demo demo/                                   # or your own pair and tasks
    python examples/search_own_pair.py demo/base demo/instruct demo/tasks.jsonl

The tasks are JSON lines: task_id, input, output (the reference). The rules judge grades the
answers by the references, offline. Run it again with more --trials to continue the study.
"""

import argparse
from pathlib import Path

import evomerge
from evomerge.console import plus_minus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("sibling", type=Path)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--out", type=Path, default=Path("my-pair"))
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--layers", type=int, default=2, help="per slice: one weight each")
    args = parser.parse_args()

    # what a study file holds; search_spaces/ has commented ones
    study_file = {
        "study": "my-pair",
        "genome": {
            "base_model": str(args.base),
            "models": [str(args.sibling)],
            "merge_method": "task_arithmetic",
            "layer_granularity": args.layers,
        },
        "tasks": [{"file": str(args.tasks)}],
        "generation": {"max_new_tokens": args.max_new_tokens},
        "search": {"population": 4, "uniform": [0.5]},
    }
    findings = evomerge.check(study_file)
    for finding in findings:
        print(f"{finding.level:8}{finding.subject}: {finding.text}")
    if any(finding.level == "wrong" for finding in findings):
        raise SystemExit(1)

    found = evomerge.search(
        study_file, storage=args.out / "studies.db", results=args.out, trials=args.trials
    )
    print(found.trials[["number", "role", "score", "stderr"]].nlargest(5, "score"))
    for name, figures in found.verdict.candidates.items():
        print(f"{name:10} {plus_minus(figures.mean, figures.stderr)} on held-out tasks")
    print(found.recipe_yaml)
    print("report:", args.out / found.name / "report.html")


if __name__ == "__main__":
    main()
