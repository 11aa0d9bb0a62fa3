"""Classification by the shipped base: how often it is right, and how fast. The last line is one JSON object.

classify_accuracy: share of the 160 tasks of tests/labelled_tasks.jsonl that get their class from evomerge/knowledge/examples_ja.yaml
by the default retriever; `accuracy` holds every retriever's shares on the development half, on which VOTERS and POWER were
chosen, and on the test half. classify_per_s: tasks a second of CPU time, against 5,000 examples made from a seed, fitting not
counted; the tasks are the labelled ones, with a number added to make `--tasks` different ones.

python benchmarks/classify.py [--embeddings MODEL]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from evomerge.errors import InputError
from evomerge.knowledge.base import Knowledge, read_knowledge
from evomerge.knowledge.parts import Example
from evomerge.knowledge.retrieve import Chooser

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "evomerge" / "knowledge" / "examples_ja.yaml"
LABELLED = ROOT / "tests" / "labelled_tasks.jsonl"
EXAMPLES = 5000


def labelled() -> list[dict[str, str]]:
    return [json.loads(line) for line in LABELLED.read_text(encoding="utf-8").splitlines()]


def accuracy(knowledge: Knowledge, retriever: str, rows: list[dict[str, str]], descriptions: bool = False) -> dict[str, float]:
    """Share of right classes in each half and in both."""
    chooser = Chooser(knowledge, retriever, descriptions=descriptions)
    verdicts = chooser.classifier.classify([row["input"] for row in rows])
    right = [(row["part"], verdict.class_name == row["kind"]) for row, verdict in zip(rows, verdicts, strict=True)]
    parts = {part: [good for name, good in right if part in ("all", name)] for part in ("development", "test", "all")}
    return {part: round(sum(goods) / len(goods), 4) for part, goods in parts.items()}


def large(knowledge: Knowledge, seed: int = 0) -> Knowledge:
    """EXAMPLES examples, each of halves of two of the base's, of the first one's class."""
    rng = random.Random(seed)
    made = []
    for row in range(EXAMPLES):
        a, b = rng.sample(knowledge.examples, 2)
        text = f"{a.input[: len(a.input) // 2]}{b.input[: len(b.input) // 2]}{a.input[len(a.input) // 2 :]}"
        made.append(Example(row + 2, a.class_name, text, a.output))
    return Knowledge(knowledge.classes, tuple(made))


def per_second(knowledge: Knowledge, retriever: str, texts: list[str], whole: bool) -> float:
    """Tasks a second of CPU time; `whole`: with the examples and the filled template of each."""
    chooser = Chooser(knowledge, retriever)
    began = time.process_time()
    found = chooser.choose_all(texts) if whole else chooser.classifier.classify(texts)
    return len(found) / (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embeddings", metavar="MODEL", help="also measure this sentence-transformers folder or id")
    parser.add_argument("--tasks", type=int, default=2000, metavar="N")
    args = parser.parse_args()
    knowledge, rows = read_knowledge(BASE), labelled()
    names = ["tfidf", "bm25", "tfidf+bm25"]
    if args.embeddings:
        names += [f"embeddings:{args.embeddings}", f"tfidf+embeddings:{args.embeddings}"]
    texts = [f"{i}. {rows[i % len(rows)]['input']}" for i in range(args.tasks)]
    many = large(knowledge)
    accuracies, speeds = {}, {}
    print("| retriever | development | test | tasks/s |\n|---|---|---|---|")
    for name in names:
        try:
            if "bm25" in name:
                import fugashi  # noqa: F401
            accuracies[name] = accuracy(knowledge, name, rows)
            speeds[name] = round(per_second(many, name, texts, whole=False))
        except (ImportError, InputError) as error:
            print(f"| {name} | not installed: {error} | | |")
            continue
        print(f"| {name} | {accuracies[name]['development']:.3f} | {accuracies[name]['test']:.3f} | {speeds[name]} |", flush=True)
    described = accuracy(knowledge, "tfidf", rows, descriptions=True)
    print(f"| tfidf, descriptions as weak examples | {described['development']:.3f} | {described['test']:.3f} | |")
    figures = {
        "classify_accuracy": accuracies["tfidf"]["all"],
        "classify_per_s": speeds["tfidf"],
        "choose_per_s": round(per_second(many, "tfidf", texts, whole=True)),
        "accuracy": accuracies,
    }
    print(json.dumps(figures, ensure_ascii=False))


if __name__ == "__main__":
    main()
