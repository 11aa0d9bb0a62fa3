"""Which adapter tensors change which of the base's, checked before anything is merged."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from evomerge.errors import ModelError
from evomerge.merging.adapters.adapter import (
    COPY_ADAPTER,
    MERGED_ELSEWHERE,
    WEIGHTS,
    Adapter,
    is_within,
    open_adapter,
)
from evomerge.merging.adapters.adapter_tensors import AdapterTensors, sort_tensors
from evomerge.merging.adapters.lora import AdaptedModel, ModuleLora, TokenRows, source
from evomerge.merging.architecture.architecture import EMBED, HEAD
from evomerge.merging.checkpoints.config_defaults import config_value
from evomerge.merging.checkpoints.model_folder import ModelFolder
from evomerge.merging.checkpoints.safetensors_reader import SafetensorsReader

OWN_BASE = "Use it with the model that it was trained on."


def open_lora(base: ModelFolder, adapter: str, ref: str = "") -> AdaptedModel:
    """The model that `base` and a peft adapter (a folder, or a hub name) make together.

    Raises ModelError: no adapter there, pickled or damaged, another kind than LoRA, a setting that
    is not supported, a tensor that the base lacks or has in another shape.
    """
    plan = _LoraPlan(base, open_adapter(adapter))
    return plan.model(ref or f"{base.ref or base.path}+{adapter}")


class _LoraPlan:
    """What the adapter adds to each tensor of the merged model, or puts in its place."""

    def __init__(self, base: ModelFolder, adapter: Adapter) -> None:
        self.base, self.adapter, self.config = base, adapter, adapter.config
        self.loaded = _first_dtype(base)
        self.tied = self._is_tied()
        self.replaced: dict[str, str] = {}
        self.loras: dict[str, list[ModuleLora]] = {}
        self.rows: dict[str, list[TokenRows]] = {}
        found = sort_tensors(adapter, base.keys)
        # the head's comes last, as in the model
        for name, key in sorted(found.whole.items(), key=lambda item: item[0] == HEAD):
            self._check_whole(key, self._target(name))
            self.replaced[self._target(name)] = key
        for module, key in sorted(found.rows.items(), key=lambda item: item[0] == "lm_head"):
            self._add_rows(module, key)
        self._check_saved_modules(found)
        modules = found.loras
        for module in sorted(modules, key=lambda module: f"{module}.weight" == HEAD):
            lora = self._lora(module, modules[module])
            self.loras.setdefault(self._target(f"{module}.weight"), []).append(lora)
            if "lora_B.bias" in lora.parts:
                self.loras.setdefault(f"{module}.bias", []).append(lora)
        self._add_missing(modules)
        for name in self.rows.keys() & self.loras.keys():
            raise self._error(f"`trainable_token_indices` and a LoRA both change {name}")

    def model(self, ref: str) -> AdaptedModel:
        """What base and adapter make together, under that reference."""
        files = dict(self.base.files)
        config = dict(self.base.config)
        if self.tied:
            files.pop(HEAD, None)
        elif config_value(config, "tie_word_embeddings") or HEAD not in files:
            files.setdefault(HEAD, self.adapter.path / WEIGHTS)
            config["tie_word_embeddings"] = False
        return AdaptedModel(
            self.base.path,
            config,
            files,
            ref,
            base=self.base,
            adapter=self.adapter.path,
            loaded=self.loaded,
            _weights=self.adapter,
            _replaced=self.replaced,
            _loras=self.loras,
            _rows=self.rows,
        )

    def _add_rows(self, module: str, key: str) -> None:
        """Rows of a module that `trainable_token_indices` names."""
        ids, name = self.adapter.token_ids(module), self._target(f"{module}.weight")
        place = source(self.base, name)
        if place not in self.base.keys:
            raise self._error(f"it contains rows of {name}, which the base lacks", OWN_BASE)
        rows, *width = self.base.shape(place)
        if ids and max(ids) >= rows:
            raise self._resized(max(ids) + 1, rows)
        if not ids or self.adapter.shapes[key] != (len(ids), *width):
            raise self._error(
                f"the rows of {name} have shape {self.adapter.shapes[key]}, but the base and "
                f"`trainable_token_indices` give {(len(ids), *width)}",
                OWN_BASE,
            )
        self.rows.setdefault(name, []).append(TokenRows(ids, key))

    def _check_saved_modules(self, found: AdapterTensors) -> None:
        for wanted in self.config.get("modules_to_save") or []:
            if not any(is_within(name.rpartition(".")[0], wanted) for name in found.whole):
                raise self._error(
                    f"`modules_to_save` names {wanted}, which {WEIGHTS} lacks", COPY_ADAPTER
                )
        if self.config.get("trainable_token_indices") and not found.rows:
            raise self._error(
                f"`trainable_token_indices` names rows, which {WEIGHTS} lacks", COPY_ADAPTER
            )

    def _add_missing(self, modules: Mapping[str, object]) -> None:
        """A LoRA of zeros where the settings name a module that the file lacks.

        As in peft: it turns -0 into 0.
        """
        for name in self.base.keys:
            module = name.removesuffix(".weight")
            if module in modules or name in self.replaced:
                continue
            if len(self.base.shape(name)) != 2 or not self.adapter.targets(module):
                continue
            if self.config.get("use_dora"):
                raise self._error(
                    f"it lacks a LoRA for {module}, which its `target_modules` name", COPY_ADAPTER
                )
            self.loras.setdefault(self._target(name), []).append(ModuleLora({}, 0.0))

    def _lora(self, module: str, parts: dict[str, str]) -> ModuleLora:
        """One module's LoRA, its shapes checked against the base's and the rank."""
        weight = source(self.base, self._target(f"{module}.weight"))
        if weight not in self.base.keys:
            raise self._error(f"it targets {module}, which the base lacks", OWN_BASE)
        if ".experts." in module:
            raise self._error(f"it targets {module}, and a LoRA on experts is not supported")
        on_parameter = self.adapter.targets_parameter(f"{module}.weight")
        if not on_parameter and not self._targets(module):
            raise self._error(
                f"it contains a LoRA for {module}, which its `target_modules` leave out",
                "Correct adapter_config.json.",
            )
        if self.config.get("lora_bias") and f"{module}.bias" not in self.base.keys:
            raise self._error(f"`lora_bias` needs {module}.bias, which the base lacks")
        rank, scaling = self.adapter.rank_and_scaling(module)
        blocks = self.adapter.blocks(module)
        wanted = self._shapes(self.base.shape(weight), rank, "lora_embedding_A" in parts)
        for part, n in blocks.items():
            if part in wanted:
                wanted[part] = (wanted[part][0], wanted[part][1] // n)
        for part in sorted(wanted.keys() | parts.keys()):
            found = self.adapter.shapes[parts[part]] if part in parts else None
            if found != wanted.get(part):
                self._check_vocabulary(module, found, wanted.get(part))
                raise self._error(
                    f"{part} of {module} has shape {found}, "
                    f"but the base and adapter_config.json give {wanted.get(part)}",
                    OWN_BASE,
                )
        rounded = on_parameter or bool(self.config.get("use_bdlora"))
        return ModuleLora(parts, scaling, rounded, blocks)

    def _targets(self, module: str) -> bool:
        """Whether peft would put a LoRA on the module; the embeddings' is a tied head's as well."""
        is_tied = self.tied and f"{module}.weight" == HEAD
        if is_tied and self.config.get("ensure_weight_tying"):
            module = EMBED.removesuffix(".weight")
        return self.adapter.targets(module)

    def _check_vocabulary(
        self, module: str, found: tuple[int, ...] | None, wanted: tuple[int, ...] | None
    ) -> None:
        """Raise ModelError where a LoRA differs from the base in the number of tokens alone."""
        if f"{module}.weight" not in (EMBED, HEAD) or not found or not wanted:
            return
        rows = self.base.shape(source(self.base, f"{module}.weight"))[0]
        for axis in (0, 1):
            if wanted[axis] == rows and found[1 - axis] == wanted[1 - axis]:
                raise self._resized(found[axis], rows)

    def _shapes(
        self, weight: tuple[int, ...], rank: int, is_embedding: bool
    ) -> dict[str, tuple[int, ...]]:
        """Part -> shape of all that a LoRA on a weight of that shape must hold."""
        rows, columns = weight if len(weight) == 2 else (0, 0)
        shapes: dict[str, tuple[int, ...]] = {}
        if is_embedding:
            shapes["lora_embedding_A"] = (rank, rows)
            shapes["lora_embedding_B"] = (columns, rank)
        else:
            shapes["lora_A.weight"] = (rank, columns)
            shapes["lora_B.weight"] = (rows, rank)
            if self.config.get("lora_bias"):
                shapes["lora_B.bias"] = (rows,)
        if self.config.get("use_dora"):
            shapes["lora_magnitude_vector"] = (columns,) if is_embedding else (rows,)
        return shapes

    def _check_whole(self, key: str, name: str) -> None:
        """A whole tensor of the adapter must replace one of the base's, of the same shape."""
        place = source(self.base, name)
        if place not in self.base.keys:
            raise self._error(f"it contains {name}, which the base lacks", OWN_BASE)
        found, wanted = self.adapter.shapes[key], self.base.shape(place)
        if found == wanted:
            return
        if name in (EMBED, HEAD) and found[1:] == wanted[1:]:
            raise self._resized(found[0], wanted[0])
        raise self._error(f"{name} has shape {found}, the base's has {wanted}", OWN_BASE)

    def _resized(self, found: int, wanted: int) -> ModelError:
        return self._error(
            f"resized embeddings are not supported: "
            f"its vocabulary has {found} rows, the base's {wanted}"
        )

    def _target(self, name: str) -> str:
        """The merged model's tensor of that name."""
        return EMBED if self.tied and name == HEAD else name

    def _is_tied(self) -> bool:
        """Whether head and embeddings are one tensor, by transformers' rule.

        `modules_to_save` makes them two, unless `ensure_weight_tying` keeps both the same.
        """
        saved = any(self.adapter.saves(name.removesuffix(".weight")) for name in (EMBED, HEAD))
        if saved and not self.config.get("ensure_weight_tying"):
            return False
        if HEAD not in self.base.keys:
            return True
        if not config_value(self.base.config, "tie_word_embeddings"):
            return False
        head = self.base.get_tensor(HEAD).to(self.loaded)
        return torch.equal(head, self.base.get_tensor(EMBED).to(self.loaded))

    def _error(self, what: str, remedy: str = MERGED_ELSEWHERE) -> ModelError:
        return ModelError(what, where=self.adapter.path, remedy=remedy)


def _first_dtype(base: ModelFolder) -> torch.dtype:
    """transformers' choice without a `dtype`: the first tensor's, by name, in the first file."""
    if base.is_dequantized:
        return torch.bfloat16
    reader = SafetensorsReader(sorted(set(base.files.values()))[0])
    return reader.dtype_or_none(reader.keys[0]) or torch.float32
