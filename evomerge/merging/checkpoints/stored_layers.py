"""The layers that a checkpoint stores, and whether they are all there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evomerge.errors import ModelError
from evomerge.merging.architecture.architecture import misfits_of
from evomerge.merging.checkpoints.model_folder import ModelFolder, num_layers
from evomerge.merging.checkpoints.model_kind import refuse_other_kinds
from evomerge.merging.checkpoints.stored_forms import check_converted


def layers_of(folder: ModelFolder) -> dict[int, set[tuple[str, str]]]:
    """Layer -> its tensors, as (name before the layer's number, name after it).

    Raises ModelError unless every layer that config.json names is there and complete.
    """
    by_layer: dict[int, set[tuple[str, str]]] = {}
    for name in folder.keys:
        parts = folder.architecture.split(name)
        if parts is not None:
            before, layer, after = parts
            by_layer.setdefault(layer, set()).add((before, after))
    check_layers(folder, by_layer)
    return by_layer


def check_layers(folder: ModelFolder, by_layer: Mapping[int, set[tuple[str, str]]]) -> None:
    """Raise ModelError unless the file has every layer that config.json names, complete.

    Layers of a plain model that are of one type must have the same tensors. `by_layer`: (name
    before, name after the number).
    """
    count = num_layers(folder.config)
    if set(by_layer) != set(range(count)):
        odd = sorted(set(by_layer) ^ set(range(count)))[0]
        raise ModelError(
            f"config.json has {count} layers, the file {len(by_layer)}: "
            f"layer {odd} is in only one of them",
            where=folder.path,
            remedy="Correct config.json, or copy the model again.",
        )
    lacking: Sequence[str] | None = folder.architecture.lacking
    if lacking is None:
        lacking = _odd_ones(folder, by_layer, count)
    if lacking:
        refuse_other_kinds(folder.config, folder.path)
        raise ModelError(
            f"the file lacks {lacking[0]}",
            where=folder.path,
            remedy="Copy or download the model again.",
        )
    check_converted(folder)


def _odd_ones(
    folder: ModelFolder, by_layer: Mapping[int, set[tuple[str, str]]], count: int
) -> Sequence[str]:
    """The tensors that a layer lacks and others of its type have, unless the model has them not."""
    types = [""] * count
    stated = folder.config.get("layer_types")
    if isinstance(stated, list) and len(stated) >= count:
        types = [str(kind) for kind in stated]
    complete: dict[str, set[tuple[str, str]]] = {}
    for layer, tensors in by_layer.items():
        complete.setdefault(types[layer], set()).update(tensors)
    odd = []
    for layer, tensors in by_layer.items():
        for _, after in sorted(complete[types[layer]] - tensors):
            odd.append(f"layer {layer}'s {after[1:]}")
    if not odd:
        return ()
    known = misfits_of(folder.config, folder.keys)
    if known is not None and not known.lacking:
        return ()
    return odd
