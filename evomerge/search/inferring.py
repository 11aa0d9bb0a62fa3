"""Engines for inference: a model as it lies on disk, or a study's winner merged in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from evomerge.answering.engine import Engine, make_engine
from evomerge.answering.prompts import Prompter, make_prompter
from evomerge.merging.fingerprint import combined, fingerprint
from evomerge.merging.folder import open_model
from evomerge.search.session import load_finished, open_models
from evomerge.study import EngineSection, GenerationSection, PromptSection


def study_engine(url: str, name: str, overrides: Mapping[str, Any]) -> tuple[Engine, Prompter, str]:
    """The study's own engine and prompts with the winner's weights, and what its answers depend on; no merged folder is needed."""
    finished = load_finished(url, name)
    study = finished.study
    base, siblings = open_models(study)
    generation, prompt, engine_section = _overridden(study.generation, study.prompt, study.engine, overrides)
    engine = make_engine(base, siblings, engine_section, generation, study.search.dtype, study.search.seed, prompt.too_long)
    engine.limits.update(finished.ledger.facts.get("limits", {}))
    engine.apply(finished.recipe)
    identity = repr((finished.recipe.digest(), finished.ledger.facts["models"], generation, prompt.too_long, engine_section))
    return engine, make_prompter(engine.tokenizer, prompt), identity


def model_engine(ref: str, overrides: Mapping[str, Any]) -> tuple[Engine, Prompter, str]:
    """A model folder or hub name in the precision it has on disk, and what its answers depend on."""
    folder = open_model(ref)
    generation, prompt, engine_section = _overridden(GenerationSection(), PromptSection(), EngineSection(), overrides)
    dtype = str(folder.config.get("dtype") or folder.config.get("torch_dtype") or "bfloat16")
    engine = make_engine(folder, [], engine_section, generation, dtype, too_long=prompt.too_long)
    identity = repr((combined(fingerprint(folder.path)), generation, prompt.too_long, engine_section))
    return engine, make_prompter(engine.tokenizer, prompt), identity


def _overridden(
    generation: GenerationSection, prompt: PromptSection, engine: EngineSection, overrides: Mapping[str, Any]
) -> tuple[GenerationSection, PromptSection, EngineSection]:
    if "max_new_tokens" in overrides:
        generation = replace(generation, max_new_tokens=overrides["max_new_tokens"])
    if "format" in overrides:
        prompt = replace(prompt, format=overrides["format"], template=None)
    if "batch_size" in overrides:
        engine = replace(engine, batch_size=overrides["batch_size"])
    return generation, prompt, engine
