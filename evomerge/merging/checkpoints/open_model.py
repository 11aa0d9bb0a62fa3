"""Opening a model by its reference: a folder or a hub name, with or without a LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from evomerge.errors import ModelError
from evomerge.merging.adapters.lora_plan import open_lora
from evomerge.merging.architecture.architecture import architecture_of
from evomerge.merging.checkpoints.dequantized import dequantized
from evomerge.merging.checkpoints.folder_files import check_files, read_json
from evomerge.merging.checkpoints.hub import find_folder, local_path
from evomerge.merging.checkpoints.model_folder import ModelFolder, tied_by_config
from evomerge.merging.checkpoints.model_kind import check_depth
from evomerge.merging.checkpoints.quantized_weights import refuse_quantized
from evomerge.merging.checkpoints.safetensors_reader import SafetensorsReader

ONLY_SHARD = "model-00001-of-00001.safetensors"  # which needs no index
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NOT_WEIGHTS = ".rotary_emb.inv_freq"  # a constant that old checkpoints carry
COPY_MODEL = "Copy or download the model again."


def open_model(ref: str) -> ModelFolder:
    """A local folder or a hub name, which is downloaded; `MODEL+ADAPTER` merges a LoRA in.

    Weights in fp8 and mxfp4 are dequantised as they are read. Raises ModelError: no model there,
    damaged or missing files, pickled weights, files that are no files, an adapter that does not
    fit.
    """
    model, plus, adapter = ref.partition("+")
    if plus and not Path(ref).is_dir():
        base = open_model(model)
        refuse_quantized(base)
        return open_lora(base, adapter, ref)
    if ref.lower().endswith(".gguf") and local_path(ref).is_file():
        _refuse_gguf([local_path(ref)])
    path = find_folder(
        ref, "model", "Name a folder with config.json and safetensors, or a hub name."
    )
    check_files(path)
    config = _read_config(path)
    files = {}
    for name, file in _weight_files(path, config).items():
        if not name.endswith(NOT_WEIGHTS):
            files[name] = file
    check_depth(config, files, path)
    return dequantized(ModelFolder(path, config, files, ref))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = read_json(path / "config.json", "Save the model again.")
    except FileNotFoundError:
        _refuse_gguf(path.glob("*.gguf"))
        raise ModelError(
            "the folder has no config.json",
            where=path,
            remedy="Name a folder in transformers' format.",
        ) from None
    if not isinstance(config, dict):
        raise ModelError(
            "config.json is not a mapping",
            where=path,
            found=config,
            remedy="Save the model again.",
        )
    return config


def _weight_files(path: Path, config: Mapping[str, Any]) -> dict[str, Path]:
    """Tensor name -> its file. Raises ModelError when files are missing, damaged or pickled.

    As in transformers, a single file comes before an index, which may be an older model's.
    """
    single, index = path / SINGLE, path / INDEX
    if single.is_file():
        return dict.fromkeys(SafetensorsReader(single).keys, single)
    if index.is_file():
        return _indexed_files(index, config)
    found = sorted(path.glob("*-of-*.safetensors"))
    if [file.name for file in found] == [ONLY_SHARD]:
        return dict.fromkeys(SafetensorsReader(found[0]).keys, found[0])
    if found:
        raise ModelError(
            f"the folder has shards, but no {INDEX}, which lists them",
            where=path,
            remedy="Copy or download that file too.",
        )
    pickled = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    if pickled:
        raise ModelError(
            "the weights are pickled, and reading them could run code",
            where=pickled[0],
            remedy="Convert them where you trust them: "
            "load with transformers and save_pretrained(folder).",
        )
    _refuse_gguf(path.glob("*.gguf"))
    raise ModelError(f"the folder has no {SINGLE}", where=path, remedy=COPY_MODEL)


def _refuse_gguf(files: Iterable[Path]) -> None:
    """Raise ModelError for GGUF files that stand in a model's place."""
    for file in sorted(files):
        raise ModelError(
            "GGUF files are not read, since most hold rounded weights",
            where=file,
            remedy="Name the original model's folder, or convert this one: load it with "
            "transformers (gguf_file=…) and save_pretrained(folder).",
        )


def _indexed_files(index: Path, config: Mapping[str, Any]) -> dict[str, Path]:
    """What the shards hold that the index names; as in transformers, they decide what is where."""
    content = read_json(index, "Save the model again.")
    weight_map = None
    if isinstance(content, dict):
        weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise ModelError(
            "the index of shards cannot be read: it has no `weight_map` of names",
            where=index,
            remedy="Save the model again.",
        )
    files = {}
    for name in sorted(set(weight_map.values())):
        shard = _shard(index, name)
        files.update(dict.fromkeys(SafetensorsReader(shard).keys, shard))
    missing = {name for name in weight_map if not name.endswith(NOT_WEIGHTS)} - files.keys()
    if missing and tied_by_config(config) is not False:
        # a tied head is the embeddings; old files listed it nevertheless
        missing -= architecture_of(config, files.keys()).heads
    for name in sorted(missing):
        raise ModelError(
            f"the index lists {name}, which no shard holds", where=index, remedy=COPY_MODEL
        )
    return files


def _shard(index: Path, name: str) -> Path:
    """The shard that an index names. Raises ModelError when it is missing or lies elsewhere."""
    shard = index.parent / name
    try:
        # its folder, because the file may be a link, as all are in the hub's cache
        folder, found = shard.parent.resolve(), shard.is_file()
    except (OSError, ValueError):  # no system has a file of that name
        folder, found = index.parent.resolve(), False
    if ".." in Path(name).parts or not folder.is_relative_to(index.parent.resolve()):
        raise ModelError(
            "the index names a shard outside of the model's folder",
            where=index,
            found=name,
            remedy="Copy or download the index again.",
        )
    if not found:
        raise ModelError("a shard is missing", where=shard, remedy=COPY_MODEL)
    return shard
