"""Which adapter tensors change which of the base's, checked before anything is merged."""

from __future__ import annotations

from collections.abc import Collection

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
from evomerge.merging.adapters.live_modules import LiveModules
from evomerge.merging.adapters.lora import AdaptedModel, ModuleLora, TokenRows
from evomerge.merging.adapters.lora_places import OWN_BASE, LoraPlace, find_place, shapes_of
from evomerge.merging.architecture.conversion import Group
from evomerge.merging.checkpoints.config_defaults import config_value
from evomerge.merging.checkpoints.model_folder import ModelFolder
from evomerge.merging.checkpoints.safetensors_reader import SafetensorsReader


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
        self.live = LiveModules(base, self.loaded)
        self.tied = self._is_tied()
        # by the file's names; by the loaded model's where `groups` says what the tensor is made of
        self.replaced: dict[str, str] = {}
        self.loras: dict[str, list[ModuleLora]] = {}
        self.rows: dict[str, list[TokenRows]] = {}
        self.groups: dict[str, Group] = {}
        self.experts: set[str] = set()  # the file's tensors with a LoRA of their own
        found = sort_tensors(adapter, self.live.names, self.live.embeddings.rpartition(".")[0])
        # the head's comes last, as in the model
        for name, key in sorted(found.whole.items(), key=lambda item: item[0] == self.live.head):
            self._check_whole(key, name)
            self.replaced[self._target(name)] = key
        for module, key in sorted(found.rows.items(), key=lambda item: self._is_head(item[0])):
            self._add_rows(module, key)
        self._check_saved_modules(found)
        given = set()
        for wrapped in sorted(found.loras, key=self._is_head):
            given.add(self._add_lora(wrapped, found.loras[wrapped]))
        self._add_missing(given)
        for name in self.rows.keys() & self.loras.keys():
            raise self.adapter.error(f"`trainable_token_indices` and a LoRA both change {name}")
        for name in self.groups.keys() & self.experts:
            raise self.adapter.error(f"it changes {name} alone and with other experts")

    def _is_head(self, module: str) -> bool:
        return f"{module}.weight" == self.live.head

    def model(self, ref: str) -> AdaptedModel:
        """What base and adapter make together, under that reference."""
        files = dict(self.base.files)
        config = dict(self.base.config)
        head = self.base.head if self.base.head in files else self.live.head
        if self.tied:
            files.pop(head, None)
        elif config_value(config, "tie_word_embeddings") or head not in files:
            files.setdefault(head, self.adapter.path / WEIGHTS)
            config["tie_word_embeddings"] = False
        return AdaptedModel(
            self.base.path,
            config,
            files,
            ref,
            base=self.base,
            adapter=self.adapter.path,
            loaded=self.loaded,
            _dtypes=self.live.dtypes,
            _weights=self.adapter,
            _replaced=self.replaced,
            _loras=self.loras,
            _rows=self.rows,
            _groups=self.groups,
            _model=self.live.model,
        )

    def _add_rows(self, module: str, key: str) -> None:
        """Rows of a module that `trainable_token_indices` names."""
        ids = self.adapter.token_ids(module, self.live.embeddings.rpartition(".")[0])
        name = f"{module}.weight"
        shape = self.live.shape(name)
        if shape is None:
            raise self.adapter.error(f"it contains rows of {name}, which the base lacks", OWN_BASE)
        rows, *width = shape
        if ids and max(ids) >= rows:
            raise self._resized(max(ids) + 1, rows)
        if not ids or self.adapter.shapes[key] != (len(ids), *width):
            raise self.adapter.error(
                f"the rows of {name} have shape {self.adapter.shapes[key]}, but the base and "
                f"`trainable_token_indices` give {(len(ids), *width)}",
                OWN_BASE,
            )
        self.rows.setdefault(self._target(name), []).append(TokenRows(ids, key))

    def _check_saved_modules(self, found: AdapterTensors) -> None:
        for wanted in self.config.get("modules_to_save") or []:
            if not any(is_within(name.rpartition(".")[0], wanted) for name in found.whole):
                raise self.adapter.error(
                    f"`modules_to_save` names {wanted}, which {WEIGHTS} lacks", COPY_ADAPTER
                )
        if self.config.get("trainable_token_indices") and not found.rows:
            raise self.adapter.error(
                f"`trainable_token_indices` names rows, which {WEIGHTS} lacks", COPY_ADAPTER
            )

    def _add_missing(self, given: Collection[str]) -> None:
        """A LoRA of zeros where the settings name a module that the file lacks.

        As in peft: it turns -0 into 0.
        """
        for module in self.live.targeted(self.adapter):
            name = f"{module}.weight"
            if name in given or self.live.shape(name) is None:
                continue
            if self._target(name) in self.replaced:
                continue
            if self.config.get("use_dora"):
                raise self.adapter.error(
                    f"it lacks a LoRA for {module}, which its `target_modules` name", COPY_ADAPTER
                )
            self.loras.setdefault(self._target(name), []).append(ModuleLora({}, 0.0))

    def _add_lora(self, wrapped: str, parts: dict[str, str]) -> str:
        """Take in one LoRA, checked; the tensor of the live model that it changes."""
        place = find_place(self.live, self.adapter, wrapped)
        module, name = place.module, place.tensor
        if place.is_expert:
            self._add_expert(place, parts)
            return name
        weight = self.live.shape(name)
        if weight is None:
            remedy = OWN_BASE if self.live.model is None else MERGED_ELSEWHERE
            raise self.adapter.error(f"it targets {module}, which the base lacks", remedy)
        if not self.adapter.targets_parameter(name) and not self._targets(module):
            raise self._left_out(module)
        bias = f"{module}.bias"
        if self.config.get("lora_bias") and self.live.shape(bias) is None:
            raise self.adapter.error(
                f"`lora_bias` needs {bias}, which the base lacks; peft cannot merge it either",
                "Train it without `lora_bias`.",
            )
        lora = self._lora(place, parts, weight)
        self.loras.setdefault(self._target(name), []).append(lora)
        if "lora_B.bias" in parts:
            self.loras.setdefault(self._target(bias), []).append(lora)
        return name

    def _add_expert(self, place: LoraPlace, parts: dict[str, str]) -> None:
        """A LoRA on one of the experts that transformers stacks: on its tensor in the file."""
        if not self.adapter.targets(place.module):
            raise self._left_out(place.module)
        for key in ("use_dora", "lora_bias"):
            if self.config.get(key):
                raise self.adapter.error(
                    f"it targets {place.module}, an expert, with `{key}`, which is not supported",
                    "Merge it with transformers 4 and peft, and name the result.",
                )
        lora = self._lora(place, parts, self.base.shape(place.tensor))
        self.loras.setdefault(place.tensor, []).append(lora)
        self.experts.add(place.tensor)

    def _left_out(self, module: str) -> ModelError:
        return self.adapter.error(
            f"it contains a LoRA for {module}, which its `target_modules` leave out",
            "Correct adapter_config.json.",
        )

    def _lora(self, place: LoraPlace, parts: dict[str, str], weight: tuple[int, ...]) -> ModuleLora:
        """One LoRA, its shapes checked against the weight's and the rank."""
        rank, scaling = self.adapter.rank_and_scaling(place.name)
        blocks = self.adapter.blocks(place.name)
        wanted = shapes_of(place, weight, rank, "lora_embedding_A" in parts, self.config)
        for part, n in blocks.items():
            if part in wanted:
                wanted[part] = (wanted[part][0], wanted[part][1] // n)
        for part in sorted(wanted.keys() | parts.keys()):
            found = self.adapter.shapes[parts[part]] if part in parts else None
            if found != wanted.get(part):
                self._check_vocabulary(place.module, found, wanted.get(part))
                raise self.adapter.error(
                    f"{part} of {place.name} has shape {found}, "
                    f"but the base and adapter_config.json give {wanted.get(part)}",
                    OWN_BASE,
                )
        alone = place.on_parameter or place.is_expert
        rounded = alone or bool(self.config.get("use_bdlora"))
        return ModuleLora(parts, scaling, rounded, blocks, place.is_in_out)

    def _targets(self, module: str) -> bool:
        """Whether peft would put a LoRA on the module; the embeddings' is a tied head's as well."""
        is_tied = self.tied and self._is_head(module)
        if is_tied and self.config.get("ensure_weight_tying"):
            module = self.live.embeddings.removesuffix(".weight")
        return self.adapter.targets(module, linear=self.live.is_linear(module))

    def _check_vocabulary(
        self, module: str, found: tuple[int, ...] | None, wanted: tuple[int, ...] | None
    ) -> None:
        """Raise ModelError where a LoRA differs from the base in the number of tokens alone."""
        name = f"{module}.weight"
        shape = self.live.shape(name)
        if name not in (self.live.embeddings, self.live.head) or not (found and wanted and shape):
            return
        for axis in (0, 1):
            if wanted[axis] == shape[0] and found[1 - axis] == wanted[1 - axis]:
                raise self._resized(found[axis], shape[0])

    def _check_whole(self, key: str, name: str) -> None:
        """A whole tensor of the adapter must replace one of the base's, of the same shape."""
        wanted = self.live.shape(name)
        if wanted is None:
            raise self.adapter.error(f"it contains {name}, which the base lacks", OWN_BASE)
        found = self.adapter.shapes[key]
        if found == wanted:
            return
        if name in (self.live.embeddings, self.live.head) and found[1:] == wanted[1:]:
            raise self._resized(found[0], wanted[0])
        raise self.adapter.error(f"{name} has shape {found}, the base's has {wanted}", OWN_BASE)

    def _resized(self, found: int, wanted: int) -> ModelError:
        return self.adapter.error(
            f"resized embeddings are not supported: "
            f"its vocabulary has {found} rows, the base's {wanted}"
        )

    def _target(self, name: str) -> str:
        """The merged model's tensor of that live name; its group is noted where it has one."""
        if self.tied and name == self.live.head:
            name = self.live.embeddings
        group = self.live.group(name)
        if group is not None and not self.live.can_revert(group):
            raise self.adapter.error(
                f"it changes {name}, which transformers makes of {group.sources[0]} and others"
            )
        if group is not None:
            self.groups.update(dict.fromkeys(group.sources, group))
            return name
        stored = self.live.file_name(name)
        assert stored is not None, name
        return stored

    def _is_tied(self) -> bool:
        """Whether head and embeddings are one tensor, by transformers' rule.

        `modules_to_save` makes them two, unless `ensure_weight_tying` keeps both the same.
        """
        names = (self.live.embeddings, self.live.head)
        saved = any(self.adapter.saves(name.removesuffix(".weight")) for name in names)
        if saved and not self.adapter.ties_saved:
            return False
        embeddings, head = self.base.embeddings, self.base.head
        if head not in self.base.keys:
            return True
        if not config_value(self.base.config, "tie_word_embeddings"):
            return False
        stored = self.base.get_tensor(head).to(self.loaded)
        return torch.equal(stored, self.base.get_tensor(embeddings).to(self.loaded))


def _first_dtype(base: ModelFolder) -> torch.dtype:
    """transformers' choice without a `dtype`: the first tensor's, by name, in the first file."""
    if base.is_dequantized:
        return torch.bfloat16
    reader = SafetensorsReader(sorted(set(base.files.values()))[0])
    return reader.dtype_or_none(reader.keys[0]) or torch.float32
