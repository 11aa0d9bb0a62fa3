"""How files store what transformers loads as one tensor, such as a layer's experts."""

from __future__ import annotations

from evomerge.errors import ModelError
from evomerge.merging.architecture.conversion import Group, groups_of, shapes_after
from evomerge.merging.architecture.empty_model import empty_model
from evomerge.merging.checkpoints.model_folder import ModelFolder

SAVE_ALIKE = (
    "Load both with the same transformers, and save each with "
    "save_pretrained(folder, save_original_format=False)."
)


def check_converted(folder: ModelFolder) -> None:
    """Raise ModelError where a tensor lacks of those that are stacked or fused as they are loaded.

    What transformers makes of them must have the shape that its model has.
    """
    groups = folder.architecture.converted
    if not groups:
        return
    model = empty_model(folder.config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for group in groups:
        shapes = {name: folder.shape(name) for name in group.sources}
        try:
            made = shapes_after(model, group, shapes)
        except Exception:  # RuntimeError and others, by what transformers cannot put together
            made = {group.target: ()}
        for name, shape in made.items():
            if shape != wanted.get(name, shape):
                raise _misfit(folder, group, name, wanted[name])


def check_shapes(folder: ModelFolder) -> None:
    """Raise ModelError where config.json asks for tensors of another shape than the files have.

    Nothing is known of a type without a model in transformers.
    """
    check_converted(folder)
    model = empty_model(folder.config)
    if model is None:
        return
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    groups, _ = groups_of(model, folder.keys)
    for group in groups:
        stored = {name: folder.shape(name) for name in group.sources}
        for name, shape in shapes_after(model, group, stored).items():
            if shape != wanted.get(name, shape):
                raise ModelError(
                    f"{name} has the shape {shape}, where config.json asks for {wanted[name]}",
                    where=folder.path,
                    remedy="Correct config.json, or copy the model again.",
                )


def _misfit(folder: ModelFolder, group: Group, target: str, wanted: tuple[int, ...]) -> ModelError:
    lacking = _lacking(group, wanted)
    if lacking is not None:
        return ModelError(
            f"the file lacks {lacking}",
            where=folder.path,
            remedy="Copy or download the model again.",
        )
    first = group.sources[0]
    return ModelError(
        f"{first} {folder.shape(first)} and {len(group.sources) - 1} others do not make {target} "
        f"as config.json asks for it, {wanted}",
        where=folder.path,
        remedy="Correct config.json, or copy the model again.",
    )


def _lacking(group: Group, wanted: tuple[int, ...]) -> str | None:
    """The first tensor that is not there; None where it is not a tensor that lacks."""
    from transformers.core_model_loading import MergeModulelist

    for pattern in group.converter.source_patterns:
        if pattern not in group.patterns:
            return f"{pattern}, which {group.target} is made of"
    numbers: dict[tuple[str, str], set[int]] = {}
    for name in group.sources:
        parts = name.split(".")
        for i in range(len(parts) - 2, 0, -1):
            if parts[i].isdecimal():
                around = (".".join([*parts[:i], ""]), ".".join(["", *parts[i + 1 :]]))
                numbers.setdefault(around, set()).add(int(parts[i]))
                break
    count = 1 + max((number for found in numbers.values() for number in found), default=-1)
    if any(isinstance(step, MergeModulelist) for step in group.converter.operations):
        count = max(count, *wanted[:1])
    for (before, after), found in sorted(numbers.items()):
        for number in range(count):
            if number not in found:
                return f"{before}{number}{after}"
    return None


def other_form(folder: ModelFolder, lacked: str) -> tuple[Group, Group] | None:
    """How a model without the tensor `lacked` stores its numbers, and how one that has it does.

    None where it does not store them.
    """
    model = empty_model(folder.config)
    if model is None:
        return None
    wanted, _ = groups_of(model, [lacked])
    if not wanted:
        return None
    groups, _ = groups_of(model, folder.keys)
    for group in groups:
        same = set(wanted[0].targets) & set(group.targets)
        if same and set(wanted[0].patterns).isdisjoint(group.patterns):
            return group, wanted[0]
    return None


def unlike(theirs: Group, ours: Group) -> str:
    """In what the two forms differ: "it stores as … what the base stores as …"."""
    if theirs.converter is None and ours.converter is None:
        return f"it names {theirs.sources[0]} what the base names {ours.sources[0]}"
    return f"it stores as {_form(theirs)} what the base stores as {_form(ours)}"


def _form(group: Group) -> str:
    first = group.sources[0]
    return f"one tensor ({first})" if group.converter is None else f"several (such as {first})"
