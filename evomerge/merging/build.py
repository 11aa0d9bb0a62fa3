"""A recipe as a model folder on disk: what mergekit would have written, whole or not at all."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from evomerge.card import model_card
from evomerge.errors import InputError, OutputError
from evomerge.merging.folder import ModelFolder
from evomerge.merging.stream import MergePlan, open_recipe
from evomerge.recipe import Recipe

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
FORMAT_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
Progress = Callable[[int, int], None]


def build_model(
    recipe: Recipe,
    out: str | Path,
    *,
    recipe_text: str | None = None,
    shard_size: str | int = "5GB",
    random_seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write the merged model to the new folder `out`; `progress` gets (bytes written, bytes in all).

    Tensors are merged and written one by one, to a temporary folder beside it that is renamed at the end. Raises
    InputError when `out` is there already, ModelError and RecipeError as the merge does, OutputError on a full disk.
    """
    out = Path(out).absolute()
    limit = parse_size(shard_size)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("is there already", where=out, remedy="Name a new folder, or remove this one.")
    models = open_recipe(recipe)
    plan = MergePlan(recipe, models, random_seed)
    planned = [Planned(name, plan.dtype(name), plan.shape(name)) for name in plan.names]
    temporary: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        write_shards(temporary, planned, ((name, plan.merge(name)) for name in plan.names), limit, progress)
        _write_config(plan, temporary)
        if plan.vocabulary is None:
            _copy_tokenizer(plan.donor, temporary)
        else:
            plan.vocabulary.save(temporary)
        text = recipe.to_yaml() if recipe_text is None else recipe_text
        (temporary / "mergekit_config.yml").write_text(text, encoding="utf-8", newline="")
        (temporary / "README.md").write_text(model_card(recipe, out.name, recipe_text=text), encoding="utf-8")
        temporary.chmod(0o755)
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except OSError as error:
        raise OutputError(
            f"the model cannot be written: {error.strerror or error}", where=out, remedy="Free some space; nothing was left behind."
        ) from error
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


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written: known before it is merged, so that a file's header can come first."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(
    folder: Path, plan: Iterable[Planned], tensors: Iterator[tuple[str, torch.Tensor]], limit: int, progress: Progress | None = None
) -> None:
    """Write `tensors`, which come in the plan's order, as safetensors files of up to `limit` bytes. Raises OSError.

    A file holds at least one tensor, however large. Several files get an index.
    """
    shards = _into_shards(plan, limit)
    total = sum(item.size for shard in shards for item in shard)
    written = 0
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        with (folder / name).open("wb") as file:
            file.write(_header(shard))
            for item, (merged_name, tensor) in zip(shard, islice(tensors, len(shard)), strict=True):
                assert (merged_name, tensor.dtype, tuple(tensor.shape)) == (item.name, item.dtype, item.shape)
                file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
                weight_map[item.name] = name
                written += item.size
                if progress is not None:
                    progress(written, total)
            file.flush()
            os.fsync(file.fileno())  # some file systems find out only now that the disk is full
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _into_shards(plan: Iterable[Planned], limit: int) -> list[list[Planned]]:
    """A new file begins when the next tensor would make the last one larger than `limit`."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for item in plan:
        if shards[-1] and size + item.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.size
    return shards


def _header(shard: Iterable[Planned]) -> bytes:
    """safetensors' header: its length (8 bytes, little-endian), then JSON that is padded with spaces to 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for item in shard:
        header[item.name] = {
            "dtype": FORMAT_NAMES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [end, end + item.size],
        }
        end += item.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_config(plan: MergePlan, folder: Path) -> None:
    """The donor's configuration; only dtype, layers and vocabulary may change."""
    config = dict(plan.donor.config)
    dtype = plan.recipe.out_dtype or plan.recipe.dtype
    if dtype is not None:
        for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]:
            config[key] = dtype
    config["num_hidden_layers"] = plan.layout.n_layers
    if plan.vocabulary is not None:
        config["vocab_size"] = plan.vocabulary.size
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_tokenizer(base: ModelFolder, folder: Path) -> None:
    for pattern in COPIED:
        for path in base.path.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
            else:
                shutil.copyfile(path, folder / path.name)
