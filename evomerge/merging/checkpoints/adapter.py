"""A peft adapter's folder: its settings, checked, and its tensors, read when asked for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from evomerge.errors import ModelError
from evomerge.merging.checkpoints.model_folder import download, open_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OUTSIDE = ("model.embed_tokens", "lm_head")  # what peft does not count among all linear layers
MERGED_ELSEWHERE = "Merge it with peft first, and name the result."
# Settings that change what is merged, or that peft itself cannot merge.
REFUSED = (
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "ensure_weight_tying",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
# Ways to start training from which loading takes only the adapter's shapes; the others move the
# base's weights as well.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "lora_ga")


@dataclass(frozen=True)
class Adapter:
    """A LoRA that peft saved."""

    path: Path
    config: Mapping[str, Any]
    _weights: Any = field(repr=False, compare=False)  # the open safetensors file

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor, by its name in the file."""
        keys = list(self._weights.keys())
        return {key: tuple(self._weights.get_slice(key).get_shape()) for key in keys}

    def read(self, key: str) -> torch.Tensor:
        """A tensor as it lies on disk. Raises ModelError when the file is damaged."""
        try:
            tensor: torch.Tensor = self._weights.get_tensor(key)
        except SafetensorError as error:
            raise ModelError(
                f"tensor {key} cannot be read: {error}",
                where=self.path,
                remedy="Copy or download it again.",
            ) from error
        return tensor

    def rank_and_scaling(self, module: str) -> tuple[int, float]:
        """(r, alpha / r), or alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732); the first
        pattern that ends the name wins.
        """

        def setting(key: str, patterns: Any) -> Any:
            found = (
                value
                for pattern, value in (patterns or {}).items()
                if re.match(rf"(.*\.)?({pattern})$", module)
            )
            return next(found, self.config.get(key))

        rank, alpha = (
            setting("r", self.config.get("rank_pattern")),
            setting("lora_alpha", self.config.get("alpha_pattern")),
        )
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
            raise ModelError(
                f"`r` or `lora_alpha` of {module} is no number",
                where=self.path / CONFIG,
                found=[rank, alpha],
                remedy="Mend it.",
            )
        return rank, alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def targets(self, module: str) -> bool:
        """Whether peft would put a LoRA on the module: it leaves out, unsaid, what the settings do
        not name.
        """
        wanted, excluded = (
            self.config.get("target_modules") or [],
            self.config.get("exclude_modules") or [],
        )
        if _matches(excluded, module):
            return False
        if isinstance(wanted, str):
            return module not in OUTSIDE if wanted == "all-linear" else _matches(wanted, module)
        layers = self.config.get("layers_to_transform")
        if module in wanted or not _matches(wanted, module) or layers in (None, []):
            return _matches(wanted, module)
        patterns = self.config.get("layers_pattern") or [r"[^.]*"]
        found = (
            re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", module)
            for p in ([patterns] if isinstance(patterns, str) else patterns)
        )
        match = next((m for m in found if m), None)
        return match is not None and int(match[1]) in (
            [layers] if isinstance(layers, int) else layers
        )

    def saves(self, module: str) -> bool:
        """Whether the adapter brings the whole module, by peft's rule."""
        return any(module.endswith(name) for name in self.config.get("modules_to_save") or [])


def open_adapter(ref: str) -> Adapter:
    """A folder, or a hub name with an optional @revision.

    Raises ModelError: no adapter there, pickled or damaged, another kind than LoRA, a setting that
    is not supported.
    """
    path = _adapter_folder(ref)
    return Adapter(path, _read_config(path), open_safetensors(path / WEIGHTS))


def _adapter_folder(adapter: str) -> Path:
    path = Path(adapter).expanduser()
    if not path.is_dir():
        if path.exists() or adapter.count("/") != 1 or adapter.startswith((".", "/", "~")):
            raise ModelError(
                "there is no adapter folder",
                where=adapter,
                remedy="Name a folder that peft saved, or a hub name.",
            )
        path = download(adapter)
    config, weights = path / CONFIG, path / WEIGHTS
    if not config.is_file():
        raise ModelError(
            "the folder has no adapter_config.json",
            where=path,
            remedy="After + comes a folder that peft saved.",
        )
    if not weights.is_file():
        if (path / "adapter_model.bin").is_file():
            raise ModelError(
                "the adapter is pickled, and reading it could run code",
                where=path / "adapter_model.bin",
                remedy="Convert it where you trust it: load it with peft and save_pretrained(folder).",
            )
        raise ModelError(
            "the folder has no adapter_model.safetensors",
            where=path,
            remedy="Copy or download the adapter again.",
        )
    return path


def _read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json. Raises ModelError for another kind than LoRA and for settings that are
    not supported.
    """
    file = path / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"adapter_config.json cannot be read: {error}",
            where=path,
            remedy="Copy or download the adapter again.",
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise ModelError("the adapter is no LoRA", where=file, found=kind, remedy=MERGED_ELSEWHERE)
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
            remedy="Save it with peft as a plain LoRA: save_pretrained(path_initial_model_for_weight_conversion=…).",
        )
    _check_names(config, file)
    return config


def _check_names(config: Mapping[str, Any], file: Path) -> None:
    """Names, regular expressions and layers, of the kinds that peft takes."""
    layers = config.get("layers_to_transform") or []
    if not all(
        isinstance(layer, int) for layer in (layers if isinstance(layers, list) else [layers])
    ):
        raise ModelError(
            "`layers_to_transform` is not what peft writes there",
            where=file,
            found=layers,
            remedy="Mend it.",
        )
    for key in (
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
    ):
        names = config.get(key)
        if not names:
            continue
        kinds = (
            dict
            if key in ("rank_pattern", "alpha_pattern")
            else list
            if key == "modules_to_save"
            else str | list
        )
        try:
            good = isinstance(names, kinds) and all(isinstance(name, str) for name in names)
            if good and (isinstance(names, dict | str) or key == "layers_pattern"):
                for name in [names] if isinstance(names, str) else names:
                    re.compile(name)
        except re.error:
            good = False
        if not good:
            raise ModelError(
                f"`{key}` is not what peft writes there", where=file, found=names, remedy="Mend it."
            )


def _matches(names: str | list[str], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)
