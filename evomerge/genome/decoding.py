"""From a vector to a recipe: where each number goes in a mergekit configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evomerge.genome.model_walk import walk
from evomerge.genome.search_space import SearchSpace
from evomerge.recipe import Recipe, task_arithmetic_recipe
from evomerge.study import mixes_models


def vector_to_recipe(space: SearchSpace, vector: Sequence[float]) -> Recipe:
    """(d,) numbers -> recipe."""
    x = [float(number) for number in vector]
    assert len(x) == space.dimensions
    if space.method == "slerp":
        return _slerp(space, x)
    plain = not space.filters and not space.smooth and space.tokenizer_source is None
    if space.method == "task_arithmetic" and plain:
        return _task_arithmetic(space, x)
    return _weighted(space, x)


def _slerp(space: SearchSpace, x: Sequence[float]) -> Recipe:
    slices = []
    for (start, end), u in zip(space.slices, x, strict=True):
        slices.append(_slerp_slice(space, start, end, u))
    # whose tokenizer: the same for every u
    return _recipe(space, base_model=space.base_model or space.models[0], slices=slices)


def _slerp_slice(space: SearchSpace, start: int, end: int, u: float) -> dict[str, Any]:
    """The slice at u; the walk's very end is the last edge's t = 1."""
    edges = walk(len(space.models))
    assert 0 <= u <= len(edges)
    edge = min(int(u), len(edges) - 1)
    pair = [space.models[i] for i in edges[edge]]
    sources = [{"layer_range": [start, end], "model": model} for model in pair]
    # u - edge is exact: no rounding
    return {"base_model": pair[0], "parameters": {"t": u - edge}, "sources": sources}


def _task_arithmetic(space: SearchSpace, x: Sequence[float]) -> Recipe:
    """A recipe in the shape of mergekit-evolve's, which its users know."""
    n = len(space.models)
    rows = [x[i : i + n] for i in range(0, len(x), n)]
    return task_arithmetic_recipe(
        str(space.base_model), space.models, space.slices, rows, space.dtype, space.normalize
    )


def _weighted(space: SearchSpace, x: Sequence[float]) -> Recipe:
    """A recipe with weights: sources per slice, or with `smooth` once with gradients."""
    data: dict[str, Any] = {"parameters": {"normalize": float(space.normalize)}}
    if space.base_model is not None:
        data["base_model"] = space.base_model
    if not mixes_models(space.method):
        data["parameters"]["int8_mask"] = 1.0
    if space.smooth:
        return _recipe(space, models=_sources(space, x, range(len(space.slices))), **data)
    slices = []
    for g, layers in enumerate(space.slices):
        sources = _sources(space, x, range(g, g + 1))
        slices.append({"sources": [{"layer_range": list(layers), **s} for s in sources]})
    return _recipe(space, slices=slices, **data)


def _sources(space: SearchSpace, x: Sequence[float], groups: range) -> list[dict[str, Any]]:
    """The models with their parameters in some groups, and a base that has no numbers last."""
    sources: list[dict[str, Any]] = []
    for m, ref in enumerate(space.models):
        sources.append({"model": ref, "parameters": _settings(space, x, m, groups)})
    if space.base_model is not None and space.base_model not in space.models:
        sources.append({"model": space.base_model})
    return sources


def _settings(space: SearchSpace, x: Sequence[float], m: int, groups: range) -> dict[str, Any]:
    """Model m's parameters in one group, or in several as lines through their points."""
    settings: dict[str, Any] = {}
    for p, key in enumerate(space.parameters):
        values = []
        for f, text in enumerate(space.filter_sets):
            points = [x[space.position(g, m, f, p)] for g in groups]
            values.append({"filter": text, "value": points if len(points) > 1 else points[0]})
        settings[key] = values if space.filters else values[0]["value"]
    return settings


def _recipe(space: SearchSpace, **data: Any) -> Recipe:
    whole = {"merge_method": space.method, "dtype": space.dtype, **data}
    if space.tokenizer_source is not None:
        whole["tokenizer_source"] = space.tokenizer_source
    return Recipe.from_dict(whole)
