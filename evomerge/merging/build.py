"""A recipe as a model folder on disk: what mergekit would have written, whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from evomerge.console import parse_size, size
from evomerge.errors import OutputError
from evomerge.merging.checkpoints.model_folder import ModelFolder
from evomerge.merging.checkpoints.new_folder import check_new, new_folder
from evomerge.merging.checkpoints.shards import Progress, plan_shards, total_size, write_shards
from evomerge.merging.stream import MergePlan, open_recipe
from evomerge.recipe import Recipe
from evomerge.reporting.card import model_card

__all__ = ["build_model", "parse_size"]
COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
)
# lists in config.json with an item for each layer
BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
SPARE = 20_000_000  # bytes for what is copied beside the weights


def build_model(
    recipe: Recipe,
    out: str | Path,
    *,
    recipe_text: str | None = None,
    shard_size: str | int = "5GB",
    random_seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write the merged model to the new folder `out`; `progress` gets (bytes written, bytes in
    all).

    Tensors are merged and written piece by piece, to a temporary folder beside it that is renamed
    at the end. Raises InputError when `out` is there already, ModelError and RecipeError as the
    merge does, OutputError on a full disk.
    """
    out = Path(out).absolute()
    limit = parse_size(shard_size)
    check_new(out)
    plan = MergePlan(recipe, open_recipe(recipe), random_seed)
    shards = plan_shards(plan, limit)
    text = recipe.to_yaml() if recipe_text is None else recipe_text
    with new_folder(out) as unfinished:
        folder = unfinished.path
        check_space(folder, total_size(shards) + SPARE)
        write_shards(folder, plan, shards, progress)
        _write_config(plan, folder)
        if plan.vocabulary is None:
            _copy_tokenizer(plan.donor, folder)
        else:
            plan.vocabulary.save(folder)
        (folder / "mergekit_config.yml").write_text(text, encoding="utf-8", newline="")
        (folder / "README.md").write_text(
            model_card(recipe, out.name, recipe_text=text), encoding="utf-8"
        )
    return out


def check_space(folder: Path, needed: int) -> None:
    """Raise OutputError when the folder's disk has fewer than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"the merged model needs {size(needed)}, and {size(free)} are free",
            where=folder.parent,
            remedy="Free some space.",
        )


def _write_config(plan: MergePlan, folder: Path) -> None:
    """The donor's configuration; only dtype, layers and vocabulary may change."""
    config = dict(plan.donor.config)
    dtype = plan.recipe.out_dtype or plan.recipe.dtype
    if dtype is not None:
        for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]:
            config[key] = dtype
    for setting in BY_LAYER:
        if (
            isinstance(config.get(setting), list)
            and len(config[setting]) == config["num_hidden_layers"]
        ):
            config[setting] = [config[setting][layer] for layer in plan.layout.lenders]
    config["num_hidden_layers"] = plan.layout.n_layers
    if plan.vocabulary is not None:
        config["vocab_size"] = plan.vocabulary.size
    (folder / "config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def _copy_tokenizer(base: ModelFolder, folder: Path) -> None:
    for pattern in COPIED:
        for path in base.path.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
            else:
                shutil.copyfile(path, folder / path.name)
