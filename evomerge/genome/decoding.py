"""From a vector to a recipe: where each number goes in a mergekit configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.genome.model_walk import walk
from evomerge.genome.search_space import SearchSpace
from evomerge.recipe import METHODS, Recipe, task_arithmetic_recipe
from evomerge.study import mixes_models

COMMON = ("normalize", "int8_mask")  # of a whole recipe


def vector_to_recipe(space: SearchSpace, vector: Sequence[float]) -> Recipe:
    """(d,) numbers -> recipe."""
    recipe = _decoded(space, vector)
    if space.outside == "first":
        return merging_outside(recipe)
    return recipe


def merging_outside(recipe: Recipe) -> Recipe:
    """The recipe with filters that name everything, as tensors outside the text path ask for."""
    data = recipe.to_dict()
    holders = [data, *data.get("models", [])]
    if "slices" in data:
        first = data["slices"][0]
        holders = [first, *first["sources"]]
    for holder in holders:
        if holder.get("parameters"):
            holder["parameters"] = _everywhere(holder["parameters"])
    return Recipe.from_dict(data)


def _everywhere(parameters: Mapping[str, Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for key, setting in parameters.items():
        items = setting if isinstance(setting, list) else [setting]
        if key in COMMON:
            named[key] = setting
            continue
        if not isinstance(items[0], Mapping):
            items = [{"filter": "*", "value": setting}]
        *filtered, rest = items
        named[key] = [*filtered, {**rest, "filter": ""}]
    return named


def _decoded(space: SearchSpace, vector: Sequence[float]) -> Recipe:
    x = [float(number) for number in vector]
    assert len(x) == space.dimensions
    if space.is_alone(x):
        return _alone(space, int(-x[0]) - 1)
    if METHODS[space.method].walks:
        return _walk(space, x)
    plain = not space.filters and not space.smooth and space.tokenizer_source is None
    if space.method == "task_arithmetic" and plain:
        return _task_arithmetic(space, x)
    return _weighted(space, x)


def _alone(space: SearchSpace, model: int) -> Recipe:
    """One of the models as it is, for a genome whose merges do not contain it."""
    return _recipe(space, models=[{"model": space.all_models[model]}], merge_method="passthrough")


def _walk(space: SearchSpace, x: Sequence[float]) -> Recipe:
    slices = []
    for (start, end), u in zip(space.slices, x, strict=True):
        slices.append(_walk_slice(space, start, end, u))
    # whose tokenizer: the same for every u
    return _recipe(space, base_model=space.base_model or space.models[0], slices=slices)


def _walk_slice(space: SearchSpace, start: int, end: int, u: float) -> dict[str, Any]:
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
    parameters: dict[str, Any] = {}
    if "normalize" in METHODS[space.method].reads:
        parameters["normalize"] = float(space.normalize)
    if not mixes_models(space.method):
        parameters["int8_mask"] = 1.0
    data: dict[str, Any] = {"parameters": parameters}
    if space.base_model is not None:
        data["base_model"] = space.base_model
    if space.smooth:
        every = range(len(space.slices))
        parameters |= _shared(space, x, every)
        return _recipe(space, models=_sources(space, x, every), **data)
    slices = []
    for g, layers in enumerate(space.slices):
        sources = _sources(space, x, range(g, g + 1))
        piece: dict[str, Any] = {"sources": [{"layer_range": list(layers), **s} for s in sources]}
        if space.shared_parameters:
            piece["parameters"] = _shared(space, x, range(g, g + 1))
        slices.append(piece)
    return _recipe(space, slices=slices, **data)


def _sources(space: SearchSpace, x: Sequence[float], groups: range) -> list[dict[str, Any]]:
    """The models with their parameters in some groups, and a base that has no numbers last."""
    sources: list[dict[str, Any]] = []
    for m, ref in enumerate(space.models):
        source: dict[str, Any] = {"model": ref}
        if space.parameters:
            source["parameters"] = _settings(space, x, m, groups)
        sources.append(source)
    if space.base_model is not None and space.base_model not in space.models:
        sources.append({"model": space.base_model})
    return sources


def _settings(space: SearchSpace, x: Sequence[float], m: int, groups: range) -> dict[str, Any]:
    """Model m's parameters in one group, or in several as lines through their points."""
    settings: dict[str, Any] = {}
    for key in space.parameters:
        points = []
        for f in range(len(space.filter_sets)):
            points.append([_value(space, x, key, g, m, f) for g in groups])
        settings[key] = _by_filter(space, points)
    return settings


def _value(space: SearchSpace, x: Sequence[float], key: str, g: int, m: int, f: int) -> float:
    """What a recipe has for a number of a model."""
    number = x[space.index_of(g, m, f, space.parameters.index(key))]
    own = METHODS[space.method].searched.get(key)
    if own is None or not own.within_density:
        return number
    density = x[space.index_of(g, m, f, space.parameters.index("density"))]
    return number * min(density, 1 - density)


def _shared(space: SearchSpace, x: Sequence[float], groups: range) -> dict[str, Any]:
    """The parameters that the models share, in one group or several."""
    settings: dict[str, Any] = {}
    for q, key in enumerate(space.shared_parameters):
        points = []
        for f in range(len(space.filter_sets)):
            points.append([x[space.shared_index_of(g, f, q)] for g in groups])
        settings[key] = _by_filter(space, points)
    return settings


def _by_filter(space: SearchSpace, points: Sequence[Sequence[float]]) -> Any:
    """A parameter's points for each filter set, as a recipe has them."""
    values: list[dict[str, Any]] = []
    for text, line in zip(space.filter_sets, points, strict=True):
        values.append({"filter": text, "value": list(line) if len(line) > 1 else line[0]})
    return values if space.filters else values[0]["value"]


def _recipe(space: SearchSpace, **data: Any) -> Recipe:
    whole = {"merge_method": space.method, "dtype": space.dtype, **data}
    if space.tokenizer_source is not None:
        whole["tokenizer_source"] = space.tokenizer_source
    return Recipe.from_dict(whole)
