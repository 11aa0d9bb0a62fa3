"""A folder that answers tasks with a study's winner where evomerge is not installed; its files are
in templates/runner.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from evomerge.answering.prompts import COMPETITION
from evomerge.errors import KnowledgeError
from evomerge.knowledge.chooser import QUOTES, SHOTS
from evomerge.knowledge.classification import linear
from evomerge.knowledge.classification.by_neighbours import CLEAR, LEAST, POWER, ROOT, VOTERS
from evomerge.knowledge.formats.yaml_format import to_yaml
from evomerge.knowledge.records import PLACEHOLDER, Knowledge, KnowledgeClass
from evomerge.knowledge.retrieval import tfidf
from evomerge.merging.checkpoints.new_folder import check_new, new_folder
from evomerge.merging.layout import KNOWN
from evomerge.recipe import Recipe
from evomerge.reporting.export import recipe_text, verdict_markdown
from evomerge.reporting.report import notes
from evomerge.searching.finished import Finished
from evomerge.study import GenerationSection, PromptSection, Study

TEMPLATES = Path(__file__).with_name("templates") / "runner"
FETCHED = ("model*.safetensors", "*.json", "*.jinja", "*.model")  # of a model on the hub
PLAIN = "plain"  # the class of all tasks where there is no base


def write_runner(finished: Finished, folder: Path, knowledge: Knowledge | None) -> list[Path]:
    """Write answer.py and what it reads into a new folder, whole or not at all; returns the files.

    `knowledge` is what gives tasks their class, prompt and settings; None: the study's plain
    prompt. Raises InputError: the folder is there and not empty. KnowledgeError: the study's
    default class is none of the base's. OutputError.
    """
    check_new(folder)
    study, recipe = finished.study, finished.recipe
    texts = {
        "answer.py": (TEMPLATES / "answer.py").read_text(encoding="utf-8"),
        "requirements.txt": _rendered("requirements.txt"),
    }
    texts["recipe.yaml"] = recipe_text(finished)
    texts["settings.yaml"] = _rendered(
        "settings.yaml", study=finished.ledger.name, settings=settings(study, recipe, knowledge)
    )
    if knowledge is not None:
        texts["knowledge.yaml"] = to_yaml(
            replace(knowledge, classes=tuple(_texts_of(c, study.prompt) for c in knowledge.classes))
        )
    texts["README.md"] = _rendered(
        "README.md",
        study=finished.ledger.name,
        models=recipe.models,
        donor=recipe.donor,
        dtype=study.search.dtype,
        mergeable=mergeable(recipe),
        knowledge=knowledge,
        retriever=study.prompt.retriever,
        quantization=study.engine.quantization,
        verdict=verdict_markdown(finished.verdict, finished.winner, notes(finished.ledger.facts)),
    )
    with new_folder(folder) as unfinished:
        for name, text in texts.items():
            (unfinished.path / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def mergeable(recipe: Recipe) -> bool:
    """Whether answer.py merges it: task arithmetic or linear, one number for each slice and model,
    layers and tokens as they are.
    """
    sources = [source for piece in recipe.slices for source in piece.sources]
    ranges = [{source.layers or (-1, -1) for source in piece.sources} for piece in recipe.slices]
    starts, ends = [min(r)[0] for r in ranges], [max(r)[1] for r in ranges]
    weights = [
        source.parameters.get("weight")
        for source in sources
        if source.model != recipe.base_model or recipe.merge_method == "linear"
    ]
    return (
        recipe.merge_method in ("task_arithmetic", "linear")
        and recipe.tokenizer is None
        and all(len(r) == 1 for r in ranges)
        and starts == [0, *ends[:-1]]
        and all(isinstance(weight, int | float) for weight in weights)
        and not any("+" in model for model in recipe.models)
        and set(recipe.parameters) <= {"normalize", "int8_mask"}
    )


def settings(study: Study, recipe: Recipe, knowledge: Knowledge | None) -> dict[str, Any]:
    """What settings.yaml holds. Raises KnowledgeError."""
    kinds = (_plain(),) if knowledge is None else knowledge.classes
    names = [kind.name for kind in kinds]
    default = study.prompt.default_class
    if knowledge is not None and default is not None and default not in names:
        raise KnowledgeError(
            "the default class is none of the base's",
            found=default,
            remedy=f"Classes are: {', '.join(names)}.",
        )
    named = knowledge is not None and default is not None
    return {
        "batch_size": study.engine.batch_size,
        "seed": study.search.seed if study.generation.seed is None else study.generation.seed,
        "stop": list(study.generation.stop),
        "too_long": study.prompt.too_long,
        "chat_template": chat_template(study.prompt),
        "classes": {}
        if knowledge is None
        else {kind.name: _numbers_of(kind, study.generation) for kind in kinds},
        "voting": _voting()
        | {
            "threshold": study.prompt.threshold if named else 0.0,
            "default": default if named else names[0],
        },
        "placeholder": PLACEHOLDER.pattern,
        "plain": _whole(_texts_of(_plain(), study.prompt), study.generation)
        if knowledge is None
        else None,
        "donor": recipe.donor if mergeable(recipe) else None,
        "models": list(recipe.models),
        "norm_and_head_last": sorted(KNOWN),
        "files": list(FETCHED),
    }


def chat_template(prompt: PromptSection) -> str | None:
    """The prompt's format as a Jinja template of turns; None: the tokenizer's own."""
    if prompt.format == "chat":
        return None
    before, *rest = (prompt.template or COMPETITION).split("{input}")
    asked = " ~ ".join([_literal(before), *(f"m.content ~ {_literal(part)}" for part in rest)])
    other = "m.content ~ " + _literal("\n\n")
    return f"{{% for m in messages %}}{{{{ ({asked}) if m.role == 'user' else ({other}) }}}}{{% endfor %}}"


def _literal(text: str) -> str:
    """As Jinja reads texts, which is Python's way: JSON's escapes are a part of it."""
    return json.dumps(text, ensure_ascii=False)


def _plain() -> KnowledgeClass:
    return KnowledgeClass(PLAIN, "", "{input}")


def _texts_of(kind: KnowledgeClass, prompt: PromptSection) -> KnowledgeClass:
    """The class's texts alone, with the system text that it is answered by; its numbers stand in
    settings.yaml.
    """
    system = (
        kind.system
        if kind.system.strip()
        else (prompt.system or "")
        if prompt.format == "chat"
        else ""
    )
    return KnowledgeClass(kind.name, system, kind.template, kind.description)


def _voting() -> dict[str, Any]:
    """The constants of Classifier and LinearClassifier."""
    return {
        "ngrams": tfidf.LENGTHS[1],
        "voters": VOTERS,
        "power": POWER,
        "clear": CLEAR,
        "ridge_ngrams": linear.LENGTHS[1],
        "alpha": linear.ALPHA,
        "sharp": linear.SHARP,
        "quoted": linear.QUOTED.pattern,
        "least": LEAST,
        "root": ROOT,
    }


def _whole(kind: KnowledgeClass, run: GenerationSection) -> dict[str, Any]:
    """A class's row of knowledge.yaml with its numbers."""
    return {"class": kind.name, "system": kind.system, "template": kind.template} | _numbers_of(
        kind, run
    )


def _numbers_of(kind: KnowledgeClass, run: GenerationSection) -> dict[str, Any]:
    """How many examples and documents the class's prompt holds, and transformers' generation
    settings.
    """
    sampled = run.do_sample if kind.temperature is None else kind.temperature > 0
    generation: dict[str, Any] = {
        "max_new_tokens": kind.max_new_tokens or run.max_new_tokens,
        "repetition_penalty": kind.repetition_penalty or run.repetition_penalty,
        "do_sample": sampled,
    }
    if sampled:
        generation |= {
            "temperature": kind.temperature or run.temperature,
            "top_p": run.top_p,
            "top_k": 0,
        }
    return {
        "examples": SHOTS if kind.shots is None else kind.shots,
        "documents": 0
        if "{documents}" not in kind.template
        else QUOTES
        if kind.quotes is None
        else kind.quotes,
        "generation": generation,
    }


def _rendered(name: str, **values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["yaml"] = _flow
    return environment.from_string(
        (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    ).render(values)


def _flow(value: Any) -> str:
    """A value of YAML on one line."""
    text = yaml.dump(
        value,
        Dumper=_Dumper,
        allow_unicode=True,
        default_flow_style=True,
        sort_keys=False,
        width=10**9,
    )
    return str(text).removesuffix("\n").removesuffix("\n...")


class _Dumper(yaml.SafeDumper):
    """Texts of several lines, or with characters that do not show, are quoted with escapes."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'
    )


_Dumper.add_representer(str, _represent_text)
