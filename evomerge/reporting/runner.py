"""The runner: a folder that answers tasks with a study's winner where evomerge is not installed.

Its files are made from templates/runner.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from evomerge.answering import thoughts
from evomerge.answering.prompts import COMPETITION
from evomerge.answering.reasoning import KNOWN as KNOWN_MARKS
from evomerge.answering.reasoning import Wanted
from evomerge.errors import KnowledgeError
from evomerge.knowledge.chooser import QUOTES, SHOTS
from evomerge.knowledge.classification import linear
from evomerge.knowledge.classification.by_neighbours import CLEAR, LEAST, POWER, ROOT, VOTERS
from evomerge.knowledge.formats.yaml_format import to_yaml
from evomerge.knowledge.records import PLACEHOLDER, Knowledge, KnowledgeClass
from evomerge.knowledge.retrieval import tfidf
from evomerge.merging.architecture.described import LAST_SLICE, NORM_AND_HEAD
from evomerge.merging.checkpoints.new_folder import check_new, new_folder
from evomerge.recipe import Recipe
from evomerge.reporting.export import outcome_markdown, recipe_text
from evomerge.searching.snapshot import StudySnapshot
from evomerge.study import GenerationSection, PromptSection, ReasoningSection, Study

TEMPLATES = Path(__file__).with_name("templates") / "runner"
# the last one is evomerge's own, which needs nothing else
PROGRAM = (TEMPLATES / "answer.py", TEMPLATES / "answer_tools.py", Path(thoughts.__file__))
FETCHED = ("model*.safetensors", "*.json", "*.jinja", "*.model")  # of a model on the hub
# the class of all tasks where there is no knowledge base
PLAIN = KnowledgeClass("plain", "", "{input}")


def write_runner(snapshot: StudySnapshot, folder: Path, knowledge: Knowledge | None) -> list[Path]:
    """Write answer.py and what it reads to a new folder, whole or not at all; returns the files.

    `knowledge` gives tasks their class, prompt and settings; None: the study's plain prompt.
    Raises InputError: the folder exists and is not empty. KnowledgeError: the knowledge base does
    not have the study's default class. OutputError.
    """
    check_new(folder)
    study, recipe = snapshot.study, snapshot.recipe
    name = snapshot.ledger.name
    texts = {
        **{path.name: path.read_text(encoding="utf-8") for path in PROGRAM},
        "requirements.txt": _rendered("requirements.txt"),
        "recipe.yaml": recipe_text(snapshot, in_modules=False),
        "settings.yaml": _rendered(
            "settings.yaml", study=name, settings=settings(study, recipe, knowledge)
        ),
    }
    if knowledge is not None:
        classes = tuple(_texts_of(c, study.prompt) for c in knowledge.classes)
        texts["knowledge.yaml"] = to_yaml(replace(knowledge, classes=classes))
    texts["README.md"] = _rendered(
        "README.md",
        study=name,
        models=recipe.models,
        donor=recipe.donor,
        dtype=study.search.dtype,
        mergeable=mergeable(recipe),
        knowledge=knowledge,
        retriever=study.prompt.retriever,
        quantization=study.engine.quantization,
        verdict=outcome_markdown(snapshot),
    )
    with new_folder(folder) as unfinished:
        for file, text in texts.items():
            (unfinished.path / file).write_text(text, encoding="utf-8")
    return [folder / file for file in texts]


def mergeable(recipe: Recipe) -> bool:
    """Whether answer.py can merge the recipe.

    It merges task arithmetic and linear with one number per slice and model, all layers in their
    order, and the base's tokens.
    """
    if recipe.merge_method not in ("task_arithmetic", "linear") or recipe.tokenizer is not None:
        return False
    if not set(recipe.parameters) <= {"normalize", "int8_mask"}:
        return False
    if any("+" in model for model in recipe.models):
        return False
    return _has_all_layers(recipe) and _has_plain_weights(recipe)


def _has_all_layers(recipe: Recipe) -> bool:
    """Whether each slice's sources share their layers, and each slice follows the one before."""
    at = 0
    for piece in recipe.slices:
        ranges = {source.layers or (-1, -1) for source in piece.sources}
        (start, end), *others = ranges
        if others or start != at:
            return False
        at = end
    return True


def _has_plain_weights(recipe: Recipe) -> bool:
    for piece in recipe.slices:
        for source in piece.sources:
            needed = source.model != recipe.base_model or recipe.merge_method == "linear"
            if needed and not isinstance(source.parameters.get("weight"), int | float):
                return False
    return True


def settings(study: Study, recipe: Recipe, knowledge: Knowledge | None) -> dict[str, Any]:
    """What settings.yaml holds. Raises KnowledgeError."""
    voting = _voting() | {"threshold": 0.0, "default": PLAIN.name}
    classes: dict[str, Any] = {}
    plain: dict[str, Any] | None = None
    if knowledge is None:
        kind = _texts_of(PLAIN, study.prompt)
        plain = {"class": kind.name, "system": kind.system, "template": kind.template}
        plain |= _numbers_of(PLAIN, study.generation)
    else:
        classes = {kind.name: _numbers_of(kind, study.generation) for kind in knowledge.classes}
        voting |= _default_class(study.prompt, list(classes))
    return {
        "batch_size": study.engine.batch_size,
        "seed": _or(study.generation.seed, study.search.seed),
        "stop": list(study.generation.stop),
        "too_long": study.prompt.too_long,
        "chat_template": chat_template(study.prompt),
        "chat_template_kwargs": study.prompt.chat_template_kwargs,
        "reasoning": _marks(study.generation.reasoning),
        "classes": classes,
        "voting": voting,
        "placeholder": PLACEHOLDER.pattern,
        "plain": plain,
        "donor": recipe.donor if mergeable(recipe) else None,
        "models": list(recipe.models),
        "norm_and_head_last": sorted(
            name for name, last in LAST_SLICE.items() if last == NORM_AND_HEAD
        ),
        "files": list(FETCHED),
    }


def _marks(reasoning: Wanted) -> dict[str, Any]:
    """The marks of thoughts that the runner looks for, or takes without looking."""
    if isinstance(reasoning, ReasoningSection):
        return {"auto": False, "marks": [[reasoning.start, reasoning.end]]}
    if reasoning is None:
        return {"auto": True, "marks": []}
    return {"auto": True, "marks": [[marks.start, marks.end] for marks in KNOWN_MARKS]}


def _default_class(prompt: PromptSection, names: list[str]) -> dict[str, Any]:
    """The class of tasks whose own is less certain than the threshold. Raises KnowledgeError."""
    default = prompt.default_class
    if default is None:
        return {"threshold": 0.0, "default": names[0]}
    if default not in names:
        raise KnowledgeError(
            "the default class is not a class of the knowledge base",
            found=default,
            remedy=f"Classes are: {', '.join(names)}.",
        )
    return {"threshold": prompt.threshold, "default": default}


def chat_template(prompt: PromptSection) -> str | None:
    """The prompt's format as a Jinja template of turns; None: the tokenizer's own."""
    if prompt.format == "chat":
        return None
    before, *rest = (prompt.template or COMPETITION).split("{input}")
    asked = " ~ ".join([_literal(before), *(f"m.content ~ {_literal(part)}" for part in rest)])
    other = "m.content ~ " + _literal("\n\n")
    turn = f"{{{{ ({asked}) if m.role == 'user' else ({other}) }}}}"
    return f"{{% for m in messages %}}{turn}{{% endfor %}}"


def _literal(text: str) -> str:
    """A Jinja string: it reads Python's escapes, and JSON's are among them."""
    return json.dumps(text, ensure_ascii=False)


def _texts_of(kind: KnowledgeClass, prompt: PromptSection) -> KnowledgeClass:
    """The class's texts with the system text of its prompt; the numbers go to settings.yaml."""
    system = ""
    if kind.system.strip():
        system = kind.system
    elif prompt.format == "chat" and prompt.system is not None:
        system = prompt.system
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


def _numbers_of(kind: KnowledgeClass, run: GenerationSection) -> dict[str, Any]:
    """How many examples and documents a class's prompt holds, and its generation settings.

    Where the class sets its own length, half of a small context is kept for the prompt.
    """
    sampled = run.do_sample
    if kind.temperature is not None:
        sampled = kind.temperature > 0
    generation: dict[str, Any] = {
        "max_new_tokens": kind.max_new_tokens or run.max_new_tokens,
        "repetition_penalty": kind.repetition_penalty or run.repetition_penalty,
        "do_sample": sampled,
    }
    if sampled:
        generation["temperature"] = kind.temperature or run.temperature
        generation["top_p"] = run.top_p
        generation["top_k"] = 0
    documents = 0
    if "{documents}" in kind.template:
        documents = _or(kind.quotes, QUOTES)
    return {
        "examples": _or(kind.shots, SHOTS),
        "documents": documents,
        "own_length": kind.max_new_tokens is not None,
        "generation": generation,
    }


def _or(number: int | None, default: int) -> int:
    return default if number is None else number


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
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(values)


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.dump(
        value,
        Dumper=_FlowDumper,
        allow_unicode=True,
        default_flow_style=True,
        sort_keys=False,
        width=10**9,
    )
    return str(text).removesuffix("\n").removesuffix("\n...")


class _FlowDumper(yaml.SafeDumper):
    """Quotes texts of several lines, or with invisible characters, with escapes."""


def _flow_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_FlowDumper.add_representer(str, _flow_text)
