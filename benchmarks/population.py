"""Candidates per second in one pass over candidate after candidate, on random Llamas, on the CPU.

One pass is PopulationModel; candidate after candidate is LiveModel.apply and the same decode loop,
on the same module. Both answer the same prompts to their full length. The last line is one JSON
object: `population_gain` is that of 12 candidates x 2 prompts in fp32 on 20 M parameters, `table`
the rest, `equal_tokens` the share of tokens at which one pass says what the merged model says, up
to the first difference of an answer (after it the two read different texts). `--quick` measures
`population_gain` alone. With `--threads 1` seconds are the process's own on the CPU, so that a busy
machine does not count. The shape is that of answering.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evomerge.answering.hf.decode import Output, decode
from evomerge.answering.hf.population import PopulationModel
from evomerge.answering.hf.sampling import SamplingParams
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.live import LiveModel
from evomerge.recipe import Recipe, task_arithmetic_recipe

CANDIDATES, ROUNDS, ENOUGH = 12, 5, 45.0  # seconds after which no other round begins
SIZES = {
    "20M": {"hidden_size": 256, "intermediate_size": 640},
    "9M": {"hidden_size": 192, "intermediate_size": 384},
}
DTYPES = ("float32", "bfloat16")
WORK = ((2, 32), (8, 32), (24, 32))  # prompts, new tokens
LAYERS, VOCABULARY, PROMPT = 24, 2000, (12, 20)  # tokens of a prompt


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="only the figure that the tests require"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    table: dict[str, float] = {}
    equal: dict[str, float] = {}
    for size in list(SIZES)[: 1 if args.quick else None]:
        for dtype in DTYPES[: 1 if args.quick else None]:
            with tempfile.TemporaryDirectory(prefix="evomerge-bench-") as folder:
                case = Case(Path(folder), SIZES[size], dtype, clock)
                for prompts, tokens in WORK[: 1 if args.quick else None]:
                    key = f"{size}_{dtype}_{prompts}"
                    table[key], equal[key] = case.measure(prompts, tokens)
                    what = (
                        f"{case.parameters / 1e6:.1f} M, {dtype}, {CANDIDATES} candidates x "
                        f"{prompts} prompts x {tokens} tokens"
                    )
                    print(
                        f"{what}: {table[key]:.2f} times as fast, {equal[key]:.1%} of the "
                        "tokens are the same",
                        flush=True,
                    )
    gain = table.pop("20M_float32_2")
    print(
        json.dumps(
            {
                "population_gain": gain,
                "table": table,
                "equal_tokens": equal,
                "threads": torch.get_num_threads(),
            }
        )
    )


class Case:
    """One pair of models, and recipes with a weight for every second layer."""

    def __init__(
        self, folder: Path, shape: Mapping[str, Any], dtype: str, clock: Callable[[], float]
    ) -> None:
        self.clock = clock
        base, sibling = make_pair(folder, shape)
        self.model: Any = LlamaForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
        self.live = LiveModel(
            self.model, open_model(base), [open_model(sibling)], residency="device"
        )
        self.population = PopulationModel(self.model, self.live)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        generator = torch.Generator().manual_seed(1)
        slices = [(i, i + 2) for i in range(0, LAYERS, 2)]
        self.recipes: list[Recipe] = [
            task_arithmetic_recipe(
                base,
                [sibling],
                slices,
                torch.rand(len(slices), 1, generator=generator).mul(2).tolist(),
                dtype,
            )
            for _ in range(CANDIDATES)
        ]

    def measure(self, prompts: int, tokens: int) -> tuple[float, float]:
        """How many times as fast one pass is, and the share of equal tokens."""
        generator = torch.Generator().manual_seed(2)
        lengths = torch.randint(*PROMPT, (prompts,), generator=generator).tolist()
        ids = [
            torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
            for length in lengths
        ]
        params = SamplingParams(tokens)  # no token ends an answer

        def one_pass() -> list[list[Output]]:
            with self.population.of(self.recipes) as answer:
                outputs = answer(
                    [c for c in range(CANDIDATES) for _ in ids], ids * CANDIDATES, params
                )
            return [outputs[c * prompts : (c + 1) * prompts] for c in range(CANDIDATES)]

        def one_by_one() -> list[list[Output]]:
            return [self._apply_and_answer(recipe, ids, params) for recipe in self.recipes]

        equal = share_of_equal(one_pass(), one_by_one())  # the warm-up as well
        rounds: list[tuple[float, float]] = []
        while len(rounds) < ROUNDS and sum(map(sum, rounds)) < ENOUGH:
            rounds.append((self.seconds(one_pass), self.seconds(one_by_one)))
        fast, slow = zip(*rounds, strict=True)
        print(
            f"    one pass {statistics.median(fast):.2f} s, one by one "
            f"{statistics.median(slow):.2f} s"
        )
        return round(statistics.median(s / f for s, f in zip(slow, fast, strict=True)), 2), round(
            equal, 3
        )

    def seconds(self, work: Callable[[], object]) -> float:
        began = self.clock()
        work()
        return self.clock() - began

    def _apply_and_answer(
        self, recipe: Recipe, ids: list[list[int]], params: SamplingParams
    ) -> list[Output]:
        self.live.apply(recipe)
        return decode(self.model, ids, params)


def make_pair(folder: Path, shape: Mapping[str, Any]) -> tuple[str, str]:
    """A base, and a sibling made from it by adding a tenth of noise."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=LAYERS,
        vocab_size=VOCABULARY,
        num_attention_heads=shape["hidden_size"] // 64,
        **shape,
        initializer_range=0.05,
    )
    base = LlamaForCausalLM(config)
    sibling = copy.deepcopy(base)
    with torch.no_grad():
        for p in sibling.parameters():
            p.add_(0.1 * p.std().nan_to_num(0.1) * torch.randn_like(p))
    for name, model in (("base", base), ("sibling", sibling)):
        model.save_pretrained(folder / name)
    return str(folder / "base"), str(folder / "sibling")


def share_of_equal(ours: list[list[Output]], theirs: list[list[Output]]) -> float:
    """Tokens before the first difference, over all tokens."""
    same = total = 0
    for a, b in zip(
        (o for row in ours for o in row), (o for row in theirs for o in row), strict=True
    ):
        differs = (i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y)
        same, total = same + next(differs, len(b.tokens)), total + len(b.tokens)
    return same / total


if __name__ == "__main__":
    main()
