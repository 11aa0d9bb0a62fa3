"""A recipe as a model folder on disk: what mergekit would have written, whole or not at all."""

from __future__ import annotations

import errno
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from evomerge.errors import InputError, OutputError
from evomerge.merging.layout import ModelFolder
from evomerge.merging.stream import merged_tensors, open_recipe, tensor_names
from evomerge.recipe import Recipe, model_card

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
UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3}
Progress = Callable[[int, int], None]


def build_model(
    recipe: Recipe, out: str | Path, *, recipe_text: str | None = None, shard_size: str | int = "5GB", progress: Progress | None = None
) -> Path:
    """Write the merged model to the new folder `out`; `progress` gets (bytes written, bytes in all).

    Everything is written to a temporary folder beside it, which is renamed at the end. Raises InputError when `out`
    is there already, ModelError and RecipeError as the merge does, OutputError on a full disk.
    """
    out = Path(out)
    limit = parse_size(shard_size)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("is there already", where=out, remedy="Name a new folder, or remove this one.")
    models = open_recipe(recipe)
    base = models[recipe.base_model]
    temporary: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        _write_weights(recipe, models, temporary, limit, progress)
        _write_config(recipe, base, temporary)
        _copy_tokenizer(base, temporary)
        text = recipe.to_yaml() if recipe_text is None else recipe_text
        (temporary / "mergekit_config.yml").write_text(text, encoding="utf-8", newline="")
        (temporary / "README.md").write_text(model_card(recipe, out.name, recipe_text=text), encoding="utf-8")
        temporary.chmod(0o755)
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except Exception as error:
        if not _is_disk_error(error):
            raise
        raise OutputError(f"the model cannot be written: {error}", where=out, remedy="Free some space; nothing was left behind.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return out


def parse_size(size: str | int) -> int:
    """Bytes of "5GB", "200M", "20K" or a number; units are decimal, as in transformers. Raises InputError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)I?B?", str(size).strip().upper())
    if not match or float(match[1]) <= 0:
        raise InputError("no size of a file", where="--out-shard-size", found=size, remedy="Write 5GB, 200M or a number of bytes.")
    return int(float(match[1]) * UNITS[match[2]])


def _write_weights(recipe: Recipe, models: Mapping[str, ModelFolder], folder: Path, limit: int, progress: Progress | None) -> None:
    """Shard by shard: a shard is written when the next tensor would make it larger than `limit`."""
    total = _total_bytes(recipe, models[recipe.base_model])
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    size = written = 0

    def flush() -> None:
        nonlocal size
        save_file(shard, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()
        size = 0

    for name, tensor in merged_tensors(recipe, models):
        n_bytes = tensor.numel() * tensor.element_size()
        if shard and size + n_bytes > limit:
            flush()
        shard[name] = tensor.contiguous()
        size += n_bytes
        written += n_bytes
        if progress is not None:
            progress(written, total)
    flush()
    _name_shards(folder, shards, written)


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{i}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _total_bytes(recipe: Recipe, base: ModelFolder) -> int:
    total = 0
    for name in tensor_names(base):
        numel = 1
        for n in base.shape(name):
            numel *= n
        dtype = getattr(torch, recipe.out_dtype or recipe.dtype or "", base.dtype(name))
        total += numel * dtype.itemsize
    return total


def _write_config(recipe: Recipe, base: ModelFolder, folder: Path) -> None:
    """The base's configuration; only the dtype changes."""
    config = dict(base.config)
    dtype = recipe.out_dtype or recipe.dtype
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        config[key] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_tokenizer(base: ModelFolder, folder: Path) -> None:
    for pattern in COPIED:
        for path in base.path.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
            else:
                shutil.copyfile(path, folder / path.name)


def _is_disk_error(error: Exception) -> bool:
    """safetensors wraps the operating system's errors in its own kind, with their text."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM)
    return full or (type(error).__name__ == "SafetensorError" and any(w in str(error) for w in ("No space", "too large", "os error")))
