"""Keys of a configuration that mergekit ignores: they change nothing, and a note names them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from evomerge.errors import RecipeError

# Names that the format has in other places: where they decide nothing, they are no slip.
ELSEWHERE = (
    "model",
    "models",
    "slice",
    "slices",
    "source",
    "sources",
    "module",
    "modules",
    "token",
)


@dataclass(frozen=True)
class UnreadKeys:
    """Collects the unknown keys of the file `root`, each with its place in it."""

    root: str
    found: list[str] = field(default_factory=list)

    def check(self, keys: Iterable[object], known: Iterable[str], where: str) -> None:
        """Note every key that is not `known`.

        Raises RecipeError for one that is misspelled; where the right key stands beside it, it has
        another meaning, such as that of an anchor.
        """
        given, known = list(keys), tuple(known)
        absent = [key for key in known if key not in given]
        for key in given:
            if key in known:
                continue
            meant = misspelled(str(key), absent)
            if meant is not None and key not in ELSEWHERE:
                raise RecipeError(
                    f"unknown key `{key}`",
                    where=where,
                    remedy=f"Did you mean `{meant}`? If not, remove it: nothing reads it.",
                )
            self.add(str(key), where)

    def add(self, key: str, where: str) -> None:
        """Note one key; `where` is its place, which begins with the file."""
        place = where.removeprefix(self.root).removeprefix(", ")
        self.found.append(f"{place}, `{key}`" if place else f"`{key}`")


def misspelled(key: str, known: Iterable[str]) -> str | None:
    """The known key that a slip of the pen turns into `key`; a key as short as `t` has none."""
    for name in known:
        if len(name) > 3 and _one_slip_apart(key, name):
            return name
    return None


def _one_slip_apart(key: str, name: str) -> bool:
    """Whether one letter is missing, added or wrong, or two neighbours are swapped."""
    while key and name and key[0] == name[0]:
        key, name = key[1:], name[1:]
    while key and name and key[-1] == name[-1]:
        key, name = key[:-1], name[:-1]
    return max(len(key), len(name)) <= 1 or (len(key) == 2 and key == name[::-1])
