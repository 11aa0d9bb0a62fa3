"""Model folders, whether they fit each other, and which of a recipe's parameters applies to which tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from evomerge.errors import ModelError, RecipeError
from evomerge.recipe import BOOLEANS, Recipe, Slice, scalar

LAYER = re.compile(r"^(.*?\blayers\.)(\d+)(\..*)$")
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
FIRST, LAST = ("model.embed_tokens.",), ("model.norm.", "lm_head.")  # outside the layers: the first slice's and the last's
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
                raise ModelError(f"the file lacks tensor {name}", where=self.files[name], remedy="Copy or download it again.") from error
            if piece.get_dtype() not in DTYPES:
                raise ModelError(
                    f"tensor {name} has a dtype that is not supported", where=self.path, found=piece.get_dtype(), remedy="Convert it."
                )
            headers[name] = (tuple(piece.get_shape()), DTYPES[piece.get_dtype()])
        return headers

    def shape(self, name: str) -> tuple[int, ...]:
        return self._headers[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._headers[name][1]

    def get_tensor(self, name: str) -> torch.Tensor:
        """The tensor as it lies on disk. Raises ModelError when the file is damaged."""
        try:
            tensor: torch.Tensor = self._file(name).get_tensor(name)
        except SafetensorError as error:
            raise ModelError(
                f"tensor {name} cannot be read: {error}", where=self.files[name], remedy="Copy or download it again."
            ) from error
        return tensor

    def _file(self, name: str) -> Any:
        path = self.files[name]
        if path not in self._open:
            self._open[path] = _open_safetensors(path)
        return self._open[path]


def open_model(ref: str) -> ModelFolder:
    """A local folder, or a hub name that is downloaded (weights as safetensors only).

    Raises ModelError: no model there, damaged or missing files, pickled weights.
    """
    path = Path(ref).expanduser()
    if not path.is_dir():
        if path.exists() or ref.count("/") != 1 or ref.startswith((".", "/", "~")):
            raise ModelError("there is no model folder", where=ref, remedy="Name a folder with config.json and safetensors, or a hub name.")
        path = _download(ref)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError("the folder has no config.json", where=path, remedy="Name a folder in transformers' format.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"config.json cannot be read: {error}", where=path, remedy="Save the model again.") from error
    if not isinstance(config, dict):
        raise ModelError("config.json is no mapping", where=path, found=config, remedy="Save the model again.")
    files = {name: file for name, file in _weight_files(path).items() if not name.endswith(NOT_WEIGHTS)}
    return ModelFolder(path, config, files, ref)


def num_layers(config: Mapping[str, Any]) -> int:
    """Layers of the model that a config.json describes."""
    if not isinstance(config.get("num_hidden_layers"), int):
        raise ModelError("the configuration names no `num_hidden_layers`", remedy="Only causal language models can be merged.")
    return int(config["num_hidden_layers"])


def check_fit(base: ModelFolder, siblings: Sequence[ModelFolder]) -> None:
    """Raise ModelError naming the first key or tensor in which a sibling differs from the base."""
    for sibling in siblings:
        for key in CONFIG_KEYS:
            ours, theirs = base.config.get(key), sibling.config.get(key)
            if key == "tie_word_embeddings":
                ours, theirs = bool(ours), bool(theirs)
            elif key == "num_key_value_heads":  # older configurations leave it out where it equals the heads
                ours, theirs = (m.config.get(key) or m.config.get("num_attention_heads") for m in (base, sibling))
            if ours != theirs:
                raise ModelError(
                    f"does not fit the base: `{key}` is {theirs}, the base has {ours}",
                    where=sibling.path,
                    remedy="Only siblings of one base can be merged.",
                )
        tied = {"lm_head.weight"} if base.config.get("tie_word_embeddings") else set()
        for name in sorted((base.keys ^ sibling.keys) - tied):
            lacking = "the sibling lacks" if name in base.keys else "the base lacks"
            raise ModelError(
                f"does not fit the base: {lacking} {name}", where=sibling.path, remedy="Only siblings of one base can be merged."
            )
        for name in sorted(base.keys & sibling.keys):
            if base.shape(name) != sibling.shape(name):
                raise ModelError(
                    f"does not fit the base: {name} is {sibling.shape(name)}, the base has {base.shape(name)}",
                    where=sibling.path,
                    remedy="Only siblings of one base can be merged.",
                )


def check_same_tokens(models: Sequence[ModelFolder]) -> None:
    """Raise RecipeError unless `tokenizer_source: base` would leave every row of the embeddings where it is."""
    from transformers import AutoTokenizer

    tokens: list[dict[str, int]] = []
    for model in models:
        try:
            tokens.append(AutoTokenizer.from_pretrained(str(model.path)).get_vocab())
        except Exception as error:  # OSError, ValueError, KeyError and others, by what is wrong in the files
            raise ModelError(f"the tokenizer cannot be loaded: {error}", where=model.path, remedy="Remove `tokenizer_source`.") from error
        if tokens[-1] != tokens[0] or len(tokens[-1]) != model.config.get("vocab_size"):
            raise RecipeError(
                "`tokenizer_source: base` would move or cut rows of the embeddings, which is not supported",
                where=model.path,
                remedy="Remove `tokenizer_source` if the rows mean the same tokens in every model.",
            )


@dataclass(frozen=True)
class Place:
    """Where a tensor's parameters come from: its slice, and t in 0 to 1 along the slice's layers for gradients."""

    piece: Slice
    t: float


class Layout:
    """Which parameter of a recipe applies to which tensor, by mergekit's rules."""

    def __init__(self, recipe: Recipe, n_layers: int) -> None:
        """Raises RecipeError when the slices leave a gap or pass the model's end."""
        self.recipe, self.n_layers = recipe, n_layers
        self._layers: list[Place] = []
        for i, piece in enumerate(recipe.slices):
            start, end = piece.sources[0].layers or (0, n_layers)
            at = f"slices[{i}]"
            if end > n_layers:
                raise RecipeError(
                    f"`layer_range` passes the model's {n_layers} layers", where=at, found=[start, end], remedy="Lower its end."
                )
            if start != len(self._layers):
                raise RecipeError(
                    f"`layer_range` leaves a gap or overlaps: layer {len(self._layers)} comes next",
                    where=at,
                    found=[start, end],
                    remedy="Mend it.",
                )
            count = end - start
            self._layers += [Place(piece, layer / (count - 1) if count > 1 else 1.0) for layer in range(count)]
        if len(self._layers) != n_layers:
            raise RecipeError(f"the slices end at layer {len(self._layers)}, the model has {n_layers}", remedy="Add the missing layers.")

    def place(self, name: str) -> Place:
        """Layers by their slice; final norm and head by the last slice, embeddings by the first; t is 0 outside layers.

        Raises ModelError for a tensor of another kind: mergekit's rules say nothing of it.
        """
        match = LAYER.match(name)
        if match:
            if int(match[2]) >= self.n_layers:
                raise ModelError(f"tensor {name} passes the configuration's {self.n_layers} layers", remedy="Mend config.json.")
            return self._layers[int(match[2])]
        if not name.startswith(FIRST + LAST):
            raise ModelError(f"tensor {name} is of an architecture that is not supported", remedy="Llama, Qwen2 and their like are.")
        return Place(self.recipe.slices[-1 if name.startswith(LAST) else 0], 0.0)

    def parameter(self, key: str, name: str, model: str | None = None, default: Any = None) -> Any:
        """A parameter's value for a tensor: the source's before the slice's before the recipe's."""
        place = self.place(name)
        levels = [source.parameters for source in place.piece.sources if source.model == model]
        for level in [*levels, place.piece.parameters, self.recipe.parameters]:
            if key in level:
                value = _evaluate(key, level[key], name, place.t)
                if value is not None:
                    return value
        return default

    def weights(self, name: str) -> list[tuple[str, float]]:
        """(sibling, weight) for a tensor, in the order of the slice's sources. Raises RecipeError when one has no weight."""
        found = []
        for source in self.place(name).piece.sources:
            if source.model != self.recipe.base_model:
                weight = self.parameter("weight", name, source.model)
                if weight is None:
                    raise RecipeError(f"no `weight` for {name}", where=source.model, remedy="Give the source parameters: {weight: …}.")
                found.append((source.model, float(weight)))
        return found


def _evaluate(key: str, setting: Any, name: str, t: float) -> float | bool | None:
    """A number, a gradient over t (booleans take the step before t), or the first filter that matches the tensor's name."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return scalar(key, setting)
    if isinstance(setting[0], Mapping):
        matching = (s for s in setting if s.get("filter") in (None, "*") or s["filter"] in name)
        first = next(matching, None)
        return None if first is None else _evaluate(key, first["value"], name, t)
    values = [scalar(key, item) for item in setting]
    scaled = t * (len(values) - 1)
    low = int(scaled)
    if key in BOOLEANS:
        return values[low]
    return (1 - (scaled - low)) * values[low] + (scaled - low) * values[min(len(values) - 1, low + 1)]


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        owner_name, _, revision = name.partition("@")
        return Path(
            snapshot_download(owner_name, revision=revision or None, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model"])
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
            names = {str(name): path / str(file) for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError("the index of shards cannot be read", where=index, remedy="Save the model again.") from error
        for file in sorted(set(names.values())):
            if not file.is_file():
                raise ModelError("a shard is missing", where=file, remedy="Copy or download the model again.")
        return names
    single = path / "model.safetensors"
    if single.is_file():
        return dict.fromkeys(_open_safetensors(single).keys(), single)
    pickled = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    if pickled:
        raise ModelError(
            "the weights are pickled, and reading them could run code",
            where=pickled[0],
            remedy="Convert them where you trust them: load with transformers and save_pretrained(folder).",
        )
    raise ModelError("the folder has no model.safetensors", where=path, remedy="Copy or download the model again.")


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"the file is damaged: {error}", where=path, remedy="Copy or download it again.") from error
