"""A model's weights in memory that other processes can read as a safetensors file.

For engines that keep weights in a layout of their own: the live model is merged here, in place, and
the engine loads it from here.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch

from evomerge.errors import EngineError
from evomerge.merging.adapters.lora import AdaptedModel
from evomerge.merging.checkpoints.config_defaults import config_value
from evomerge.merging.checkpoints.model_folder import ModelFolder
from evomerge.merging.device_memory import free_bytes

# as safetensors writes them
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


class HostWeights:
    """Tensors of `shapes` in one dtype: parameters of `module`, and model.safetensors in `folder`.

    Both are the same memory. It belongs to no file system, so it has no size limit and
    is freed with the process however that ends; the folder holds only a link, through which
    processes of the same user can map it.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        """Raises EngineError when there is not enough memory."""
        header, starts, size = _layout(shapes, dtype)
        free = free_bytes(torch.device("cpu"))
        if size > free:
            raise EngineError(
                f"the merged weights need {size / 1e9:.1f} GB of host memory, but only "
                f"{free / 1e9:.1f} GB are free",
                remedy="Free some memory, or use engine.kind: transformers.",
            )
        self._file = os.memfd_create("evomerge-weights", os.MFD_CLOEXEC)
        # allocated now: base and siblings are placed by what is left
        os.posix_fallocate(self._file, 0, len(header) + size)
        os.pwrite(self._file, header, 0)
        self.folder = Path(tempfile.mkdtemp(prefix="evomerge-weights-"))
        self.close = weakref.finalize(self, _release, self._file, self.folder)
        (self.folder / "model.safetensors").symlink_to(f"/proc/{os.getpid()}/fd/{self._file}")
        numbers = (len(header) + size) // dtype.itemsize
        whole = torch.from_file(
            f"/proc/self/fd/{self._file}", shared=True, size=numbers, dtype=dtype
        )
        at = len(header) // dtype.itemsize
        self.module = torch.nn.Module()
        for name, shape in shapes.items():
            start = at + starts[name]
            _register(self.module, name, whole[start : start + math.prod(shape)].view(shape))


def host_weights_of(model: ModelFolder, dtype: torch.dtype) -> HostWeights:
    """Room for the model's tensors, without a tied head; it is empty until it is merged into.

    Raises EngineError for a head that an adapter unties: vLLM loads the model that it was made for.
    """
    original = model.base if isinstance(model, AdaptedModel) else model
    head = model.head
    if head in model.keys and head not in original.keys:
        raise EngineError(
            "the adapter gives the head weights of its own, and vLLM keeps the base's tied one",
            where=model.ref,
            remedy="Use engine.kind: transformers.",
        )
    tied: set[str] = set()
    if config_value(model.config, "tie_word_embeddings"):
        tied.add(head)
    shapes = {}
    for name in sorted(model.keys - tied):
        if model.dtype(name).is_floating_point:
            shapes[name] = model.shape(name)
    return HostWeights(shapes, dtype)


def _layout(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> tuple[bytes, dict[str, int], int]:
    """The file's header, each tensor's first number, and the bytes of all numbers.

    The format: 8 bytes with the header's length, the header as JSON, the numbers without gaps
    (https://huggingface.co/docs/safetensors). Padded with spaces to 64 bytes, so that every tensor
    is aligned.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, at = {}, 0
    for name, shape in shapes.items():
        starts[name] = at
        end = at + math.prod(shape)
        entries[name] = {
            "dtype": NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [at * dtype.itemsize, end * dtype.itemsize],
        }
        at = end
    text = json.dumps(entries).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text, starts, at * dtype.itemsize


def _register(root: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Make the tensor the parameter called `name` in `root.named_parameters()`."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, torch.nn.Module())
        root = root.get_submodule(part)
    root.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))


def _release(file: int, folder: Path) -> None:
    os.close(file)
    shutil.rmtree(folder, ignore_errors=True)
