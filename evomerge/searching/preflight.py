"""What a study will need, before any work: models, shapes, tokenizers, disk, memory, judge, cost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import EvomergeError, ModelError
from evomerge.genome.weights import Genome, make_genome
from evomerge.study import JUDGE_MODEL, SUBSET, Study

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Line:
    """One finding: `level` is ok, low (it may not suffice), unknown (it could not be reached) or
    wrong.
    """

    level: str
    subject: str
    text: str


WAITING = {
    "auto": "on the device where they fit, else on the host, else on disk",
    "device": "beside it",
    "host": "in host memory, streamed",
    "disk": "streamed from disk",
}


def check_study(study: Study, base_config: Path | None = None) -> list[Line]:
    """Every finding, good or bad; nothing is raised for what a user can mend."""
    lines: list[Line] = []
    config = _config_file(base_config, lines) if base_config else None
    config = _check_models(study, lines) or config
    n_tasks = _check_tasks(study, lines)
    lines.append(_judge(study))
    if config is None:
        lines.append(
            Line(
                "unknown",
                "slices, memory, disk",
                "no model configuration; give one with --base-config FILE",
            )
        )
        return lines
    try:
        _size_up(study, config, n_tasks, lines)
    except (EvomergeError, KeyError) as error:
        lines.append(Line("wrong", "slices, memory, disk", str(error)))
    return lines


def _judge(study: Study) -> Line:
    """Who grades; a server is not asked here."""
    j = study.judge
    if j.kind not in ("llm", "cascade"):
        return Line("ok", "judge", f"{j.kind}, offline, metric {j.metric}")
    limits = [
        f"{key} {value:g}"
        for key in ("max_requests", "max_tokens", "max_cost")
        if (value := getattr(j, key)) is not None
    ]
    url = j.base_url or os.environ.get("OPENAI_BASE_URL") or "OpenAI"
    who = j.model or os.environ.get(JUDGE_MODEL) or "the only model"
    text = f"{who} at {url}, {j.votes} vote(s) for an answer, {j.concurrency} requests at once, budget: {', '.join(limits) or 'none'}"
    if j.kind == "cascade":
        text += f"; {j.file} first, wrong halves at most {j.error:g}"
    if url == "OpenAI" and not os.environ.get("OPENAI_API_KEY"):
        return Line("wrong", "judge", f"{text}; OPENAI_API_KEY is not set")
    return Line("ok", "judge", text)


def _config_file(path: Path, lines: list[Line]) -> dict[str, Any] | None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        lines.append(Line("wrong", "--base-config", f"{path}: {error}"))
        return None
    return config


def _check_models(study: Study, lines: list[Line]) -> dict[str, Any] | None:
    """The base's configuration, when it can be reached."""
    from evomerge.answering.hf.loading import load_engine_tokenizer
    from evomerge.answering.prompts import make_prompter
    from evomerge.merging.checkpoints.compatibility import check_fit
    from evomerge.merging.checkpoints.open_model import open_model

    opened = []
    refs = study.genome.all_models
    for ref in refs:
        role = "base" if ref == study.genome.base_model else "sibling"
        try:
            opened.append(open_model(ref))
            lines.append(Line("ok", role, ref))
        except ModelError as error:
            lines.append(Line("wrong" if Path(ref).is_absolute() else "unknown", role, str(error)))
    if len(opened) != len(refs):
        return None
    try:
        check_fit(opened[0], opened[1:], same_vocabulary=study.genome.tokenizer_source is None)
        lines.append(
            Line("ok", "shapes", f"{len(opened[0].keys)} tensors, the same in every model")
        )
        tokenizer = load_engine_tokenizer(opened[0], study.engine.trust_remote_code)
        if study.lm_eval:
            lines.append(_check_chat(study, bool(tokenizer.chat_template)))
        else:
            make_prompter(tokenizer, study.prompt)
            lines.append(Line("ok", "tokenizer", f"prompts in format {study.prompt.format}"))
            _check_knowledge(study, lines)
    except EvomergeError as error:
        lines.append(Line("wrong", "fit", str(error)))
    return dict(opened[0].config)


def _check_knowledge(study: Study, lines: list[Line]) -> None:
    """The base that the prompts come from. Raises KnowledgeError, InputError."""
    from evomerge.knowledge.open import open_knowledge

    chooser = open_knowledge(
        study.prompt, lambda note: lines.append(Line("unknown", "knowledge", note))
    )
    if chooser is not None:
        base = chooser.knowledge
        lines.append(
            Line("ok", "knowledge", f"{len(base.classes)} classes, {len(base.examples)} examples")
        )


def _check_chat(study: Study, has_template: bool) -> Line:
    if study.apply_chat_template and not has_template:
        return Line(
            "wrong", "tokenizer", "it has no chat template; set `apply_chat_template: false`"
        )
    return Line(
        "ok",
        "tokenizer",
        f"lm-eval's prompts, {'with' if study.apply_chat_template else 'without'} the chat template",
    )


def _check_tasks(study: Study, lines: list[Line]) -> tuple[int, int, int] | None:
    """Numbers of search, validation and held-out tasks."""
    from evomerge.searching.session import study_tasks
    from evomerge.tasks import split_tasks

    try:
        tasks = study_tasks(study)
        split = split_tasks(tasks, study.split.held_out, study.split.seed, study.split.validation)
    except EvomergeError as error:
        lines.append(
            Line(
                "wrong" if any(s.file or s.name for s in study.tasks) else "unknown",
                "tasks",
                str(error),
            )
        )
        return None
    kept = f", {len(split.validation)} for the choice of the winner" if split.validation else ""
    lines.append(
        Line(
            "ok", "tasks", f"{len(split.search)} to search on, {len(split.held_out)} held out{kept}"
        )
    )
    return len(split.search), len(split.validation), len(split.held_out)


def _size_up(
    study: Study, config: Mapping[str, Any], n_tasks: tuple[int, int, int] | None, lines: list[Line]
) -> None:
    from evomerge.merging.checkpoints.size import count_parameters, kv_cache_bytes

    genome = make_genome(study, config["num_hidden_layers"])
    size = genome.slices[0][1]
    unit = (
        "weights" if genome.dimensions == len(genome.slices) * len(genome.siblings) else "numbers"
    )
    lines.append(
        Line(
            "ok",
            "slices",
            f"{len(genome.slices)} of {size} layers x {len(genome.siblings)} sibling(s) = {genome.dimensions} {unit}",
        )
    )
    parameters = count_parameters(config)
    model = parameters * BYTES[study.search.dtype]
    live = _live_bytes(study, config, parameters)
    cache = kv_cache_bytes(
        config, study.engine.batch_size * (study.generation.max_new_tokens + 512)
    )
    copies = len(study.genome.all_models)
    lines.append(
        Line(
            "ok",
            "memory",
            f"{_millions(parameters)} parameters, {_gb(live)} live in {study.engine.quantization or study.search.dtype}, "
            f"about {_gb(cache)} of keys and values ({study.engine.batch_size} answers at once); base and siblings: "
            f"{_gb(copies * model)}, {WAITING[study.engine.residency]}",
        )
    )
    free = shutil.disk_usage(Path.cwd()).free
    need = model * (1 + copies)
    level = "ok" if free > need else "low"
    lines.append(
        Line(
            level,
            "disk",
            f"{_gb(copies * model)} of models and {_gb(model)} for an exported one; {_gb(free)} free here",
        )
    )
    lines.append(Line("ok", "cost", _cost(study, genome, n_tasks)))


def _live_bytes(study: Study, config: Mapping[str, Any], parameters: int) -> float:
    """The live model: in 4 bits, linears take half a byte and a scale for each 64 numbers;
    embeddings and head stay.
    """
    whole = BYTES[study.search.dtype]
    if study.engine.quantization is None:
        return parameters * whole
    rows = (
        int(config["vocab_size"])
        * int(config["hidden_size"])
        * (1 if config.get("tie_word_embeddings") else 2)
    )
    # double: a byte, and its own scale
    scales = 4 / 64 if study.engine.quantization == "4bit" else 1 / 64 + 4 / (64 * 256)
    return rows * whole + (parameters - rows) * (0.5 + scales)


def _cost(study: Study, genome: Genome, n_tasks: tuple[int, int, int] | None) -> str:
    from evomerge.searching.sampler import default_population

    s = study.search
    population = s.population or default_population(genome.dimensions)
    # without a complete generation there is no mean
    fixed = len(genome.references(s.uniform)) + (s.trials >= population)
    text = f"{s.trials} candidates in generations of {population}, {s.trials + fixed} with parents, uniform weights and the mean"
    if n_tasks is None:
        return text + "; the number of tasks is not known"
    searched, kept, held_out = n_tasks
    ranked = searched if s.ranking == "all" else min(searched, s.subset or SUBSET)
    answers = (
        s.trials * ranked
        + fixed * searched
        + (s.finalists + 1) * kept
        + (2 + len(study.genome.all_models)) * held_out
    )
    if study.lm_eval:
        return f"{text}; {answers:,} times a document is answered"
    at_least = (
        ""
        if s.ranking == "all" or ranked == searched
        else " or more, for a generation answers more tasks as the step size shrinks"
    )
    return f"{text}; {answers:,} answers{at_least} of at most {study.generation.max_new_tokens} tokens; {_judging_cost(study, answers)}"


def _judging_cost(study: Study, answers: int) -> str:
    if study.judge.kind == "cascade":
        return f"at most {answers * study.judge.votes:,} requests to the judge, fewer where the learned one decides"
    if study.judge.kind != "llm":
        return "the judge costs nothing"
    return f"{answers * study.judge.votes:,} requests to the judge at most, before retries: equal answers are graded once"


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
