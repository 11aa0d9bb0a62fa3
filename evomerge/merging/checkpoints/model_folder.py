"""A model folder: its configuration and weights, mapped and read tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from evomerge.errors import ModelError, UnsupportedRecipe
from evomerge.merging.architecture.architecture import Architecture, architecture_of
from evomerge.merging.architecture.empty_model import empty_model
from evomerge.merging.architecture.roles import count_layers
from evomerge.merging.architecture.spare import spare_tensors
from evomerge.merging.architecture.text_config import layers_key, text_config
from evomerge.merging.checkpoints.model_kind import check_usable
from evomerge.merging.checkpoints.safetensors_reader import SafetensorsReader


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk; its weights are mapped, and read only when a tensor is requested."""

    path: Path
    config: dict[str, Any]
    files: Mapping[str, Path] = field(repr=False)  # tensor name -> safetensors file
    ref: str = ""  # the reference it was opened by: a folder or a hub name
    _readers: dict[Path, SafetensorsReader] = field(default_factory=dict, repr=False, compare=False)

    @property
    def places(self) -> tuple[Path, ...]:
        """The folders that its files lie in: two models with the same ones are the same model."""
        return (self.path,)

    @property
    def is_dequantized(self) -> bool:
        """Whether its tensors are other numbers than those in the files."""
        return False

    @property
    def keys(self) -> frozenset[str]:
        """The tensors' names."""
        return frozenset(self.files)

    @cached_property
    def architecture(self) -> Architecture:
        """Its layers, and the roles of its other tensors.

        Raises ModelError where transformers knows the type and cannot use the configuration.
        """
        found = architecture_of(self.config, self.keys)
        check_usable(self.config, self.path, has_model=not found.rule)
        return found

    @cached_property
    def spare(self) -> frozenset[str]:
        """The tensors that transformers does not load, of kinds that a merge may do without."""
        found = self.architecture.spare
        return spare_tensors(self.config, self.keys) if found is None else found

    @property
    def head(self) -> str:
        """The name of the output embeddings, also where the files do not store them."""
        return self.architecture.head

    @property
    def embeddings(self) -> str:
        """The name of the input embeddings."""
        return self.architecture.embeddings

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The tensors with a row for each token.

        They are the embeddings, the head, and where there are such the head's bias and the
        embeddings that go to every layer, as Gemma 3n's and 4's.
        """
        layer = self.head.removesuffix(".weight")
        # BERT's kin keep the bias above the head
        others = {f"{layer}.bias", f"{layer.removesuffix('.decoder')}.bias"}
        if not self.has_short_table:
            others.add(self.layers_embeddings)
        return self.embeddings, self.head, *sorted(others & self.keys)

    @property
    def layers_embeddings(self) -> str:
        """The name of the embeddings that go to every layer, of models that have such."""
        return self.embeddings.removesuffix(".weight") + "_per_layer.weight"

    @property
    def has_short_table(self) -> bool:
        """Whether the last tokens have no row in the embeddings that go to every layer."""
        table = self.layers_embeddings
        return table in self.keys and self.shape(table)[0] != self.shape(self.embeddings)[0]

    @cached_property
    def _headers(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor."""
        return {name: self._header(name) for name in self.files}

    def _header(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        reader = self._reader(name)
        return reader.shape(name), reader.dtype(name)

    def stored(self, name: str) -> str:
        """The name of a tensor on disk: a tied head is stored as the embeddings.

        A head may have another name here than in other models of the type.
        """
        if name in self.files:
            return name
        if name in self.architecture.heads:
            return self.head if self.head in self.files else self.embeddings
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises ModelError when a file lacks one of its tensors."""
        return self._headers[self.stored(name)][0]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype on disk. Raises ModelError when it is not supported."""
        return self._headers[self.stored(name)][1]

    def stored_dtype(self, name: str) -> str:
        """The dtype on disk by safetensors' name, also one that cannot be merged."""
        return self._reader(name).stored_dtype(name)

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """The shape on disk, also of a tensor whose dtype cannot be merged."""
        return self._reader(name).shape(name)

    def get_tensor(self, name: str) -> torch.Tensor:
        """The tensor as it is on disk. Raises ModelError when the file is damaged."""
        name = self.stored(name)
        return self._reader(name).tensor(name)

    def is_untied(self) -> bool:
        """Whether the head has weights of its own: one that equals the embeddings may be tied."""
        embeddings, head = self.embeddings, self.head
        if head not in self.files or embeddings not in self.files:
            return head in self.files
        if tied_by_config(self.config) is False:
            return True
        return not torch.equal(self.get_tensor(head), self.get_tensor(embeddings))

    def _reader(self, name: str) -> SafetensorsReader:
        path = self.files[name]
        if path not in self._readers:
            self._readers[path] = SafetensorsReader(path)
        return self._readers[path]


def same_model(folder: ModelFolder, ref: str) -> bool:
    """Whether a reference names this folder, however its path is written."""
    if folder.ref == ref:
        return True
    named = [os.path.realpath(part) for part in ref.split("+")]
    return named == [os.path.realpath(place) for place in folder.places]


def tied_by_config(config: Mapping[str, Any]) -> bool | None:
    """What config.json says of a head that is the embeddings; None where it says nothing."""
    for part in (config, text_config(config)):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


def num_layers(config: Mapping[str, Any], where: object = None) -> int:
    """Layers of the text decoder that a config.json describes.

    Raises UnsupportedRecipe where it names none, ModelError where it cannot be their number.
    """
    text = text_config(config)
    key = layers_key(text)
    found = text[key] if key is not None else None
    stated = text.get("num_hidden_layers")
    if found is None and stated is not None:
        raise ModelError(
            "`num_hidden_layers` in config.json is not a whole number",
            where=where,
            found=stated,
            remedy="Correct it.",
        )
    if found is not None and found < 1:
        raise ModelError(
            f"`{key}` in config.json is below 1", where=where, found=found, remedy="Correct it."
        )
    if found is None:
        model = empty_model(config)
        found = None if model is None else count_layers(model)
    if not isinstance(found, int):
        raise UnsupportedRecipe(
            "the configuration has no `num_hidden_layers`",
            where=config.get("model_type"),
            remedy="Models that write text, of a type that transformers knows, are supported.",
        )
    return found
