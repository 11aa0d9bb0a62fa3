"""DARE's random numbers: one stream over the whole model, in mergekit's order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping

import torch

BURN = 1 << 20  # numbers drawn and discarded per call


class Draws:
    """The stream, which can be read from where any tensor's numbers begin.

    mergekit seeds one global generator and draws tensor by tensor, one number for each element, in
    the order of names; of the tensors that go into a merged one, the last in that order counts. So
    a tensor's numbers depend on how many the tensors before it took. A live model that merges only
    some tensors jumps over the others': the generator's states are kept where tensors began, so
    that a jump is mostly free.
    """

    def __init__(
        self, seed: int, counts: Mapping[str, int], states: dict[int, torch.Tensor] | None = None
    ) -> None:
        """`counts`: how many numbers each tensor takes, in the order of the draws.

        `states`: what another recipe's stream of this seed has kept; it is added to.
        """
        self.starts: dict[str, int] = {}
        at = 0
        for name in counts:
            self.starts[name] = at
            at += counts[name]
        self._generator = torch.Generator().manual_seed(seed)
        self.states: dict[int, torch.Tensor] = {} if states is None else states
        self.states.setdefault(0, self._generator.get_state())

    def generator(self, name: str) -> torch.Generator:
        """The stream where the tensor's numbers begin."""
        start = self.starts[name]
        known = sorted(self.states)
        before = known[bisect_right(known, start) - 1]
        self._generator.set_state(self.states[before])
        for at in range(before, start, BURN):
            numbers = min(BURN, start - at)
            half = torch.tensor(0.5).expand(numbers)
            torch.empty(numbers).bernoulli_(half, generator=self._generator)
        self.states.setdefault(start, self._generator.get_state())
        return self._generator
