"""Model folders: what they hold, mapped and read tensor by tensor, and whether they fit each other."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from evomerge.errors import ModelError, UnsupportedRecipe
from evomerge.recipe import MERGEKIT

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# What has to be the same in every model's config.json for its tensors to mean the same.
CONFIG_KEYS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
VOCABULARY = (EMBED, HEAD)  # a row for each token
NOT_WEIGHTS = ".rotary_emb.inv_freq"  # a constant that old checkpoints carry


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk; its weights are mapped, not read, until a tensor is asked for."""

    path: Path
    config: dict[str, Any]
    files: Mapping[str, Path] = field(repr=False)  # tensor name -> safetensors file
    ref: str = ""  # as it was asked for: a folder or a hub name
    _open: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def places(self) -> tuple[Path, ...]:
        """The folders that its files lie in: two models with the same ones are the same model."""
        return (self.path,)

    @property
    def keys(self) -> frozenset[str]:
        """The tensors' names."""
        return frozenset(self.files)

    @cached_property
    def _headers(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        headers = {}
        for name in self.files:
            try:
                piece = self._file(name).get_slice(name)
            except SafetensorError as error:
                raise ModelError(
                    f"the file lacks tensor {name}",
                    where=self.files[name],
                    remedy="Copy or download it again.",
                ) from error
            if piece.get_dtype() not in DTYPES:
                raise ModelError(
                    f"tensor {name} has a dtype that is not supported",
                    where=self.path,
                    found=piece.get_dtype(),
                    remedy="Convert it.",
                )
            headers[name] = (tuple(piece.get_shape()), DTYPES[piece.get_dtype()])
        return headers

    def stored(self, name: str) -> str:
        """The name under which a tensor lies on disk: a head that is not there is the embeddings,
        tied.
        """
        return EMBED if name == HEAD and HEAD not in self.files else name

    def shape(self, name: str) -> tuple[int, ...]:
        return self._headers[self.stored(name)][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._headers[self.stored(name)][1]

    def get_tensor(self, name: str) -> torch.Tensor:
        """The tensor as it lies on disk. Raises ModelError when the file is damaged."""
        name = self.stored(name)
        try:
            tensor: torch.Tensor = self._file(name).get_tensor(name)
        except SafetensorError as error:
            raise ModelError(
                f"tensor {name} cannot be read: {error}",
                where=self.files[name],
                remedy="Copy or download it again.",
            ) from error
        return tensor

    def _file(self, name: str) -> Any:
        path = self.files[name]
        if path not in self._open:
            self._open[path] = open_safetensors(path)
        return self._open[path]


def open_model(ref: str) -> ModelFolder:
    """A local folder, or a hub name that is downloaded (weights as safetensors only);
    `MODEL+ADAPTER` adds a LoRA.

    Raises ModelError: no model there, damaged or missing files, pickled weights, an adapter that
    does not fit.
    """
    model, plus, adapter = ref.partition("+")
    if plus and not Path(ref).is_dir():
        from evomerge.merging.checkpoints.lora import open_lora

        return open_lora(open_model(model), adapter, ref)
    path = Path(ref).expanduser()
    if not path.is_dir():
        if (
            path.exists()
            or ref.partition("@")[0].count("/") != 1
            or ref.startswith((".", "/", "~"))
        ):
            raise ModelError(
                "there is no model folder",
                where=ref,
                remedy="Name a folder with config.json and safetensors, or a hub name.",
            )
        path = download(ref)
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
            "config.json is no mapping", where=path, found=config, remedy="Save the model again."
        )
    files = {
        name: file for name, file in _weight_files(path).items() if not name.endswith(NOT_WEIGHTS)
    }
    return ModelFolder(path, config, files, ref)


def same_model(folder: ModelFolder, ref: str) -> bool:
    """Whether a reference means this folder, however its path is written."""
    parts = ref.split("+")
    return folder.ref == ref or [os.path.realpath(p) for p in parts] == [
        os.path.realpath(p) for p in folder.places
    ]


def num_layers(config: Mapping[str, Any]) -> int:
    """Layers of the model that a config.json describes."""
    if not isinstance(config.get("num_hidden_layers"), int):
        raise UnsupportedRecipe(
            "the configuration names no `num_hidden_layers`",
            where=config.get("model_type"),
            remedy=f"Llama and its like are. {MERGEKIT}",
        )
    return int(config["num_hidden_layers"])


def check_fit(
    base: ModelFolder, siblings: Sequence[ModelFolder], same_vocabulary: bool = True
) -> None:
    """Raise ModelError naming the first key or tensor in which a sibling differs from the base.

    Without `same_vocabulary` the number of rows of embeddings and head may differ.
    """
    for sibling in siblings:
        for key in (
            CONFIG_KEYS if same_vocabulary else [key for key in CONFIG_KEYS if key != "vocab_size"]
        ):
            ours, theirs = base.config.get(key), sibling.config.get(key)
            if key == "tie_word_embeddings":
                ours, theirs = bool(ours), bool(theirs)
            elif key == "num_key_value_heads":
                # older configurations leave it out where it equals the heads
                ours, theirs = (
                    m.config.get(key) or m.config.get("num_attention_heads")
                    for m in (base, sibling)
                )
            if ours != theirs:
                raise ModelError(
                    f"does not fit the base: `{key}` is {theirs}, the base has {ours}",
                    where=sibling.path,
                    remedy="Name a `tokenizer_source`."
                    if key == "vocab_size"
                    else "Only siblings of one base can be merged.",
                )
        tied = {HEAD} if base.config.get("tie_word_embeddings") else set()
        for name in sorted((base.keys ^ sibling.keys) - tied):
            lacking = "the sibling lacks" if name in base.keys else "the base lacks"
            raise ModelError(
                f"does not fit the base: {lacking} {name}",
                where=sibling.path,
                remedy="Only siblings of one base can be merged.",
            )
        for name in sorted(base.keys & sibling.keys):
            # the first axis that must be the same
            rows = 1 if not same_vocabulary and name in VOCABULARY else 0
            if base.shape(name)[rows:] != sibling.shape(name)[rows:]:
                raise ModelError(
                    f"does not fit the base: {name} is {sibling.shape(name)}, the base has {base.shape(name)}",
                    where=sibling.path,
                    remedy="Only siblings of one base can be merged.",
                )


def download(name: str) -> Path:
    """A hub name, `owner/name` or `owner/name@revision`, as a local folder. Raises ModelError."""
    from huggingface_hub import snapshot_download

    try:
        owner_name, _, revision = name.partition("@")
        return Path(
            snapshot_download(
                owner_name,
                revision=revision or None,
                allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model"],
            )
        )
    except Exception as error:  # the client raises its own, httpx's and OSError
        raise ModelError(
            f"cannot be fetched from the hub ({type(error).__name__})",
            where=name,
            remedy="Check the name and the network, or name a folder.",
        ) from error


def _weight_files(path: Path) -> dict[str, Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = {
                str(name): path / str(file)
                for name, file in json.loads(index.read_text(encoding="utf-8"))[
                    "weight_map"
                ].items()
            }
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(
                "the index of shards cannot be read", where=index, remedy="Save the model again."
            ) from error
        for file in sorted(set(names.values())):
            if not file.is_file():
                raise ModelError(
                    "a shard is missing", where=file, remedy="Copy or download the model again."
                )
        return names
    single = path / "model.safetensors"
    if single.is_file():
        return dict.fromkeys(open_safetensors(single).keys(), single)
    pickled = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    if pickled:
        raise ModelError(
            "the weights are pickled, and reading them could run code",
            where=pickled[0],
            remedy="Convert them where you trust them: load with transformers and save_pretrained(folder).",
        )
    raise ModelError(
        "the folder has no model.safetensors",
        where=path,
        remedy="Copy or download the model again.",
    )


def open_safetensors(path: Path) -> Any:
    """The file, mapped. Raises ModelError when it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"the file is damaged: {error}", where=path, remedy="Copy or download it again."
        ) from error
