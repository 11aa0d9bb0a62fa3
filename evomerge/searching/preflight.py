"""What a study will need before it runs: models, tokenizers, tasks, judge, memory, disk, cost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evomerge.console import size
from evomerge.errors import EvomergeError, ModelError
from evomerge.genome.weights import Genome, make_genome
from evomerge.masking import masked
from evomerge.merging.checkpoints.compatibility import check_fit
from evomerge.merging.checkpoints.model_folder import ModelFolder
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.study import JUDGE_MODEL, SUBSET, Study

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
WAITING = {
    "auto": "on the device where they fit, else on the host, else on disk",
    "device": "on the device too",
    "host": "in host memory, streamed",
    "disk": "streamed from disk",
}


@dataclass(frozen=True)
class PreflightFinding:
    """One finding.

    `level` is ok, low (it may not suffice), unknown (it could not be reached) or wrong.
    """

    level: str
    subject: str
    text: str


def check_study(study: Study, base_config: Path | None = None) -> list[PreflightFinding]:
    """Every finding, good or bad; nothing is raised for what a user can fix."""
    check = Preflight(study)
    check.run(base_config)
    return check.lines


@dataclass
class Preflight:
    """Collects the findings on one study."""

    study: Study
    lines: list[PreflightFinding] = field(default_factory=list)

    def add(self, level: str, subject: str, text: str) -> None:
        """Add one finding."""
        self.lines.append(PreflightFinding(level, subject, masked(text)))

    def run(self, base_config: Path | None) -> None:
        """Check everything; `base_config` is used when the base cannot be reached."""
        config = None if base_config is None else self.config_file(base_config)
        config = self.models() or config
        counts = self.tasks()
        self.judge()
        if config is None:
            text = "no model configuration; give one with --base-config FILE"
            self.add("unknown", "slices, memory, disk", text)
            return
        try:
            genome = make_genome(self.study, config["num_hidden_layers"])
            self.slices(genome)
            self.memory_and_disk(config)
            self.add("ok", "cost", cost(self.study, genome, counts))
        except (EvomergeError, KeyError) as error:
            self.add("wrong", "slices, memory, disk", str(error))

    def judge(self) -> None:
        """Check the judge; a server is not contacted."""
        j = self.study.judge
        if j.kind not in ("llm", "cascade"):
            self.add("ok", "judge", f"{j.kind}, offline, metric {j.metric}")
            return
        limits = []
        for key in ("max_requests", "max_tokens", "max_cost"):
            value = getattr(j, key)
            if value is not None:
                limits.append(f"{key} {value:g}")
        url = j.base_url or os.environ.get("OPENAI_BASE_URL") or "OpenAI"
        named = j.model or os.environ.get(JUDGE_MODEL) or "the only model"
        text = (
            f"{named} at {url}, {j.votes} vote(s) for an answer, {j.concurrency} concurrent "
            "requests, "
            f"budget: {', '.join(limits) or 'none'}"
        )
        if j.kind == "cascade":
            text += f"; {j.file} first, wrong better halves at most {j.error:g}"
        if url == "OpenAI" and not os.environ.get("OPENAI_API_KEY"):
            self.add("wrong", "judge", f"{text}; OPENAI_API_KEY is not set")
        else:
            self.add("ok", "judge", text)

    def config_file(self, path: Path) -> dict[str, Any] | None:
        """A model's config.json; None when it cannot be read."""
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError("not an object")
        except (OSError, ValueError) as error:
            self.add("wrong", "--base-config", f"{path}: {error}")
            return None
        return config

    def models(self) -> dict[str, Any] | None:
        """The base's configuration, when every model can be reached."""
        opened, study = [], self.study
        refs = study.genome.all_models
        for ref in refs:
            role = "base" if ref == study.genome.base_model else "sibling"
            try:
                opened.append(open_model(ref))
                self.add("ok", role, ref)
            except ModelError as error:
                self.add("wrong" if Path(ref).is_absolute() else "unknown", role, str(error))
        if len(opened) != len(refs):
            return None
        try:
            check_fit(opened[0], opened[1:], same_vocabulary=study.genome.tokenizer_source is None)
            text = f"{len(opened[0].keys)} tensors, the same in every model"
            self.add("ok", "shapes", text)
            self.prompts(opened[0])
        except EvomergeError as error:
            self.add("wrong", "fit", str(error))
        return dict(opened[0].config)

    def prompts(self, base: ModelFolder) -> None:
        """The tokenizer's chat template and the knowledge base. Raises EvomergeError."""
        from evomerge.answering.hf.loading import load_tokenizer
        from evomerge.answering.prompts import make_prompter
        from evomerge.knowledge.chooser import open_knowledge

        study = self.study
        tokenizer = load_tokenizer(base, study.engine.trust_remote_code)
        if study.lm_eval:
            if not study.apply_chat_template:
                self.add("ok", "tokenizer", "lm-eval's prompts, without the chat template")
            elif tokenizer.chat_template:
                self.add("ok", "tokenizer", "lm-eval's prompts, with the chat template")
            else:
                text = "it has no chat template; set `apply_chat_template: false`"
                self.add("wrong", "tokenizer", text)
            return
        make_prompter(tokenizer, study.prompt)
        self.add("ok", "tokenizer", f"prompts in format {study.prompt.format}")
        chooser = open_knowledge(study.prompt, lambda note: self.add("unknown", "knowledge", note))
        if chooser is not None:
            found = chooser.knowledge
            text = f"{len(found.classes)} classes, {len(found.examples)} examples"
            self.add("ok", "knowledge", text)

    def tasks(self) -> tuple[int, int, int] | None:
        """Numbers of search, validation and held-out tasks; None when they are not known."""
        from evomerge.searching.prepare import study_tasks
        from evomerge.tasks import split_tasks

        parts = self.study.split
        try:
            tasks = study_tasks(self.study)
            split = split_tasks(tasks, parts.held_out, parts.seed, parts.validation)
        except EvomergeError as error:
            local = any(source.file or source.name for source in self.study.tasks)
            self.add("wrong" if local else "unknown", "tasks", str(error))
            return None
        counts = len(split.search), len(split.validation), len(split.held_out)
        searched, kept, held_out = counts
        text = f"{searched} to search on, {held_out} held out"
        if kept:
            text += f", {kept} to validate the finalists"
        self.add("ok", "tasks", text)
        return counts

    def slices(self, genome: Genome) -> None:
        """Check what is searched."""
        plain = genome.dimensions == len(genome.slices) * len(genome.siblings)
        self.add(
            "ok",
            "slices",
            f"{len(genome.slices)} of {genome.slices[0][1]} layers x {len(genome.siblings)} "
            f"sibling(s) = {genome.dimensions} {'weights' if plain else 'numbers'}",
        )

    def memory_and_disk(self, config: Mapping[str, Any]) -> None:
        """The live model, its cache, the other models, and an exported one."""
        from evomerge.merging.checkpoints.size import count_parameters, kv_cache_bytes

        study, engine = self.study, self.study.engine
        parameters = count_parameters(config)
        model = parameters * BYTES[study.search.dtype]
        positions = engine.batch_size * (study.generation.max_new_tokens + 512)
        copies = len(study.genome.all_models)
        live = size(live_bytes(study, config, parameters))
        self.add(
            "ok",
            "memory",
            f"{_millions(parameters)} parameters, {live} live in "
            f"{engine.quantization or study.search.dtype}, about "
            f"{size(kv_cache_bytes(config, positions))} of keys and values ({engine.batch_size} "
            f"answers per batch); base and siblings: {size(copies * model)}, "
            f"{WAITING[engine.residency]}",
        )
        free = shutil.disk_usage(Path.cwd()).free
        text = f"{size(copies * model)} of models and {size(model)} for an exported one"
        level = "ok" if free > model * (1 + copies) else "low"
        self.add(level, "disk", f"{text}; {size(free)} free here")


def live_bytes(study: Study, config: Mapping[str, Any], parameters: int) -> float:
    """The size of the live model.

    In 4 bits, linears take half a byte and a scale for each 64 numbers; embeddings and head stay.
    """
    whole = BYTES[study.search.dtype]
    if study.engine.quantization is None:
        return parameters * whole
    rows = int(config["vocab_size"]) * int(config["hidden_size"])
    if not config.get("tie_word_embeddings"):
        rows *= 2
    # double: a scale is a byte, and has its own scale
    scales = 4 / 64 if study.engine.quantization == "4bit" else 1 / 64 + 4 / (64 * 256)
    return rows * whole + (parameters - rows) * (0.5 + scales)


def cost(study: Study, genome: Genome, counts: tuple[int, int, int] | None) -> str:
    """How many candidates, answers and requests a search has; `counts` as of `Preflight.tasks`."""
    from evomerge.searching.samplers.cmaes_adapter import default_population

    s = study.search
    population = s.population or default_population(genome.dimensions)
    # without a complete generation there is no mean
    fixed = len(genome.references(s.uniform)) + (s.trials >= population)
    text = (
        f"{s.trials} candidates in generations of {population}, {s.trials + fixed} with parents, "
        "uniform weights and the mean"
    )
    if counts is None:
        return text + "; the number of tasks is not known"
    searched, kept, held_out = counts
    ranked = searched if s.ranking == "all" else min(searched, s.subset or SUBSET)
    answers = s.trials * ranked + fixed * searched
    answers += (s.finalists + 1) * kept + (2 + len(study.genome.all_models)) * held_out
    if study.lm_eval:
        return f"{text}; {answers:,} answers to documents"
    more = ""
    if s.ranking != "all" and ranked != searched:
        more = " or more, because a generation answers more tasks as the step size shrinks"
    tokens = study.generation.max_new_tokens
    judging = judging_cost(study, answers)
    return f"{text}; {answers:,} answers{more} of at most {tokens} tokens; {judging}"


def judging_cost(study: Study, answers: int) -> str:
    """How many requests the judge may need."""
    requests = f"{answers * study.judge.votes:,} requests to the judge"
    if study.judge.kind == "cascade":
        return f"at most {requests}, fewer where the learned judge decides"
    if study.judge.kind == "llm":
        return f"{requests} at most, before retries: equal answers are graded once"
    return "the judge costs nothing"


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
