"""A model folder: its configuration and weights, mapped and read tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from evomerge.errors import UnsupportedRecipe
from evomerge.merging.checkpoints.safetensors_reader import SafetensorsReader
from evomerge.recipe import MERGEKIT

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
VOCABULARY = (EMBED, HEAD)  # tensors with a row for each token


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
    def keys(self) -> frozenset[str]:
        """The tensors' names."""
        return frozenset(self.files)

    @cached_property
    def _headers(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor."""
        headers = {}
        for name in self.files:
            reader = self._reader(name)
            headers[name] = (reader.shape(name), reader.dtype(name))
        return headers

    def stored(self, name: str) -> str:
        """The name of a tensor on disk: a tied head is stored as the embeddings."""
        return EMBED if name == HEAD and HEAD not in self.files else name

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises ModelError when a file lacks one of its tensors."""
        return self._headers[self.stored(name)][0]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype on disk. Raises ModelError when it is not supported."""
        return self._headers[self.stored(name)][1]

    def stored_dtype(self, name: str) -> str:
        """The dtype on disk by safetensors' name, also one that cannot be merged."""
        return self._reader(name).stored_dtype(name)

    def get_tensor(self, name: str) -> torch.Tensor:
        """The tensor as it is on disk. Raises ModelError when the file is damaged."""
        name = self.stored(name)
        return self._reader(name).tensor(name)

    def is_untied(self) -> bool:
        """Whether the head has weights of its own: one that equals the embeddings may be tied."""
        if HEAD not in self.files or EMBED not in self.files:
            return HEAD in self.files
        if self.config.get("tie_word_embeddings") is False:
            return True
        return not torch.equal(self.get_tensor(HEAD), self.get_tensor(EMBED))

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


def num_layers(config: Mapping[str, Any]) -> int:
    """Layers of the model that a config.json describes. Raises UnsupportedRecipe."""
    if not isinstance(config.get("num_hidden_layers"), int):
        raise UnsupportedRecipe(
            "the configuration has no `num_hidden_layers`",
            where=config.get("model_type"),
            remedy=f"Llama and similar models are supported. {MERGEKIT}",
        )
    return int(config["num_hidden_layers"])
