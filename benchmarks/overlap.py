"""How well judging overlaps answering: a search's wall time over the larger of its two phases.

The real loop runs on a stand-in engine that answers after a fixed time and on a real local server
that grades after a fixed time, with a number of connections. `python -m benchmarks.overlap` prints
the ratio, which should be at most 1.15.

The study is small: 16 trials on 48 tasks, where users have 96 or more on 100. What does not overlap
is about the same in any study: the very first batch (0.5 s and a judge's reply), the mean that
waits for the last generation's grades, the winner that waits for the mean's (1 s each), and 0.08 s
to record each candidate. So a larger study overlaps better.
"""

from __future__ import annotations

import json
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from typing import Any

from evomerge.answering.cache import AnswerCache
from evomerge.answering.engine import Answer
from evomerge.answering.prompts import Prompter
from evomerge.console import Console
from evomerge.genome.genome import make_genome
from evomerge.judging.llm.judge import LlmJudge
from evomerge.recipe import Recipe
from evomerge.searching.assemble import judged_search
from evomerge.searching.ledger import open_ledger
from evomerge.searching.prepare import Problem
from evomerge.searching.samplers.make_sampler import make_sampler
from evomerge.study import (
    GenomeSection,
    JudgeSection,
    PromptSection,
    SearchSection,
    Study,
    TaskSource,
)
from evomerge.tasks import Split, Task

LATENCY, CONNECTIONS = 1.0, 16  # seconds of a grade; grades at once
TASKS, BATCH = 48, 8
BUDGET = 1.15


class TimedEngine:
    """Answers a batch after `seconds`, each recipe differently, and counts its working time."""

    batched_candidates = gradient = likelihood = None

    def __init__(self, seconds: float) -> None:
        self.seconds, self.busy = seconds, 0.0
        self.limits: dict[str, int] = {}
        self.watch: Callable[[int, int], None] | None = None
        self.tokenizer: Any = None
        self.recipe = ""

    def apply(self, recipe: Recipe) -> None:
        self.recipe = recipe.digest()

    def batches(self, prompts: Sequence[str], settings: object = None) -> list[list[int]]:
        return [list(range(i, min(i + BATCH, len(prompts)))) for i in range(0, len(prompts), BATCH)]

    def answer(
        self,
        prompts: Sequence[str],
        settings: object = None,
        on_answer: object = None,
        deadline: float | None = None,
    ) -> list[Answer]:
        began = time.perf_counter()
        time.sleep(self.seconds)
        self.busy += time.perf_counter() - began
        return [Answer(f"{prompt} {self.recipe[:12]}", False, 8) for prompt in prompts]


@contextmanager
def server(latency: float) -> Iterator[tuple[str, list[int]]]:
    """A judge's server on this machine: (its address, a list with one entry for each grade)."""
    graded: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # otherwise a reply's second write waits 40 ms for the first one's acknowledgement
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self.reply({"object": "list", "data": [{"id": "judge", "object": "model"}]})

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(latency)
            graded.append(1 + sum(data) % 5)
            message = {
                "role": "assistant",
                "content": json.dumps({"reason": "", "grade": graded[-1]}),
            }
            self.reply({"choices": [{"index": 0, "finish_reason": "stop", "message": message}]})

        def reply(self, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}", graded
    finally:
        http.shutdown()
        http.server_close()


def run_study(
    folder: Path,
    batch_seconds: float,
    latency: float = LATENCY,
    trials: int = 16,
    population: int = 8,
) -> dict[str, float]:
    """Wall time of a whole study, verdict and all, and of its phases: seconds of answering, and
    requests x latency / connections.
    """
    study = Study(
        genome=GenomeSection(models=("sibling",), base_model="base"),
        tasks=(TaskSource(file="none"),),
        study="overlap",
        judge=JudgeSection(kind="llm", concurrency=CONNECTIONS),
        search=SearchSection(trials=trials, population=population, uniform=(0.5,)),
    )
    genome = make_genome(study, 4)
    tasks = tuple(Task(i, f"task {i}") for i in range(TASKS + TASKS // 2))
    split = Split(tasks[:TASKS], tasks[TASKS:])
    engine = TimedEngine(batch_seconds)
    prompter: Any = Prompter(engine.tokenizer, PromptSection(format="template", template="{input}"))
    problem = Problem(study, genome, split, make_sampler(study, genome))
    url = f"sqlite:///{folder}/overlap.db"
    ledger = open_ledger(url, "overlap", problem.sampler.space, create=True)
    ledger.remember("names", list(genome.names))
    cache = AnswerCache(folder / "answers.sqlite", "overlap")
    with server(latency) as (url, graded):
        judge = LlmJudge(
            JudgeSection(kind="llm", base_url=url, concurrency=CONNECTIONS),
            folder / "grades.sqlite",
        )
        timed: Any = engine
        console = Console(StringIO())
        search = judged_search(
            problem, ledger, console, timed, prompter=prompter, judge=judge, cache=cache
        )
        began = time.perf_counter()
        search.run()
        wall = time.perf_counter() - began
        judge.close()
    cache.close()
    return {"wall": wall, "answering": engine.busy, "judging": len(graded) * latency / CONNECTIONS}


def overlap_ratio() -> float:
    """Wall time over the larger phase where both are about as long, which is the hardest case; a
    bit over a minute.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        found = run_study(Path(folder), batch_seconds=BATCH * LATENCY / CONNECTIONS)
    return found["wall"] / max(found["answering"], found["judging"])


if __name__ == "__main__":
    for ratio in (0.5, 1.0, 2.0):
        with tempfile.TemporaryDirectory() as place:
            figures = run_study(Path(place), ratio * BATCH * LATENCY / CONNECTIONS)
        larger = max(figures["answering"], figures["judging"])
        print(
            f"answering/judging {ratio}: "
            + ", ".join(f"{k} {v:.1f} s" for k, v in figures.items())
            + f", ratio {figures['wall'] / larger:.3f}"
        )
