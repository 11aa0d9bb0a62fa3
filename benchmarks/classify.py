"""Classification by the shipped base: how often it is right, and how fast. The last line is one
JSON object.

classify_accuracy: share of the 160 tasks of tests/labelled_tasks_2.jsonl that get their class from
evomerge/knowledge/examples_ja.yaml by the default retriever. Another author wrote them, and nothing
was chosen on them. `accuracy` holds every retriever's shares on them (`second`) and on the halves
of tests/labelled_tasks.jsonl: on the development half numbers were chosen. classify_per_s: tasks a
second of CPU time, against 5,000 examples made from a seed, fitting (fit_s) not counted; the tasks
are the labelled ones, with a number added to make `--tasks` different ones.

python benchmarks/classify.py [--embeddings MODEL] [--model DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from evomerge.errors import InputError
from evomerge.knowledge.chooser import Chooser
from evomerge.knowledge.classification.by_model import ModelClassifier
from evomerge.knowledge.classification.by_neighbours import confusion
from evomerge.knowledge.read_base import read_knowledge
from evomerge.knowledge.records import Example, Knowledge

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "evomerge" / "knowledge" / "examples_ja.yaml"
PARTS = ("development", "test", "second")
EXAMPLES = 5000


def labelled() -> list[dict[str, str]]:
    """All 320 tasks: input, kind, part."""
    files: tuple[tuple[Path, dict[str, str]], ...] = (
        (ROOT / "tests" / "labelled_tasks.jsonl", {}),
        (ROOT / "tests" / "labelled_tasks_2.jsonl", {"part": "second"}),
    )
    return [
        json.loads(line) | more
        for file, more in files
        for line in file.read_text(encoding="utf-8").splitlines()
    ]


def found_classes(chooser: Chooser, rows: Sequence[dict[str, str]]) -> list[str]:
    return [verdict.class_name for verdict in chooser.classify_all([row["input"] for row in rows])]


def accuracy(chooser: Chooser, rows: Sequence[dict[str, str]]) -> dict[str, float]:
    """Share of right classes in each part."""
    right = [
        (row["part"], name == row["kind"])
        for row, name in zip(rows, found_classes(chooser, rows), strict=True)
    ]
    parts = {part: [good for of, good in right if of == part] for part in PARTS}
    return {part: round(sum(goods) / len(goods), 4) for part, goods in parts.items() if goods}


def large(knowledge: Knowledge, seed: int = 0) -> Knowledge:
    """EXAMPLES examples, each made of halves of two examples, in the first one's class."""
    rng = random.Random(seed)
    made = []
    for row in range(EXAMPLES):
        a, b = rng.sample(knowledge.examples, 2)
        half = len(a.input) // 2
        text = a.input[:half] + b.input[: len(b.input) // 2] + a.input[half:]
        made.append(Example(row + 2, a.class_name, text, a.output))
    return Knowledge(knowledge.classes, tuple(made))


def per_second(chooser: Chooser, texts: list[str], whole: bool = False) -> float:
    """Tasks per second of CPU time; `whole`: including each task's examples and documents."""
    began = time.process_time()
    found = chooser.choose_all(texts) if whole else chooser.classify_all(texts)
    return len(found) / (time.process_time() - began)


def by_model(knowledge: Knowledge, folder: str) -> ModelClassifier:
    """Asks the model in its chat template, or without one if it has none."""
    from evomerge.answering.hf.likelihood import open_likelihood_engine

    engine = open_likelihood_engine(folder)

    def render(text: str) -> str:
        turns = [{"role": "user", "content": text}]
        return str(
            engine.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        )

    return ModelClassifier(
        knowledge,
        engine.loglikelihood,
        render if engine.tokenizer.chat_template else lambda text: f"{text}\n\n",
    )


def line(name: str, shares: dict[str, float], speed: str = "") -> None:
    print(
        f"| {name} | {' | '.join(f'{shares[part]:.3f}' for part in PARTS)} | {speed} |", flush=True
    )


def tables(
    knowledge: Knowledge,
    many: Knowledge,
    names: Sequence[str],
    rows: list[dict[str, str]],
    texts: list[str],
) -> dict[str, object]:
    """Print a row for each retriever; its figures."""
    accuracies, speeds = {}, {}
    print(f"| retriever | {' | '.join(PARTS)} | tasks/s |\n|---|---|---|---|---|")
    for name in names:
        try:
            if "bm25" in name:
                import fugashi  # noqa: F401
            accuracies[name] = accuracy(Chooser(knowledge, name), rows)
            speeds[name] = round(per_second(Chooser(many, name), texts))
        except (ImportError, InputError) as error:
            print(f"| {name} | not installed: {error} | | | |")
            continue
        line(name, accuracies[name], str(speeds[name]))
        line(
            f"{name}, votes of the nearest only",
            accuracy(Chooser(knowledge, name, linear=False), rows),
        )
    line(
        "tfidf, descriptions as weak examples",
        accuracy(Chooser(knowledge, descriptions=True), rows),
    )
    return {
        "classify_accuracy": accuracies["tfidf"]["second"],
        "classify_per_s": speeds["tfidf"],
        "accuracy": accuracies,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--embeddings", metavar="MODEL", help="also measure this sentence-transformers folder or id"
    )
    parser.add_argument("--model", metavar="DIR", help="also classify by this model; slow on a CPU")
    parser.add_argument("--tasks", type=int, default=2000, metavar="N")
    args = parser.parse_args()
    knowledge, rows = read_knowledge(BASE), labelled()
    names = ["tfidf", "bm25", "tfidf+bm25"]
    if args.embeddings:
        names += [f"embeddings:{args.embeddings}", f"tfidf+embeddings:{args.embeddings}"]
    texts = [f"{i}. {rows[i % len(rows)]['input']}" for i in range(args.tasks)]
    many = large(knowledge)
    began = time.process_time()
    chooser = Chooser(many)
    fit = time.process_time() - began
    figures = tables(knowledge, many, names, rows, texts)
    if args.model:
        asking = by_model(knowledge, args.model)
        for way in ("model", "both"):
            line(
                f"{way}: {args.model}",
                accuracy(Chooser(knowledge, classify=way, by_model=asking), rows),
            )
    second = [row for row in rows if row["part"] == "second"]
    classes = [c.name for c in knowledge.classes]
    print(
        "\n| second set: true class | " + " | ".join(classes) + " |\n|---|" + "---|" * len(classes)
    )
    for name, counts in zip(
        classes,
        confusion([r["kind"] for r in second], found_classes(Chooser(knowledge), second), classes),
        strict=True,
    ):
        print(f"| {name} | " + " | ".join(str(n) for n in counts) + " |")
    figures |= {
        "choose_per_s": round(per_second(chooser, texts, whole=True)),
        "fit_s": round(fit, 2),
    }
    print(json.dumps(figures, ensure_ascii=False))


if __name__ == "__main__":
    main()
