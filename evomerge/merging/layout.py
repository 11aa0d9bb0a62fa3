"""Which of a recipe's parameters, and which tensors, go into which tensor of the merged model:
mergekit's rules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.errors import ModelError, RecipeError, UnsupportedRecipe
from evomerge.merging.checkpoints.model_folder import HEAD, ModelFolder, num_layers
from evomerge.recipe import BOOLEANS, MERGEKIT, Recipe, Slice, Source, scalar

LAYER = re.compile(r"^(.*?\blayers\.)(\d+)(\..*)$")
# outside the layers: the first slice's and the last's
FIRST, LAST = ("model.embed_tokens.",), ("model.norm.", "lm_head.")
# What mergekit 0.1.5 has a description of. Of other architectures it takes all that is outside the
# layers from the first slice.
FAMILIES = (
    *(
        "Apertus",
        "Arcee",
        "Baichuan",
        "Cohere",
        "Cohere2",
        "Gemma",
        "Gemma2",
        "Gemma3",
        "Glm4",
        "Granite",
        "LLaMa",
        "Llama",
    ),
    *(
        "Mistral",
        "Olmo2",
        "Phi3",
        "Phi3Small",
        "Qwen2",
        "Qwen3",
        "Solar",
        "StableLMEpoch",
        "StableLm",
        "Starcoder2",
    ),
)
KNOWN = frozenset(f"{family}ForCausalLM" for family in FAMILIES)


@dataclass(frozen=True)
class Place:
    """Where a tensor's parameters come from: its slice, the layer within it, and t in 0 to 1 along
    its layers for gradients.
    """

    piece: Slice
    layer: int | None
    t: float


@dataclass(frozen=True)
class How:
    """All that decides one merged tensor's bits beside the models' contents. `siblings` are (model,
    tensor name) pairs.

    For linear every model is a sibling and there is no base.
    """

    method: str
    base: tuple[str, str] | None
    siblings: tuple[tuple[str, str], ...]
    weights: tuple[float, ...] = ()
    densities: tuple[float, ...] = ()
    t: float = 0.0
    normalize: bool = False
    scale: float = 1.0
    rescale: bool = False

    @property
    def inputs(self) -> tuple[tuple[str, str], ...]:
        """(model, tensor name) of everything that is read, the base first."""
        return ((self.base,) if self.base is not None else ()) + self.siblings

    @property
    def draws(self) -> int:
        """How many of the siblings' deltas DARE thins out at random."""
        return (
            sum(density < 1 for density in self.densities) if self.method.startswith("dare") else 0
        )


class Layout:
    """A recipe laid over models of `n_layers` layers."""

    def __init__(
        self, recipe: Recipe, n_layers: int, architecture: str = "LlamaForCausalLM"
    ) -> None:
        """`architecture` is the donor's class. Raises RecipeError when a slice passes the models'
        end.
        """
        self.recipe, self.known = recipe, architecture in KNOWN
        self._layers: list[Place] = []
        for i, piece in enumerate(recipe.slices):
            for source in piece.sources:
                if source.layers is not None and source.layers[1] > n_layers:
                    raise RecipeError(
                        f"`layer_range` passes the model's {n_layers} layers",
                        where=f"slices[{i}]",
                        found=list(source.layers),
                        remedy="Lower its end.",
                    )
            start, end = piece.sources[0].layers or (0, n_layers)
            count = end - start
            self._layers += [
                Place(piece, layer, layer / (count - 1) if count > 1 else 1.0)
                for layer in range(count)
            ]
        at_home = all(
            self._input_layer(s, p) == i
            for i, p in enumerate(self._layers)
            for s in p.piece.sources
        )
        self.restacked = not at_home or len(self._layers) != n_layers  # some layer leaves its place

    @property
    def n_layers(self) -> int:
        """Layers of the merged model."""
        return len(self._layers)

    @property
    def lenders(self) -> list[int]:
        """For each merged layer, the donor's layer whose names and settings it has."""
        sources = [
            next((s for s in p.piece.sources if s.model == self.recipe.donor), p.piece.sources[0])
            for p in self._layers
        ]
        return [
            self._input_layer(source, place)
            for source, place in zip(sources, self._layers, strict=True)
        ]

    def names(self, folders: Sequence[ModelFolder]) -> list[str]:
        """The merged model's tensors, sorted: the order in which mergekit merges. The first folder
        lends its names.

        A head is merged when any model stores one. Raises ModelError when tensors are missing,
        UnsupportedRecipe for an architecture that is merged otherwise.
        """
        donor = folders[0]
        plain = {name for name in donor.keys if not LAYER.match(name)} | {
            HEAD for folder in folders if HEAD in folder.keys
        }
        by_layer: dict[int, set[tuple[str, str]]] = {}
        for name in donor.keys:
            if ".experts." in name:
                raise UnsupportedRecipe(
                    "mixtures of experts are not supported", where=donor.path, remedy=MERGEKIT
                )
            if match := LAYER.match(name):
                by_layer.setdefault(int(match[2]), set()).add((match[1], match[3]))
        check_layers(donor, by_layer)
        for i, layer in enumerate(self.lenders):
            plain |= {f"{before}{i}{after}" for before, after in by_layer[layer]}
        return sorted(plain)

    def place(self, name: str) -> Place:
        """Layers by their slice; final norm and head by the last slice, embeddings by the first; t
        is 0 outside layers.

        Raises ModelError for a tensor of another kind: mergekit's rules say nothing of it.
        """
        match = LAYER.match(name)
        if match:
            if int(match[2]) >= self.n_layers:
                raise ModelError(
                    f"tensor {name} passes the configuration's {self.n_layers} layers",
                    remedy="Mend config.json.",
                )
            return self._layers[int(match[2])]
        if not name.startswith(FIRST + LAST):
            raise UnsupportedRecipe(
                f"tensor {name} is of an architecture that is not supported",
                remedy=f"Llama and its like are. {MERGEKIT}",
            )
        return Place(
            self.recipe.slices[-1 if name.startswith(LAST) and self.known else 0], None, 0.0
        )

    def how(self, name: str) -> How:
        """Raises RecipeError when a parameter that the method needs is missing."""
        method, place = self.recipe.merge_method, self.place(name)
        piece = place.piece
        base = next(
            (self._input(name, s, place) for s in piece.sources if s.model == piece.base_model),
            None,
        )
        normalize = bool(self.parameter("normalize", name, default=method in ("ties", "linear")))
        if method == "slerp":
            t = self.parameter("t", name)
            if t is None:
                raise RecipeError(
                    f"no `t` for {name}", remedy="Give the slice or the recipe parameters: {t: …}."
                )
            return How(
                method, base, tuple(self._input(name, s, place) for s in piece.siblings), t=float(t)
            )
        if method == "linear":
            return How(
                method,
                None,
                tuple(self._input(name, s, place) for s in piece.sources),
                self._each("weight", name, piece.sources),
                normalize=normalize,
            )
        return How(
            method,
            base,
            tuple(self._input(name, s, place) for s in piece.siblings),
            self._each("weight", name, piece.siblings),
            () if method == "task_arithmetic" else self._each("density", name, piece.siblings, 1.0),
            normalize=normalize,
            scale=float(self.parameter("lambda", name, default=1.0)),
            rescale=bool(self.parameter("rescale", name, default=method.startswith("dare"))),
        )

    def parameter(
        self, key: str, name: str, source: Source | None = None, default: Any = None
    ) -> Any:
        """A parameter's value for a tensor: the source's before the slice's before the recipe's."""
        place = self.place(name)
        levels = [] if source is None else [source.parameters]
        for level in [*levels, place.piece.parameters, self.recipe.parameters]:
            if key in level:
                at = name if source is None else self._input(name, source, place)[1]
                value = _evaluate(key, level[key], at, place.t)
                if value is not None:
                    return value
        return default

    def _each(
        self, key: str, name: str, sources: tuple[Source, ...], default: float | None = None
    ) -> tuple[float, ...]:
        values = [self.parameter(key, name, source, default) for source in sources]
        for source, value in zip(sources, values, strict=True):
            if value is None:
                raise RecipeError(
                    f"no `{key}` for {name}",
                    where=source.model,
                    remedy=f"Give the source parameters: {{{key}: …}}.",
                )
        return tuple(float(value) for value in values)

    def _input(self, name: str, source: Source, place: Place) -> tuple[str, str]:
        """(model, name) of the tensor that a source gives to an output tensor."""
        match = LAYER.match(name)
        return (
            source.model,
            f"{match[1]}{self._input_layer(source, place)}{match[3]}" if match else name,
        )

    def _input_layer(self, source: Source, place: Place) -> int:
        start = source.layers[0] if source.layers else 0
        return start + (place.layer or 0)


def check_layers(folder: ModelFolder, by_layer: Mapping[int, set[tuple[str, str]]]) -> None:
    """Raise ModelError unless the file has every layer of the configuration, and layers of one type
    the same tensors.
    """
    count = num_layers(folder.config)
    if set(by_layer) != set(range(count)):
        odd = sorted(set(by_layer) ^ set(range(count)))[0]
        raise ModelError(
            f"config.json has {count} layers, the file {len(by_layer)}: layer {odd} is in one of them only",
            where=folder.path,
            remedy="Mend config.json, or copy the model again.",
        )
    types = folder.config.get("layer_types") or [""] * count
    for layer, tensors in by_layer.items():
        same = [other for other in by_layer if types[other] == types[layer]]
        for _, after in set().union(*(by_layer[other] for other in same)) - tensors:
            raise ModelError(
                f"the file lacks layer {layer}'s {after[1:]}",
                where=folder.path,
                remedy="Copy or download the model again.",
            )


def _evaluate(key: str, setting: Any, name: str, t: float) -> float | bool | None:
    """A number, a gradient over t (booleans take the step before t), or the first filter that
    matches the tensor's name.
    """
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
    return (1 - (scaled - low)) * values[low] + (scaled - low) * values[
        min(len(values) - 1, low + 1)
    ]
