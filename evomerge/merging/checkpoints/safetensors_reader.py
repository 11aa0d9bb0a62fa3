"""The one reader of safetensors files, which maps them and names what is damaged."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open

from evomerge.errors import ModelError

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# of counters, masks and indices, which are copied as they are
WHOLE = {
    "BOOL": torch.bool,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
}
COPY_AGAIN = "Copy or download it again."


class SafetensorsReader:
    """One open file. Its header is read immediately, its tensors when they are needed."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError when the file cannot be opened or its header is damaged."""
        self.path = path
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            self._fail(f"the file is damaged: {error}", error)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The tensors' names, in the library's order."""
        return tuple(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape. Raises ModelError when the file lacks it."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype. Raises ModelError when it is lacking or not supported."""
        found = self.dtype_or_none(name)
        if found is None:
            raise ModelError(
                f"tensor {name} has a dtype that is not supported",
                where=self.path,
                found=self.stored_dtype(name),
                remedy="Convert it to bfloat16, float16 or float32.",
            )
        return found

    def dtype_or_none(self, name: str) -> torch.dtype | None:
        """The dtype, None where it can be neither merged nor copied."""
        stored = self.stored_dtype(name)
        return DTYPES.get(stored) or WHOLE.get(stored)

    def stored_dtype(self, name: str) -> str:
        """The dtype by safetensors' name. Raises ModelError when the file lacks the tensor."""
        return str(self._slice(name).get_dtype())

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as it is on disk, mapped. Raises ModelError when the file is damaged."""
        try:
            tensor: torch.Tensor = self._file.get_tensor(name)
        except SafetensorError as error:
            self._fail(f"tensor {name} cannot be read: {error}", error)
        return tensor

    def _slice(self, name: str) -> Any:
        try:
            return self._file.get_slice(name)
        except SafetensorError as error:
            self._fail(f"the file lacks tensor {name}", error)

    def _fail(self, what: str, error: Exception) -> NoReturn:
        raise ModelError(what, where=self.path, remedy=COPY_AGAIN) from error
