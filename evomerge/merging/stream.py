"""A recipe as a stream of merged tensors, one at a time, whatever takes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from evomerge.errors import ModelError, RecipeError
from evomerge.merging.layout import LAYER, Layout, ModelFolder, check_fit, num_layers, open_model
from evomerge.merging.methods import task_arithmetic
from evomerge.recipe import Recipe


def open_recipe(recipe: Recipe) -> dict[str, ModelFolder]:
    """Every model of a recipe by its reference, checked to fit the base; the base comes first."""
    models = {ref: open_model(ref) for ref in (recipe.base_model, *recipe.siblings)}
    check_fit(models[recipe.base_model], [models[ref] for ref in recipe.siblings])
    return models


def merged_tensors(recipe: Recipe, models: Mapping[str, ModelFolder]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) in the model's order, on the CPU, in `out_dtype` or `dtype` or the dtype on disk.

    Raises ModelError on NaN or infinite weights, RecipeError when the slices do not cover the model.
    """
    base = models[recipe.base_model]
    layout = Layout(recipe, num_layers(base.config))
    out_dtype = _dtype(recipe.out_dtype)
    for name in tensor_names(base):
        tensor = merge_tensor(layout, models, name)
        yield name, tensor if out_dtype is None else tensor.to(out_dtype)


def merge_tensor(layout: Layout, models: Mapping[str, ModelFolder], name: str, device: Any = "cpu") -> torch.Tensor:
    """One merged tensor, computed on `device` in the recipe's dtype."""
    recipe = layout.recipe
    weights = layout.weights(name)
    base = load_finite(models[recipe.base_model], name, _dtype(recipe.dtype), device)
    siblings = [load_finite(models[ref], name, base.dtype, device) for ref, _ in weights]
    normalize = bool(layout.parameter("normalize", name, default=False))
    scale = float(layout.parameter("lambda", name, default=1.0))
    return task_arithmetic(base, siblings, [w for _, w in weights], normalize, scale)


def load_finite(model: ModelFolder, name: str, dtype: torch.dtype | None, device: Any = "cpu") -> torch.Tensor:
    """A tensor in `dtype`. Raises ModelError when it holds NaN or infinite numbers."""
    tensor = model.get_tensor(name)
    tensor = tensor.to(device=device, dtype=dtype or tensor.dtype)
    if tensor.numel():
        low, high = torch.aminmax(tensor)  # NaN goes through both; a fraction of isfinite's cost
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise ModelError(f"tensor {name} holds NaN or infinite numbers", where=model.path, remedy="Train or download the model again.")
    return tensor


def tensor_names(model: ModelFolder) -> list[str]:
    """Embeddings, layers in order, norm, head; a tied head is not stored."""
    tied = bool(model.config.get("tie_word_embeddings"))
    names: Sequence[str] = [name for name in model.keys if not (tied and name == "lm_head.weight")]

    def order(name: str) -> tuple[int, int, str]:
        match = LAYER.match(name)
        if match:
            return 1, int(match[2]), name
        return (2 if name.startswith("model.norm") else 3 if name.startswith("lm_head") else 0), 0, name

    return sorted(names, key=order)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise RecipeError("unknown dtype", found=name, remedy="Use bfloat16, float16 or float32.")
    return dtype
