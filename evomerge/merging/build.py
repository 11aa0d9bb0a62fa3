"""A recipe as a model folder on disk, as mergekit would have written it, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Protocol

from evomerge.console import parse_size, size
from evomerge.errors import ModelError, OutputError
from evomerge.merging.checkpoints.folder_files import TEMPLATES, copy_files, read_json
from evomerge.merging.checkpoints.model_folder import ModelFolder
from evomerge.merging.checkpoints.new_folder import check_new, new_folder
from evomerge.merging.checkpoints.shards import Progress, plan_shards, total_size, write_shards
from evomerge.merging.merged_config import check_restacked, merged_config
from evomerge.merging.open_recipe import open_recipe
from evomerge.merging.stream import MergePlan
from evomerge.merging.vocabulary.chat_templates import chat_template_of, write_chat_template
from evomerge.recipe import Recipe

__all__ = ["build_model", "parse_size"]
GENERATION = "generation_config.json"
# copied from the donor, where the tokenizer's owner has none
CHAT = ("chat_template*", TEMPLATES)
# how images and sounds are prepared, of models that read them
PROCESSOR = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
# copied from the model whose tokenizer the output has: another's would contradict it
TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "tekken.json",
    "tiktoken.model",
    "*.tiktoken",
)
# of a model or a tokenizer of its own, which `auto_map` names; it is copied and never run
CODE = "*.py"
SPARE = 20_000_000  # bytes for configuration and tokenizer


class CardWriter(Protocol):
    """Writes the model card, in Markdown: `evomerge.reporting.card.model_card` is one.

    `only_here`: mergekit cannot merge the model's modules as the recipe says.
    """

    def __call__(self, recipe: Recipe, name: str, *, recipe_text: str, only_here: bool) -> str: ...


def build_model(
    recipe: Recipe,
    out: str | Path,
    *,
    write_card: CardWriter | None = None,
    recipe_text: str | None = None,
    shard_size: str | int = "5GB",
    random_seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write the merged model to the new folder `out`, with a README.md where `write_card` is given.

    Tensors are merged and written in chunks, to a temporary folder that is renamed at the end;
    `progress` gets (bytes written, bytes in all). Raises InputError when `out` exists, ModelError
    and RecipeError as the merge does, OutputError on a full disk.
    """
    out = Path(out).absolute()
    limit = parse_size(shard_size)
    check_new(out)
    plan = MergePlan(recipe, open_recipe(recipe), random_seed)
    config = merged_config(plan)
    if plan.layout.restacked:
        check_restacked(plan, config)
    shards = plan_shards(plan, limit)
    text = recipe.to_yaml() if recipe_text is None else recipe_text
    with new_folder(out) as unfinished:
        folder = unfinished.path
        check_space(out.parent, total_size(shards) + SPARE)
        write_shards(folder, plan, shards, progress)
        (folder / "config.json").write_text(
            json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        _write_tokenizer(plan, folder)
        template = chat_template_of(recipe, plan.models)
        if template is not None:
            write_chat_template(folder, template)
        (folder / "mergekit_config.yml").write_text(text, encoding="utf-8", newline="")
        if write_card is not None:
            # mergekit takes slices of a model of several modules in `modules` alone
            sliced = not recipe.modules and "slices" in recipe.to_dict()
            only_here = sliced and plan.donor.architecture.modules is not None
            card = write_card(recipe, out.name, recipe_text=text, only_here=only_here)
            (folder / "README.md").write_text(card, encoding="utf-8")
    return out


def check_space(folder: Path, needed: int) -> None:
    """Raise OutputError when the folder's disk has fewer than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"the merged model needs {size(needed)}, but only {size(free)} are free",
            where=folder,
            remedy="Free some space.",
        )


def _write_tokenizer(plan: MergePlan, folder: Path) -> None:
    """The tokenizer, and what else stands beside a model's weights and configuration.

    The donor's code comes first: config.json is the donor's.
    """
    owner: ModelFolder | None = plan.donor
    if plan.vocabulary is not None:
        plan.vocabulary.save(folder)
        owner = plan.models.get(plan.vocabulary.owner)
        _move_generation_ids(plan, folder)
    if _names_code(plan.donor, ("config.json", *PROCESSOR)):
        copy_files(plan.donor.path, (CODE,), folder)
    if owner is not None:
        copy_files(owner.path, (*TOKENIZER, *CHAT), folder)
        if _names_code(owner, ("tokenizer_config.json",)):
            copy_files(owner.path, (CODE,), folder)
    copy_files(plan.donor.path, (GENERATION, *CHAT, *PROCESSOR), folder)


def _names_code(model: ModelFolder, files: tuple[str, ...]) -> bool:
    """Whether one of a model's files has an `auto_map`, which names Python files beside it."""
    for name in files:
        with contextlib.suppress(ModelError, FileNotFoundError):  # damaged: it names none
            content = read_json(model.path / name, "")
            if isinstance(content, dict) and content.get("auto_map"):
                return True
    return False


def _move_generation_ids(plan: MergePlan, folder: Path) -> None:
    """Write the donor's generation_config.json where tokens that it names have other ids now."""
    file = plan.donor.path / GENERATION
    if not file.is_file():
        return
    with contextlib.suppress(ModelError):  # damaged: it is copied as it is
        settings = read_json(file, "")
        moved = plan.vocabulary.move_ids(settings, plan.recipe.donor)
        if moved != settings:
            (folder / GENERATION).write_text(json.dumps(moved, indent=2) + "\n", encoding="utf-8")
