"""MODEL+ADAPTER references: a model folder whose tensors have a peft LoRA merged in as they are
read.

The numbers are those of peft 0.21's `merge_and_unload()` on the CPU, bit for bit, after mergekit's
way of loading the model (AutoModelForCausalLM with `torch_dtype=None`, transformers 5): every
tensor takes the dtype of the first one on disk, whatever config.json says. The adapter's numbers
are float32, whatever they are on disk. `fan_in_fan_out` changes nothing, as in peft: linear layers
and embeddings ignore it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from evomerge.errors import ModelError
from evomerge.merging.checkpoints.adapter import MERGED_ELSEWHERE, WEIGHTS, Adapter, open_adapter
from evomerge.merging.checkpoints.model_folder import DTYPES, ModelFolder, open_safetensors

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PREFIX = "base_model.model."
PART = re.compile(
    r"^(.+)\.(lora_[AB]\.(?:weight|bias)|lora_embedding_[AB]|lora_magnitude_vector)(?:\.weight)?$"
)


def linear(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    magnitude: torch.Tensor | None = None,
) -> torch.Tensor:
    """r(W + s BA): weight (out, in), a (r, in), b (out, r); the sum in float32, one rounding r to
    the weight's dtype.

    LoRA, arXiv 2106.09685, eq. 3. With `magnitude` (out,): r(m / |W + s BA| * (W + s BA)), the norm
    over each row (DoRA, arXiv 2402.09353, eq. 5).
    """
    merged = (b.float() @ a.float()).mul_(scaling).add_(weight)
    if magnitude is not None:
        merged = (magnitude.float() / torch.linalg.norm(merged, dim=1)).view(-1, 1) * merged
    return merged.to(weight.dtype)


def embedding(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    magnitude: torch.Tensor | None = None,
) -> torch.Tensor:
    """W + r(s (BA)^T): weight (vocabulary, hidden), a (r, vocabulary), b (hidden, r); the delta is
    rounded before the sum.

    With `magnitude` (hidden,): DoRA as in `linear`, the norm over each column, one rounding.
    """
    delta = (b.float() @ a.float()).T * scaling
    if magnitude is None:
        return weight + delta.to(weight.dtype)
    merged = weight + delta
    norm = torch.linalg.norm(weight.T + delta.T, dim=1)
    return ((magnitude.float() / norm).view(1, -1) * merged).to(weight.dtype)


@dataclass(frozen=True)
class _Lora:
    """What the adapter holds for one module; parts: the name after the module -> the tensor's name
    in the file.
    """

    parts: Mapping[str, str]
    scaling: float


@dataclass(frozen=True, kw_only=True)
class AdaptedModel(ModelFolder):
    """A base and an adapter, seen as the model that merging the one into the other would give."""

    base: ModelFolder
    adapter: Path  # the adapter's folder: a fingerprint needs it beside `path`, which is the base's
    loaded: torch.dtype  # of every tensor
    _weights: Adapter = field(repr=False)
    # tensor -> the adapter's tensor that takes its place
    _replaced: Mapping[str, str] = field(repr=False)
    # tensor -> LoRAs, in the order in which they are added
    _loras: Mapping[str, list[_Lora]] = field(repr=False)

    @property
    def places(self) -> tuple[Path, ...]:
        """The base's folder and the adapter's."""
        return (*self.base.places, self.adapter)

    @cached_property
    def _headers(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {name: (self.base.shape(self._source(name)), self.loaded) for name in self.files}

    def get_tensor(self, name: str) -> torch.Tensor:
        """The merged tensor. Raises ModelError when a file is damaged."""
        name = self.stored(name)
        replaced = self._replaced.get(name)
        tensor = (
            self._weights.read(replaced) if replaced else self.base.get_tensor(self._source(name))
        ).to(self.loaded)
        for lora in self._loras.get(name, ()):
            tensor = self._merge(
                tensor,
                {part: self._weights.read(key) for part, key in lora.parts.items()},
                lora.scaling,
            )
        return tensor

    def _merge(
        self, tensor: torch.Tensor, parts: Mapping[str, torch.Tensor], scaling: float
    ) -> torch.Tensor:
        if not parts:
            return tensor + 0.0
        if tensor.ndim == 1:
            return (tensor + parts["lora_B.bias"].float() * scaling).to(tensor.dtype)
        magnitude = parts.get("lora_magnitude_vector")
        if "lora_embedding_A" in parts:
            return embedding(
                tensor, parts["lora_embedding_A"], parts["lora_embedding_B"], scaling, magnitude
            )
        return linear(tensor, parts["lora_A.weight"], parts["lora_B.weight"], scaling, magnitude)

    def _source(self, name: str) -> str:
        return _source(self.base, name)


def open_lora(base: ModelFolder, adapter: str, ref: str = "") -> AdaptedModel:
    """The model that `base` and the peft adapter (a folder, or a hub name with an optional
    @revision) make together.

    Raises ModelError: no adapter there, pickled or damaged, another kind than LoRA, a setting that
    is not supported, a tensor that the base lacks or has in another shape.
    """
    return _Plan(base, open_adapter(adapter)).model(ref or f"{base.ref or base.path}+{adapter}")


class _Plan:
    """Which of an adapter's tensors change which of the base's."""

    def __init__(self, base: ModelFolder, adapter: Adapter) -> None:
        self.base, self.adapter, self.config = base, adapter, adapter.config
        self.loaded = _first_dtype(base)
        self.tied = self._is_tied()
        self.replaced: dict[str, str] = {}
        self.loras: dict[str, list[_Lora]] = {}
        self._sort()

    def model(self, ref: str) -> AdaptedModel:
        """What base and adapter make together, by its reference. Raises ModelError."""
        files = {
            name: file for name, file in self.base.files.items() if not (self.tied and name == HEAD)
        }
        config = dict(self.base.config)
        if not self.tied and config.get("tie_word_embeddings"):
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
        )

    def _sort(self) -> None:
        modules: dict[str, dict[str, str]] = {}
        for key in self.adapter.shapes:
            if not key.startswith(PREFIX):
                raise self._error(f"tensor {key} is of a kind that is not supported")
            match = PART.match(key.removeprefix(PREFIX))
            if match:
                modules.setdefault(match[1], {})[match[2]] = key
                continue
            name = self._target(key.removeprefix(PREFIX).replace(".base_layer.", "."))
            self._check_whole(key, name)
            self.replaced[name] = key
        for wanted in self.config.get("modules_to_save") or []:
            if not any(name.rpartition(".")[0].endswith(wanted) for name in self.replaced):
                raise self._error(
                    f"`modules_to_save` names {wanted}, which {WEIGHTS} lacks",
                    "Copy or download the adapter again.",
                )
        # the head's comes last, as in the model
        for module in sorted(modules, key=lambda module: f"{module}.weight" == HEAD):
            lora = self._lora(module, modules[module])
            self.loras.setdefault(self._target(f"{module}.weight"), []).append(lora)
            if "lora_B.bias" in lora.parts:
                self.loras.setdefault(f"{module}.bias", []).append(lora)
        self._add_missing(set(modules))

    def _add_missing(self, modules: set[str]) -> None:
        """A LoRA of zeros where the settings name a module that the file lacks, as in peft: it
        turns -0 into 0.
        """
        for name in self.base.keys:
            module = name.removesuffix(".weight")
            if (
                module not in modules
                and len(self.base.shape(name)) == 2
                and self.adapter.targets(module)
                and name not in self.replaced
            ):
                if self.config.get("use_dora"):
                    raise self._error(
                        f"it lacks a LoRA for {module}, which its `target_modules` name",
                        "Copy or download it again.",
                    )
                self.loras.setdefault(self._target(name), []).append(_Lora({}, 0.0))

    def _lora(self, module: str, parts: dict[str, str]) -> _Lora:
        """One module's LoRA, its shapes checked against the base's and the rank."""
        weight = self._source(self._target(f"{module}.weight"))
        if weight not in self.base.keys:
            raise self._error(
                f"it targets {module}, which the base lacks",
                "Use it with the model that it was trained on.",
            )
        if ".experts." in module:
            raise self._error(f"it targets {module}, and a LoRA on experts is not supported")
        if not self.adapter.targets(module):
            raise self._error(
                f"it holds a LoRA for {module}, which its `target_modules` leave out",
                "Mend adapter_config.json.",
            )
        if self.config.get("lora_bias") and f"{module}.bias" not in self.base.keys:
            raise self._error(f"`lora_bias` needs {module}.bias, which the base lacks")
        rank, scaling = self.adapter.rank_and_scaling(module)
        wanted = self._shapes(self.base.shape(weight), rank, "lora_embedding_A" in parts)
        for part in sorted(wanted.keys() | parts.keys()):
            found = self.adapter.shapes[parts[part]] if part in parts else None
            if found != wanted.get(part):
                raise self._error(
                    f"{part} of {module} has shape {found}, but the base and adapter_config.json give {wanted.get(part)}",
                    "Use it with the model that it was trained on.",
                )
        return _Lora(parts, scaling)

    def _shapes(
        self, weight: tuple[int, ...], rank: int, is_embedding: bool
    ) -> dict[str, tuple[int, ...]]:
        """What a LoRA on a weight of that shape has to hold."""
        rows, columns = weight if len(weight) == 2 else (0, 0)
        if is_embedding:
            shapes: dict[str, tuple[int, ...]] = {
                "lora_embedding_A": (rank, rows),
                "lora_embedding_B": (columns, rank),
            }
        else:
            shapes = {"lora_A.weight": (rank, columns), "lora_B.weight": (rows, rank)}
            if self.config.get("lora_bias"):
                shapes["lora_B.bias"] = (rows,)
        if self.config.get("use_dora"):
            shapes["lora_magnitude_vector"] = (columns,) if is_embedding else (rows,)
        return shapes

    def _check_whole(self, key: str, name: str) -> None:
        """A whole tensor of the adapter has to replace one of the base's, of the same shape."""
        place = self._source(name)
        if place not in self.base.keys:
            raise self._error(
                f"it holds {name}, which the base lacks",
                "Use it with the model that it was trained on.",
            )
        found, wanted = self.adapter.shapes[key], self.base.shape(place)
        if found != wanted:
            if name in (EMBED, HEAD) and found[1:] == wanted[1:]:
                raise self._error(
                    f"resized embeddings are not supported: its vocabulary has {found[0]} rows, the base's {wanted[0]}"
                )
            raise self._error(
                f"{name} has shape {found}, the base's has {wanted}",
                "Use it with the model that it was trained on.",
            )

    def _target(self, name: str) -> str:
        """The merged model's tensor of that name."""
        return EMBED if self.tied and name == HEAD else name

    def _source(self, name: str) -> str:
        return _source(self.base, name)

    def _is_tied(self) -> bool:
        """Whether head and embeddings are one tensor, by transformers' rule; `modules_to_save`
        makes them two.
        """
        if any(self.adapter.saves(name.removesuffix(".weight")) for name in (EMBED, HEAD)):
            return False
        if HEAD not in self.base.keys:
            return True
        if not self.base.config.get("tie_word_embeddings"):
            return False
        head, embed = (self.base.get_tensor(name).to(self.loaded) for name in (HEAD, EMBED))
        return torch.equal(head, embed)

    def _error(self, what: str, remedy: str = MERGED_ELSEWHERE) -> ModelError:
        return ModelError(what, where=self.adapter.path, remedy=remedy)


def _source(base: ModelFolder, name: str) -> str:
    """The base's tensor that a merged one starts from: the embeddings for a head that the adapter
    unties.
    """
    return EMBED if name == HEAD and HEAD not in base.keys else name


def _first_dtype(base: ModelFolder) -> torch.dtype:
    """transformers' choice without a `dtype`: that of the first tensor, by name, in the first file."""
    file = open_safetensors(sorted(set(base.files.values()))[0])
    return DTYPES.get(file.get_slice(next(iter(file.keys()))).get_dtype(), torch.float32)
