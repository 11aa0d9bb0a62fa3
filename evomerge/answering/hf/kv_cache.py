"""Keys and values of a batch in memory that rows leave, and the prompts that are read together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

PASS = 256  # tokens of padding that cost as much as one more forward pass


def filled(keep: Sequence[int]) -> list[int]:
    """The rows to keep, reordered so that few move: those at the end take the places of others."""
    n = len(keep)
    tail = iter([row for row in keep if row >= n])
    kept = set(keep)
    return [row if row in kept else next(tail) for row in range(n)]


def group_by_padding(gaps: Sequence[int]) -> list[slice]:
    """Neighbouring rows whose prompts are read together.

    The padding of a group, in tokens, costs less than one more pass.
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


class SlotKVCache(DynamicLayer):
    """Keys and values (rows, heads, columns, dim) of one layer, with room for the longest answer.

    Nothing is copied when a column is added; when rows leave, only those that take their slots are.
    """

    def __init__(self, rows: int, columns: int) -> None:
        DynamicLayer.__init__(self)
        self.rows, self.columns = rows, columns
        # the first row and the columns that count; see `window`
        self.first, self.at, self.end = 0, 0, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append columns; returns views of all that count."""
        rows, _, more, _ = key_states.shape
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.all_keys = self._room_for(key_states)
            self.all_values = self._room_for(value_states)
            self.is_initialized = True
        some = slice(self.first, self.first + rows)
        span = slice(self.end, self.end + more)
        self.all_keys[some, :, span] = key_states
        self.all_values[some, :, span] = value_states
        self.end += more
        return self._view(rows)

    def window(self, first: int, at: int, end: int) -> None:
        """What is appended belongs to the rows from `first` on; columns `at` to `end` count.

        Columns that were never written are 0.
        """
        self.first, self.at, self.end = first, at, end

    def spread(self, rows: int) -> None:
        """Copy the first row to all."""
        for tensor in (self.all_keys, self.all_values):
            tensor[1:rows, :, : self.end] = tensor[:1, :, : self.end]
        self._view(rows)

    def keep(self, order: Sequence[int], at: int) -> None:
        """See `Forward.keep`; columns before `at` no longer count."""
        moved = [(to, row) for to, row in enumerate(order) if to != row]
        if moved:
            to, row = torch.tensor(moved, device=self.device).unbind(1)
            for tensor in (self.all_keys, self.all_values):
                tensor[to, :, at : self.end] = tensor[row, :, at : self.end]
        self.at = at
        self._view(len(order))

    def get_seq_length(self) -> int:
        """The number of columns that count."""
        return self.end - self.at

    def _room_for(self, states: Tensor) -> Tensor:
        _, heads, _, dim = states.shape
        return states.new_zeros(self.rows, heads, self.columns, dim)

    def _view(self, rows: int) -> tuple[Tensor, Tensor]:
        some, span = slice(self.first, self.first + rows), slice(self.at, self.end)
        self.keys, self.values = self.all_keys[some, :, span], self.all_values[some, :, span]
        return self.keys, self.values
