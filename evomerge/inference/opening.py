"""Opening what answers: a model folder, a recipe or a study's winner in memory, or a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import InputError, ModelError, StudyError
from evomerge.knowledge.chooser import open_knowledge
from evomerge.knowledge.classification.by_model import ModelClassifier
from evomerge.knowledge.read_base import read_knowledge
from evomerge.study import GenomeSection, PromptSection, Study, TaskSource, overridden

if TYPE_CHECKING:  # answers of a server need no torch
    from evomerge.answering.engine import Engine
    from evomerge.knowledge.chooser import Chooser
    from evomerge.merging.checkpoints.model_folder import ModelFolder
    from evomerge.recipe import Recipe

PRECISIONS = ("bfloat16", "float16", "float32")  # of search.dtype
BATCH_SIZE = 64  # prompts per batch, without a study; halved when memory runs out
# the keys of a study file that inference uses
USED = ("prompt", "generation", "engine", "search.dtype", "search.seed")


@dataclass(frozen=True)
class Opened:
    """What answers, and its settings; the engine is loaded when it is first used.

    `identity` names all that its answers depend on besides the prompts, `model` what of it are
    weights.
    """

    load: Callable[[], Engine]
    study: Study
    model: object
    identity: str | None = None  # None: the engine says

    @property
    def prompt(self) -> PromptSection:
        """How tasks become prompts."""
        return self.study.prompt

    @cached_property
    def engine(self) -> Engine:
        """The engine, ready to answer. Raises EngineError, ModelError."""
        return self.load()


def open_study(
    url: str, name: str, overrides: Sequence[str], say: Callable[[str], None] = lambda line: None
) -> Opened:
    """A study's engine and prompts with the winner's weights; no merged folder is needed.

    Raises StudyError.
    """
    from evomerge.searching.prepare import open_models
    from evomerge.searching.snapshot import load_snapshot

    snapshot = load_snapshot(url, name)
    study = _seeded(overridden(snapshot.study, overrides, USED))
    facts = snapshot.ledger.facts
    if any(override.startswith("prompt.knowledge=") for override in overrides):
        if study.prompt.knowledge != snapshot.study.prompt.knowledge:
            say(
                f"note: study {name} was searched with different prompts: its verdict does not "
                "hold for answers with this knowledge base"
            )
    elif study.prompt.knowledge is not None:
        check_unchanged_base(study.prompt.knowledge, facts.knowledge, name)
    base, siblings = open_models(snapshot.study)

    def load() -> Engine:
        engine = _engine(base, siblings, study)
        if study.engine.threads is None and facts.threads is not None:
            import torch

            torch.set_num_threads(facts.threads)  # as the search did
        if study.engine == snapshot.study.engine:
            engine.limits.update(facts.limits)
        if snapshot.verdict is None:
            say(f"study {name} is not finished: the best trial so far is used")
        engine.apply(snapshot.recipe)
        return engine

    return _opened(load, study, snapshot.recipe.digest(), dict(facts.models))


def open_folder(ref: str, overrides: Sequence[str]) -> Opened:
    """A model folder or hub name, in its own precision unless search.dtype sets another.

    Raises ModelError.
    """
    from evomerge.merging.checkpoints.fingerprint import combined, fingerprint
    from evomerge.merging.checkpoints.open_model import open_model

    folder = open_model(ref)
    key = "dtype" if folder.config.get("dtype") else "torch_dtype"
    dtype = str(folder.config.get(key) or PRECISIONS[0])
    if dtype not in PRECISIONS and not any(o.startswith("search.dtype") for o in overrides):
        raise ModelError(
            f"`{key}` in config.json cannot be used",
            where=folder.path,
            found=dtype,
            remedy=f"Set it to {', '.join(PRECISIONS)}, or add --set search.dtype={PRECISIONS[0]}.",
        )
    study = _seeded(overridden(_study(dtype, folder.config), overrides, USED))
    prints = combined(fingerprint(folder.path))
    return _opened(lambda: _engine(folder, [], study), study, "", prints)


def open_merged(
    recipe: Recipe | Path, overrides: Sequence[str], say: Callable[[str], None] = lambda line: None
) -> Opened:
    """A recipe, or the mergekit configuration in a file, merged in place.

    Its models' paths resolve as in `evomerge merge`. Raises RecipeError, ModelError.
    """
    from evomerge.merging.checkpoints.fingerprint import combined, fingerprint
    from evomerge.merging.open_recipe import open_recipe
    from evomerge.merging.vocabulary.chat_templates import chat_template_of
    from evomerge.recipe import read_recipe

    if isinstance(recipe, Path):
        if not recipe.is_file():
            raise InputError("no such recipe", where=recipe, remedy="Name a mergekit YAML.")
        recipe = read_recipe(recipe)
    if recipe.note is not None:
        say(recipe.note)
    models = open_recipe(recipe)
    base, *siblings = models.values()
    study = _seeded(overridden(_study(_dtype(recipe), base.config), overrides, USED))
    merged, template = recipe, chat_template_of(recipe, models)

    def load() -> Engine:
        # a single model is merged too: scaled, or with its layers moved
        engine = _engine(base, siblings or [base], study)
        engine.apply(merged)
        if template is not None:
            engine.tokenizer.chat_template = template
        return engine

    prints = {ref: combined(fingerprint(model.path)) for ref, model in models.items()}
    opened = _opened(load, study, recipe.digest(), prints)
    return replace(opened, model=(opened.model, template))


def open_server_at(
    url: str, model: str | None, overrides: Sequence[str], concurrency: int | None
) -> Opened:
    """An OpenAI-compatible server. Raises InputError, ModelError, EngineError."""
    from evomerge.answering.servers.engine import CONCURRENCY, ServerEngine
    from evomerge.answering.servers.openai_protocol import server_url

    study = overridden(_study("bfloat16"), overrides, ("prompt", "generation"))
    chat = study.prompt.format == "chat"

    def load() -> Engine:
        variables = study.prompt.chat_template_kwargs
        rows = concurrency or CONCURRENCY
        return ServerEngine(url, model, study.generation, chat, rows, variables)

    return Opened(load, study, (server_url(url), model))


def open_chooser(opened: Opened, classify: str, say: Callable[[str], None]) -> Chooser | None:
    """What chooses classes and examples, where there is a knowledge base.

    Classes are chosen by the nearest examples (`neighbours`), by the `model` that answers, or by
    `both`. Raises KnowledgeError, InputError.
    """
    if classify == "neighbours":
        return open_knowledge(opened.prompt, say)
    from evomerge.answering.prompts import make_prompter

    engine = opened.engine
    likelihood = engine.likelihood
    if likelihood is None:
        raise InputError(
            "needs a transformers model",
            where="--classify",
            found=classify,
            remedy="Use --classify neighbours.",
        )
    render = make_prompter(engine.tokenizer, opened.prompt).render
    return open_knowledge(
        opened.prompt,
        say,
        classify,
        lambda knowledge: ModelClassifier(knowledge, likelihood, render),
    )


def open_prompt(
    overrides: Sequence[str], url: str | None = None, name: str | None = None
) -> PromptSection:
    """The prompt settings alone, of a study or the defaults. Raises StudyError, InputError."""
    if url is None or name is None:
        return overridden(_study("bfloat16"), overrides, USED).prompt
    from evomerge.searching.snapshot import load_snapshot

    return overridden(load_snapshot(url, name).study, overrides, USED).prompt


def _seeded(study: Study) -> Study:
    """The settings with the seed filled in, from which retries derive other seeds."""
    own = study.generation.seed
    seed = study.search.seed if own is None else own
    return study.replace(generation=study.generation.replace(seed=seed))


def _study(dtype: str, config: Mapping[str, Any] | None = None) -> Study:
    """The defaults of a study file, without a search; answers leave half of a small context."""
    # a study needs a genome, but inference does not read it
    genome = GenomeSection(models=("-",), base_model="none")
    study = Study(genome=genome, tasks=(TaskSource(file="-"),), study="inference")
    context = (config or {}).get("max_position_embeddings")
    if isinstance(context, int):
        longest = max(1, min(study.generation.max_new_tokens, context // 2))
        study = study.replace(generation=study.generation.replace(max_new_tokens=longest))
    # any of torch's names, not validated yet: `overridden` refuses those that are not supported
    search = study.search.model_copy(update={"dtype": dtype})
    return study.replace(engine=study.engine.replace(batch_size=BATCH_SIZE), search=search)


def _engine(base: ModelFolder, siblings: Sequence[ModelFolder], study: Study) -> Engine:
    from evomerge.answering.engine import EngineSpec
    from evomerge.answering.make_engine import make_engine

    return make_engine(EngineSpec.of_study(study, base, siblings))


def _dtype(recipe: Recipe) -> str:
    return str(recipe.out_dtype or recipe.dtype or "bfloat16")


def _opened(
    load: Callable[[], Engine], study: Study, recipe: str, models: Mapping[str, Any] | str
) -> Opened:
    """With the identity by which runs of all versions are resumed."""
    s = study.search
    settings = (study.generation, study.prompt.too_long, study.engine, s.dtype, s.seed)
    return Opened(load, study, (recipe, models), repr((recipe, models, *settings)))


def check_unchanged_base(path: str, digest: str | None, name: str) -> None:
    """Raise StudyError unless the knowledge base is the one that the search used."""
    if read_knowledge(path).digest() != digest:
        raise StudyError(
            "the knowledge base has changed since the search",
            where=name,
            found=path,
            remedy="Restore it, or name it with --knowledge.",
        )
