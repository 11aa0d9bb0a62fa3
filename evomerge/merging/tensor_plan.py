"""Everything that decides one merged tensor's bits, except for the models' contents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

COPY = "copy"  # instead of a method: the tensor is one model's own
WIDE = 1 << 28  # from here on torch.randint takes two 32-bit numbers for one of its own


@dataclass(frozen=True)
class TensorPlan:
    """One merged tensor: its method, its inputs as (model, tensor name), and their parameters.

    A method without a base takes the base as one more sibling, and `base` is None.
    """

    method: str
    base: tuple[str, str] | None
    siblings: tuple[tuple[str, str], ...]
    weights: tuple[float, ...] = ()  # one for each sibling, as `densities`
    densities: tuple[float, ...] = ()
    normalize: bool = False
    scale: float = 1.0  # mergekit's `lambda`
    rescale: bool = False
    draws: int = 0  # deltas that are thinned out at random
    # further parameters of the method, such as slerp's `t`
    parameters: Mapping[str, float] = field(default_factory=dict)
    # those that each sibling has for itself, such as della's `epsilon`
    by_sibling: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    samples: int = 0  # of a tensor with more elements so many are drawn

    def random_numbers(self, elements: int) -> int:
        """How many 32-bit numbers are drawn for a tensor of so many elements."""
        drawn = self.draws * elements
        if 0 < self.samples < elements:
            drawn += self.samples * (2 if elements >= WIDE else 1)
        return drawn

    @property
    def without_names(self) -> TensorPlan:
        """The plan with models only: equal ones merge alike."""
        base = None if self.base is None else (self.base[0], "")
        return replace(self, base=base, siblings=tuple((ref, "") for ref, _ in self.siblings))

    @property
    def is_copy(self) -> bool:
        """Whether the merged tensor is one model's own."""
        return self.method == COPY

    @property
    def inputs(self) -> tuple[tuple[str, str], ...]:
        """(model, tensor name) of everything that is read, the base first."""
        if self.base is None:
            return self.siblings
        return (self.base, *self.siblings)

    @property
    def is_single_delta(self) -> bool:
        """Whether it is base + weight * delta, nothing normalised or scaled.

        Every candidate of a plain search with one sibling is.
        """
        plain = not self.normalize and self.scale == 1
        return self.method == "task_arithmetic" and len(self.siblings) == 1 and plain


def kept(model: str, name: str) -> TensorPlan:
    """The plan of a tensor that stays a model's own."""
    return TensorPlan(COPY, None, ((model, name),))


class PlannedTensors(Mapping[str, TensorPlan]):
    """The plans of the merged tensors, each made when it is first asked for."""

    def __init__(self, names: Sequence[str], make: Callable[[str], TensorPlan]) -> None:
        self._names, self._make = dict.fromkeys(names), make
        self._made: dict[str, TensorPlan] = {}

    def __getitem__(self, name: str) -> TensorPlan:
        if name not in self._made:
            if name not in self._names:
                raise KeyError(name)
            self._made[name] = self._make(name)
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
