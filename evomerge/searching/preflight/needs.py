"""What a study needs: memory, disk, answers, requests."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.console import counted, size
from evomerge.genome.genome import Genome
from evomerge.merging.architecture.text_config import text_config
from evomerge.merging.checkpoints.config_defaults import config_value
from evomerge.searching.preflight.findings import Findings
from evomerge.study import Study
from evomerge.tasks import Split

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
WAITING = {
    "auto": "on the device where they fit, else on the host, else on disk",
    "device": "on the device too",
    "host": "in host memory, streamed",
    "disk": "streamed from disk",
}


def check_slices(findings: Findings, genome: Genome) -> None:
    """What is searched."""
    plain = genome.dimensions == len(genome.slices) * len(genome.siblings)
    siblings = counted(len(genome.siblings), "sibling")
    findings.add(
        "ok",
        "slices",
        f"{len(genome.slices)} of {genome.slices[0][1]} layers x {siblings} = "
        f"{genome.dimensions} {'weights' if plain else 'numbers'}",
    )


def check_memory_and_disk(findings: Findings, study: Study, config: Mapping[str, Any]) -> None:
    """The live model, its cache, the other models, and an exported one."""
    from evomerge.merging.checkpoints.size import count_parameters
    from evomerge.merging.memory_plan import batch_cache_bytes

    engine, width = study.engine, BYTES[study.search.dtype]
    parameters = count_parameters(config)
    model = parameters * width
    new = study.generation.max_new_tokens
    cache = batch_cache_bytes(config, engine.batch_size, new, width, engine.batch_tokens)
    copies = len(study.genome.all_models)
    live = size(live_bytes(config, parameters, width, engine.quantization))
    findings.add(
        "ok",
        "memory",
        f"{_millions(parameters)} parameters, {live} live in "
        f"{engine.quantization or study.search.dtype}, about "
        f"{size(cache)} of keys and values ({engine.batch_size} "
        f"answers per batch); base and siblings: {size(copies * model)}, "
        f"{WAITING[engine.residency]}",
    )
    free = shutil.disk_usage(Path.cwd()).free
    text = f"{size(copies * model)} of models and {size(model)} for an exported one"
    level = "ok" if free > model * (1 + copies) else "low"
    findings.add(level, "disk", f"{text}; {size(free)} free here")


def live_bytes(
    config: Mapping[str, Any], parameters: int, width: int, quantization: str | None
) -> float:
    """The size of the live model, of so many bytes a number unless it is quantised.

    In 4 bits, linears take half a byte and a scale for each 64 numbers; embeddings and head stay.
    """
    if quantization is None:
        return parameters * width
    text = text_config(config)
    rows = int(config_value(text, "vocab_size")) * int(config_value(text, "hidden_size"))
    if not config_value(config, "tie_word_embeddings"):
        rows *= 2
    scales = 4 / 64
    if quantization != "4bit":  # double: a scale is a byte, and has its own scale
        scales = 1 / 64 + 4 / (64 * 256)
    return rows * width + (parameters - rows) * (0.5 + scales)


def cost(study: Study, genome: Genome, split: Split | None) -> str:
    """How many candidates, answers and requests a search has."""
    from evomerge.searching.front.make_front import MOST
    from evomerge.searching.samplers.cmaes_adapter import default_population
    from evomerge.searching.samplers.pareto import simplex

    s, several = study.search, len(study.objective.several)
    population = s.population or default_population(genome.dimensions)
    # without a complete generation there is no mean
    references = len(genome.references(s.uniform))
    means = len(simplex(several)) if several else 1
    fixed = references + means * (s.trials >= population)
    text = (
        f"{s.trials} candidates in generations of {population}, {s.trials + fixed} with parents, "
        f"uniform weights and {f'{means} means' if several else 'the mean'}"
    )
    if split is None:
        return text + "; the number of tasks is not known"
    searched, kept, held_out = map(len, (split.search, split.validation, split.held_out))
    ranked = s.first_tasks(searched)
    answers = s.trials * ranked + fixed * searched
    finalists = fixed
    if not several:
        finalists = s.finalists + 1 + min(s.finalists, references)
    answers += finalists * kept
    compared = (MOST if several else 1) + 1 + len(study.genome.all_models)
    answers += compared * held_out
    if study.lm_eval:
        return f"{text}; {answers:,} answers to documents"
    least, more = "", ""
    if s.ranking != "all" and ranked != searched:
        least = "at least "
        more = " (a generation answers more tasks as the step size shrinks)"
    answered = f"{least}{answers:,} answers of at most {study.generation.max_new_tokens} tokens"
    return f"{text}; {answered}{more}; {judging_cost(study, answers)}"


def judging_cost(study: Study, answers: int) -> str:
    """How many requests the judge may need."""
    requests = f"{answers * study.judge.votes:,} requests to the judge"
    if study.judge.kind == "cascade":
        return f"at most {requests}, fewer where the learned judge decides"
    if study.judge.kind == "llm":
        return f"{requests} at most, before retries: equal answers are graded once"
    return "the judge costs nothing"


def _millions(count: int) -> str:
    if count >= 1e9:
        return f"{count / 1e9:.2f} B"
    return f"{count / 1e6:.1f} M"
