"""A peft adapter's folder: its settings, checked, and its tensors, read when they are needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from evomerge.errors import ModelError
from evomerge.merging.adapters.timed_patterns import TimedPatterns, compiles
from evomerge.merging.checkpoints.folder_files import check_files, read_json
from evomerge.merging.checkpoints.hub import find_folder
from evomerge.merging.checkpoints.safetensors_reader import SafetensorsReader

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OUTSIDE = ("model.embed_tokens", "lm_head")  # peft's "all-linear" leaves these out
# by setting of `use_bdlora`
BLOCK_PARTS = {"target_modules_bd_a": "lora_A.weight", "target_modules_bd_b": "lora_B.weight"}
MERGED_ELSEWHERE = "Merge it with peft first, and name the result."
COPY_ADAPTER = "Copy or download the adapter again."
# Settings that change what is merged, or that peft itself cannot merge.
REFUSED = (
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
)
# Ways to start training from which loading takes only the adapter's shapes; the others move the
# base's weights as well.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "lora_ga")
# The types of the settings that hold names or regular expressions.
NAME_TYPES: Mapping[str, tuple[type, ...]] = {
    "target_modules": (str, list),
    "exclude_modules": (str, list),
    "modules_to_save": (list,),
    "target_parameters": (list,),
    "layers_pattern": (str, list),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
}


@dataclass(frozen=True)
class Adapter:
    """A LoRA that peft saved."""

    path: Path
    config: Mapping[str, Any]
    _weights: SafetensorsReader = field(repr=False, compare=False)
    _patterns: TimedPatterns = field(repr=False, compare=False)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by its name in the file."""
        return {key: self._weights.shape(key) for key in self._weights.keys}

    def read(self, key: str) -> torch.Tensor:
        """A tensor as it is on disk. Raises ModelError when the file is damaged."""
        return self._weights.tensor(key)

    def rank_and_scaling(self, module: str) -> tuple[int, float]:
        """(r, alpha / r), or alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732).

        The first of the patterns that end the module's name decides. Raises ModelError.
        """
        rank = self._by_pattern("r", "rank_pattern", module)
        alpha = self._by_pattern("lora_alpha", "alpha_pattern", module)
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
            raise ModelError(
                f"`r` or `lora_alpha` of {module} is not a number",
                where=self.path / CONFIG,
                found=[rank, alpha],
                remedy="Correct it.",
            )
        divisor = math.sqrt(rank) if self.config.get("use_rslora") else rank
        return rank, alpha / divisor

    def _by_pattern(self, key: str, patterns: str, module: str) -> Any:
        for pattern, value in (self.config.get(patterns) or {}).items():
            if self._patterns.match(rf"(.*\.)?({pattern})$", module):
                return value
        return self.config.get(key)

    def targets(self, module: str, linear: bool = True) -> bool:
        """Whether peft would put a LoRA on the module; it silently skips all that is not named.

        `linear`: whether it is a linear layer other than the head.
        """
        if self._matches(self.config.get("exclude_modules") or [], module):
            return False
        wanted = self.config.get("target_modules") or []
        if isinstance(wanted, str) and wanted.lower() == "all-linear":
            return linear and module not in OUTSIDE
        matched = self._matches(wanted, module)
        layers = self.config.get("layers_to_transform")
        in_every_layer = isinstance(wanted, str) or module in wanted or layers in (None, [])
        if in_every_layer or not matched:
            return matched
        return self._layer(module) in _as_list(layers)

    def _layer(self, module: str) -> int | None:
        """The module's layer by `layers_pattern`; None outside the layers."""
        patterns = self.config.get("layers_pattern") or [r"[^.]*"]
        for pattern in _as_list(patterns):
            match = self._patterns.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", module)
            if match:
                return int(match["idx"])
        return None

    def _matches(self, names: str | list[str], module: str) -> bool:
        if isinstance(names, str):
            return self._patterns.match(rf"(?:{names})\Z", module) is not None
        return any(module == name or module.endswith(f".{name}") for name in names)

    def saves(self, module: str) -> bool:
        """Whether the adapter contains the whole module, or one that it is a part of."""
        return any(is_within(module, name) for name in self.config.get("modules_to_save") or [])

    @property
    def ties_saved(self) -> bool:
        """Whether embeddings or head in `modules_to_save` stay tied; peft knows two names."""
        saved = self.config.get("modules_to_save") or []
        known = {name.rpartition(".")[-1] for name in OUTSIDE}
        is_known = any(name.rpartition(".")[-1] in known for name in saved)
        return is_known and bool(self.config.get("ensure_weight_tying"))

    def targets_parameter(self, name: str) -> bool:
        """Whether the tensor itself has a LoRA, rather than its module."""
        wanted = self.config.get("target_parameters") or []
        return any(name == target or name.endswith(f".{target}") for target in wanted)

    def blocks(self, module: str) -> dict[str, int]:
        """The part of a block-diagonal LoRA that is stored as blocks, and their number."""
        settings = self.config.get("use_bdlora") or {}
        for key, part in BLOCK_PARTS.items():
            if any(name in module for name in settings.get(key) or []):
                return {part: settings["nblocks"]}
        return {}

    def token_ids(self, module: str, embeddings: str) -> tuple[int, ...]:
        """The tokens whose rows in the module `trainable_token_indices` names.

        A list of them is for the embeddings.
        """
        found = self.config.get("trainable_token_indices") or {}
        if isinstance(found, list):
            found = {embeddings: found}
        for name, ids in found.items():
            if module.endswith(name):
                return tuple(ids)
        return ()

    def error(self, what: str, remedy: str = MERGED_ELSEWHERE) -> ModelError:
        """What is wrong with the adapter, and what helps."""
        return ModelError(what, where=self.path, remedy=remedy)


def is_within(module: str, name: str) -> bool:
    """Whether peft finds the module, or one that it is a part of, by the end of its name."""
    path = module
    while path:
        if path.endswith(name):
            return True
        path = path.rpartition(".")[0]
    return False


def open_adapter(ref: str) -> Adapter:
    """A folder, or a hub name with an optional @revision.

    Raises ModelError: no adapter there, pickled or damaged, another kind than LoRA, a setting that
    is not supported.
    """
    path = find_folder(ref, "adapter", "Name a folder that peft saved, or a hub name.")
    check_files(path)
    _check_present(path)
    config = _read_config(path / CONFIG)
    return Adapter(path, config, SafetensorsReader(path / WEIGHTS), TimedPatterns(path / CONFIG))


def _check_present(path: Path) -> None:
    if not (path / CONFIG).is_file():
        raise ModelError(
            "the folder has no adapter_config.json",
            where=path,
            remedy="Name a folder that peft saved after the +.",
        )
    if (path / WEIGHTS).is_file():
        return
    pickled = path / "adapter_model.bin"
    if pickled.is_file():
        raise ModelError(
            "the adapter is pickled, and reading it could run code",
            where=pickled,
            remedy="Convert it where you trust it: load it with peft and save_pretrained(folder).",
        )
    raise ModelError(f"the folder has no {WEIGHTS}", where=path, remedy=COPY_ADAPTER)


def _read_config(file: Path) -> dict[str, Any]:
    """adapter_config.json. Raises ModelError for another kind than LoRA or an unknown setting."""
    config = read_json(file, COPY_ADAPTER)
    kind = config
    if isinstance(config, dict):
        kind = config.get("peft_type")
    if not isinstance(config, dict) or kind != "LORA":
        raise ModelError(
            "the adapter is not a LoRA", where=file, found=kind, remedy=MERGED_ELSEWHERE
        )
    for key in REFUSED:
        if config.get(key):
            raise ModelError(
                f"`{key}` is not supported", where=file, found=config[key], remedy=MERGED_ELSEWHERE
            )
    if config.get("init_lora_weights") not in STARTS:
        raise ModelError(
            "`init_lora_weights` changes the base's weights, which is not supported",
            where=file,
            found=config["init_lora_weights"],
            remedy="Save it with peft as a plain LoRA: "
            "save_pretrained(path_initial_model_for_weight_conversion=…).",
        )
    _check_types(config, file)
    return config


def _check_types(config: Mapping[str, Any], file: Path) -> None:
    """Raise ModelError unless names, regular expressions and layers have the types peft writes."""
    layers = config.get("layers_to_transform") or []
    if not all(isinstance(layer, int) for layer in _as_list(layers)):
        raise _wrong_type("layers_to_transform", layers, file)
    tokens = config.get("trainable_token_indices") or []
    for ids in tokens.values() if isinstance(tokens, dict) else [tokens]:
        if not isinstance(ids, list) or not all(type(id_) is int and id_ >= 0 for id_ in ids):
            raise _wrong_type("trainable_token_indices", tokens, file)
    if not _are_blocks(config.get("use_bdlora") or {}):
        raise _wrong_type("use_bdlora", config["use_bdlora"], file)
    for key, types in NAME_TYPES.items():
        names = config.get(key)
        if names and not _are_names(key, names, types):
            raise _wrong_type(key, names, file)


def _are_blocks(settings: Any) -> bool:
    if settings == {}:
        return True
    if not isinstance(settings, dict) or type(settings.get("nblocks")) is not int:
        return False
    names = [settings.get(key) or [] for key in BLOCK_PARTS]
    return settings["nblocks"] > 0 and all(isinstance(name, list) for name in names)


def _are_names(key: str, names: Any, types: tuple[type, ...]) -> bool:
    """Whether a setting has the right type, and its regular expressions compile."""
    if not isinstance(names, types):
        return False
    listed = list(names) if isinstance(names, dict) else _as_list(names)
    if not all(isinstance(name, str) for name in listed):
        return False
    if isinstance(names, list) and key != "layers_pattern":
        return True  # module names, not expressions
    return all(compiles(expression) for expression in listed)


def _as_list(setting: Any) -> list[Any]:
    """A setting that peft writes as one value or as a list of them."""
    return setting if isinstance(setting, list) else [setting]


def _wrong_type(key: str, found: object, file: Path) -> ModelError:
    return ModelError(
        f"`{key}` has a value that peft does not write",
        where=file,
        found=found,
        remedy="Correct it.",
    )
