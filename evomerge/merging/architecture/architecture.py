"""The layers of a checkpoint, and the slice that decides each of its other tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evomerge.errors import UnsupportedRecipe
from evomerge.merging.architecture.conversion import Group, groups_of, saved_name
from evomerge.merging.architecture.described import LAST_SLICE, MODULES, modules_of
from evomerge.merging.architecture.empty_model import empty_model, knows_type, text_classes
from evomerge.merging.architecture.roles import Role, TextPath, is_one_module, text_path
from evomerge.merging.architecture.spare import spare_of

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PLAIN_LAYERS = "model.layers."
# what models like Llama have, whose names say what they are
_PLAIN = re.compile(
    r"(model\.layers\.\d+\..*|model\.embed_tokens\.\w+|model\.norm\.\w+|lm_head\.\w+)\Z"
)
_NOT_PLAIN = (".experts.", "block_sparse_moe")
_NUMBERED = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class Architecture:
    """A checkpoint's names: `before` + a layer's number + `after`, or a name with a role."""

    prefixes: tuple[str, ...]  # what stands before a layer's number, longest first
    roles: Mapping[str, Role] = field(repr=False)  # of everything outside the layers
    embeddings: str = EMBED
    head: str = HEAD
    other_heads: frozenset[str] = frozenset()  # what it is named in other files of the type
    text: frozenset[str] = field(default=frozenset(), repr=False)  # tensors of the text path
    # what transformers' model has and the files lack; None where only the names speak
    lacking: tuple[str, ...] | None = None
    # what becomes tensors of transformers' model together, such as a layer's experts
    converted: tuple[Group, ...] = field(default=(), repr=False)
    unplaced: tuple[str, ...] = field(default=(), repr=False)  # tensors that nothing says a role of
    spare: frozenset[str] | None = field(default=None, repr=False)  # None: see `spare_tensors`
    # as mergekit names them, none where it cannot merge them; None for a model of one module
    modules: tuple[str, ...] | None = None
    rule: str = ""  # a sentence: which one decides, where transformers has no such model

    @property
    def heads(self) -> frozenset[str]:
        """The names that files may give the head."""
        return self.other_heads | {self.head}

    def split(self, name: str) -> tuple[str, int, str] | None:
        """A layer's tensor as (before, number, after); None for one outside the layers."""
        if name in self.roles:
            return None
        for before in self.prefixes:
            if name.startswith(before):
                number, dot, after = name[len(before) :].partition(".")
                if number.isdigit():
                    return before, int(number), dot + after
        return None

    def names_outside(self, text: str, name: str) -> bool:
        """Whether a recipe's filter names a tensor outside the text path.

        One that also matches tensors of the text path, such as "mlp", means those. The empty filter
        means everything.
        """
        return text in name and (not text or all(text not in inside for inside in self.text))

    def role(self, name: str) -> Role:
        """The role of a tensor outside the layers; an unknown one follows the first slice."""
        return self.roles.get(name, Role.FIRST)


LIKE_LLAMA = Architecture(
    (PLAIN_LAYERS,), {EMBED: Role.FIRST, "model.norm.weight": Role.LAST, HEAD: Role.LAST}
)


def architecture_of(config: Mapping[str, Any], names: Collection[str]) -> Architecture:
    """The architecture of a checkpoint, from its config.json and its tensors' names.

    Names like Llama's speak for themselves. For all others, transformers' own model of the
    configuration says where each tensor goes; where it has none, the names have to do.
    """
    if all(map(_is_plain, names)):
        return _plain(config, names)
    model = empty_model(config)
    if model is not None:
        found = _by_modules(model, config, names)
        if found is not None:
            return found
    return _by_names(config, names)


def _is_plain(name: str) -> bool:
    if not _PLAIN.match(name):
        return False
    return not any(part in name for part in _NOT_PLAIN)


@dataclass(frozen=True)
class Misfits:
    """In what a checkpoint and transformers' model of a configuration differ."""

    lacking: tuple[str, ...]  # what the model has and the checkpoint lacks
    left_out: tuple[str, ...]  # what the model has no place for


def misfits_of(config: Mapping[str, Any], names: Collection[str]) -> Misfits | None:
    """The differences; None where transformers has no model of the configuration."""
    model = empty_model(config)
    if model is None:
        return None
    groups, left_out = groups_of(model, names)
    return Misfits(_lacking(model, groups), tuple(left_out))


def class_name(config: Mapping[str, Any]) -> str:
    """The class that config.json names first; "" where it names none."""
    named = config.get("architectures") or [""]
    return str(named[0])


def highest_number(names: Collection[str]) -> int:
    """The highest number of a layer, or of anything else, in names of tensors; -1 where none is."""
    numbers = [int(match[1]) for name in names for match in _NUMBERED.finditer(name)]
    return max(numbers, default=-1)


def check_modules(named: tuple[str, ...], config: Mapping[str, Any]) -> None:
    """Raise UnsupportedRecipe where a recipe names modules that are not those of the model."""
    known, _ = MODULES.get(class_name(config), ((), ()))
    if named and set(named) != set(known):
        raise UnsupportedRecipe(
            f"`modules` are not those of {class_name(config) or 'the model'}",
            found=list(named),
            remedy=f"Name {', '.join(known)}." if known else "Write `slices` without `modules`.",
        )


def _plain(config: Mapping[str, Any], names: Collection[str]) -> Architecture:
    described = LAST_SLICE.get(class_name(config))
    outside = [name for name in (*names, HEAD) if not name.startswith(PLAIN_LAYERS)]
    rule = ""
    if not knows_type(config):
        end = "first" if described is None else "last"
        rule = (
            f"{_no_model(config)}, so it is merged by its tensors' names, which are like Llama's: "
            f"norm and head take the {end} slice's weight"
        )
    return Architecture((PLAIN_LAYERS,), _first_or_last(outside, described), rule=rule)


def _first_or_last(names: Collection[str], described: tuple[str, ...] | None) -> dict[str, Role]:
    """mergekit's rule for a model of one module."""
    roles = {}
    for name in names:
        last = described is not None and name.startswith(described)
        roles[name] = Role.LAST if last else Role.FIRST
    return roles


def _by_modules(
    model: Any, config: Mapping[str, Any], names: Collection[str]
) -> Architecture | None:
    """By transformers' model; None where it has no list of layers.

    What it has no place for is outside. Of a model of one module, mergekit's rule says the rest; of
    one with several, such as a vision tower, the text path does.
    """
    path = text_path(model)
    if path is None:
        return None
    described = LAST_SLICE.get(class_name(config))
    groups, left_out = groups_of(model, names)
    targets = dict(left_out)
    for group in groups:
        targets.update(dict.fromkeys(group.sources, group.target))
    one_module = described is not None or is_one_module(model.state_dict())
    prefixes, inside = set[str](), set[str]()
    roles: dict[str, Role] = {}
    embeddings = head = ""
    for name in names:
        target = targets[name]
        layer = None if name in left_out else path.layer(target)
        before = None if layer is None else _before(name, layer)
        if before is not None:
            prefixes.add(before)
            # of one layer and not of each
            inside.add(name.replace(f"{before}{layer}.", f"{before}0."))
            continue
        if name in left_out:
            roles[name] = Role.OUTSIDE
        elif one_module:
            roles.update(_first_or_last([name], described))
        else:
            roles[name] = path.role(target)
        embeddings = name if target == path.embeddings else embeddings
        head = name if target == path.head else head
    if not prefixes:
        return None
    heads = _head_names(model, path, embeddings)
    head = head or heads[0]
    if one_module:
        roles.update(_first_or_last([head], described))
    else:
        roles[head] = Role.LAST
    text = frozenset(name for name, role in roles.items() if role != Role.OUTSIDE)
    spare = spare_of(model, path, left_out)
    return Architecture(
        _longest_first(prefixes),
        roles,
        embeddings or EMBED,
        head,
        frozenset(heads) - {head},
        text | frozenset(inside),
        _lacking(model, groups),
        tuple(group for group in groups if group.converter is not None),
        tuple(name for name in left_out if name not in spare),
        spare,
        None if one_module else modules_of(class_name(config), names),
    )


def _head_names(model: Any, path: TextPath, embeddings: str) -> tuple[str, ...]:
    """The names that a head has in files: the first one as the embeddings are named in these."""
    saved = saved_name(model, path.head)
    if embeddings == path.embeddings != saved_name(model, path.embeddings):
        return path.head, saved
    return saved, path.head


def _lacking(model: Any, groups: Sequence[Group]) -> tuple[str, ...]:
    """The model's parameters that no tensor of the checkpoint gives numbers to."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)  # tied ones together
    made: set[str] = set()
    for group in groups:
        made.update(group.targets)
    ignored = list(map(re.compile, model._keys_to_ignore_on_load_missing or ()))
    lacking = []
    for tied in names.values():
        unread = any(pattern.search(name) for pattern in ignored for name in tied)
        if not unread and made.isdisjoint(tied):
            lacking.append(tied[0])
    return tuple(lacking)


def _before(name: str, layer: int) -> str | None:
    """What stands before the layer's number, which is the first such number of the name."""
    for match in _NUMBERED.finditer(name):
        if int(match[1]) == layer:
            return name[: match.start(1)]
    return None


def _by_names(config: Mapping[str, Any], names: Collection[str]) -> Architecture:
    """The largest list of tensors whose numbers run from 0 without a gap."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        match = _NUMBERED.search(name)
        if match:
            numbers.setdefault(name[: match.start(1)], []).append(int(match[1]))
    whole: dict[str, list[int]] = {}
    for before, found in numbers.items():
        if set(found) == set(range(max(found) + 1)):
            whole[before] = found
    layers = max(whole, key=lambda before: len(whole[before]), default=PLAIN_LAYERS)
    outside = [name for name in names if not name.startswith(layers)]
    roles = _first_or_last([*outside, HEAD], LAST_SLICE.get(class_name(config)))
    rule = f"{_no_model(config)}, so it is merged by its tensors' names: the layers are {layers}N"
    return Architecture(
        (layers,),
        roles,
        unplaced=tuple(name for name in outside if not _PLAIN.match(name)),
        rule=rule,
    )


def _no_model(config: Mapping[str, Any]) -> str:
    if config.get("model_type") is None:
        return "config.json names no model_type"
    without = f"transformers has no model of type {config['model_type']}"
    if not knows_type(config):
        return without
    if not text_classes(config):
        return f"{without} that writes text"
    return "transformers makes no model of config.json whose layers can be told"


def _longest_first(prefixes: set[str]) -> tuple[str, ...]:
    return tuple(sorted(prefixes, key=lambda before: (-len(before), before)))
