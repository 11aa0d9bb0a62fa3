"""Opening a model by its reference: a folder or a hub name, with or without a LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evomerge.errors import ModelError
from evomerge.merging.checkpoints.hub import find_folder
from evomerge.merging.checkpoints.lora_plan import open_lora
from evomerge.merging.checkpoints.model_folder import ModelFolder
from evomerge.merging.checkpoints.quantized_weights import refuse_quantized
from evomerge.merging.checkpoints.safetensors_reader import SafetensorsReader

NOT_WEIGHTS = ".rotary_emb.inv_freq"  # a constant that old checkpoints carry
COPY_MODEL = "Copy or download the model again."


def open_model(ref: str) -> ModelFolder:
    """A local folder or a hub name, which is downloaded; `MODEL+ADAPTER` merges a LoRA in.

    Raises ModelError: no model there, damaged or missing files, pickled weights, an adapter that
    does not fit.
    """
    model, plus, adapter = ref.partition("+")
    if plus and not Path(ref).is_dir():
        base = open_model(model)
        refuse_quantized(base)
        return open_lora(base, adapter, ref)
    path = find_folder(
        ref, "model", "Name a folder with config.json and safetensors, or a hub name."
    )
    config = _read_config(path)
    files = {}
    for name, file in _weight_files(path).items():
        if not name.endswith(NOT_WEIGHTS):
            files[name] = file
    return ModelFolder(path, config, files, ref)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            "the folder has no config.json",
            where=path,
            remedy="Name a folder in transformers' format.",
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"config.json cannot be read: {error}", where=path, remedy="Save the model again."
        ) from error
    if not isinstance(config, dict):
        raise ModelError(
            "config.json is not a mapping",
            where=path,
            found=config,
            remedy="Save the model again.",
        )
    return config


def _weight_files(path: Path) -> dict[str, Path]:
    """Tensor name -> its file. Raises ModelError when files are missing, damaged or pickled."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return _indexed_files(index)
    single = path / "model.safetensors"
    if single.is_file():
        return dict.fromkeys(SafetensorsReader(single).keys, single)
    pickled = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    if pickled:
        raise ModelError(
            "the weights are pickled, and reading them could run code",
            where=pickled[0],
            remedy="Convert them where you trust them: "
            "load with transformers and save_pretrained(folder).",
        )
    raise ModelError("the folder has no model.safetensors", where=path, remedy=COPY_MODEL)


def _indexed_files(index: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): index.parent / str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            "the index of shards cannot be read", where=index, remedy="Save the model again."
        ) from error
    for file in sorted(set(names.values())):
        if not file.is_file():
            raise ModelError("a shard is missing", where=file, remedy=COPY_MODEL)
    return names
