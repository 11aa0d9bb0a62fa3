"""The rows of a batch: keys and values in memory that rows leave, and which prompts are read
together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

PASS = 256  # tokens of padding that cost as much as one more forward pass


def filled(keep: Sequence[int]) -> list[int]:
    """The rows to keep, in an order that moves few: rows from the end stand where others have left."""
    n = len(keep)
    tail = iter([row for row in keep if row >= n])
    kept = set(keep)
    return [row if row in kept else next(tail) for row in range(n)]


def alike(gaps: Sequence[int]) -> list[slice]:
    """Rows next to each other whose prompts are read together: a group's padding, in tokens, costs
    less than one more pass.
    """
    groups: list[slice] = []
    padding = 0
    for row, gap in enumerate(gaps):
        group = groups[-1] if groups else None
        if group is not None:
            least = min(gaps[group])
            padding = sum(gaps[group]) + gap - min(least, gap) * (row + 1 - group.start)
        if group is None or padding > PASS:
            groups.append(slice(row, row + 1))
        else:
            groups[-1] = slice(group.start, row + 1)
    return groups


class Rows(DynamicLayer):
    """Keys and values (rows, heads, columns, dim) of one layer in memory for the longest answer.

    Nothing is copied when a column comes; when rows leave, only those that take their places are.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.first, self.at, self.end = 0, 0, 0  # the row and the columns that count; see `window`

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append columns; returns views of all that count."""
        rows, _, more, _ = key_states.shape
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.all_keys, self.all_values = (
                x.new_zeros(self.rows, x.shape[1], self.columns, x.shape[3])
                for x in (key_states, value_states)
            )
        some, span = slice(self.first, self.first + rows), slice(self.end, self.end + more)
        self.all_keys[some, :, span], self.all_values[some, :, span] = key_states, value_states
        self.end += more
        return self._view(rows)

    def window(self, first: int, at: int, end: int) -> None:
        """What comes belongs to the rows from `first` on; columns from `at` to `end` are there.
        Columns never written are 0.
        """
        self.first, self.at, self.end = first, at, end

    def spread(self, rows: int) -> None:
        """Copy the first row to all."""
        for all_ in (self.all_keys, self.all_values):
            all_[1:rows, :, : self.end] = all_[:1, :, : self.end]
        self._view(rows)

    def keep(self, order: Sequence[int], at: int) -> None:
        """See `Forward.keep`; columns before `at` do not count any more."""
        moved = [(to, row) for to, row in enumerate(order) if to != row]
        if moved:
            to, row = (torch.tensor(x, device=self.device) for x in zip(*moved, strict=True))
            for all_ in (self.all_keys, self.all_values):
                all_[to, :, at : self.end] = all_[row, :, at : self.end]
        self.at = at
        self._view(len(order))

    def get_seq_length(self) -> int:
        return self.end - self.at

    def _view(self, rows: int) -> tuple[Tensor, Tensor]:
        some, span = slice(self.first, self.first + rows), slice(self.at, self.end)
        self.keys, self.values = self.all_keys[some, :, span], self.all_values[some, :, span]
        return self.keys, self.values
