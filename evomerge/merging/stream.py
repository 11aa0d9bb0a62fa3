"""A recipe as a stream of merged tensors, one at a time, whatever takes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import torch

from evomerge.errors import ModelError, RecipeError
from evomerge.merging.layout import LAYER, Layout, ModelFolder, check_fit, check_same_tokens, num_layers, open_model
from evomerge.merging.methods import task_arithmetic
from evomerge.recipe import Recipe


def open_recipe(recipe: Recipe) -> dict[str, ModelFolder]:
    """Every model of a recipe by its reference, checked to fit the base; the base comes first."""
    models = {ref: open_model(ref) for ref in (recipe.base_model, *recipe.siblings)}
    check_fit(models[recipe.base_model], [models[ref] for ref in recipe.siblings])
    if recipe.tokenizer_source is not None:
        check_same_tokens(list(models.values()))
    return models


def merged_tensors(recipe: Recipe, models: Mapping[str, ModelFolder]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) in the model's order, on the CPU, in `merged_dtype`.

    Raises ModelError on NaN or infinite weights, RecipeError when the slices do not cover the model.
    """
    base = models[recipe.base_model]
    layout = Layout(recipe, num_layers(base.config))
    for name in tensor_names(base):
        yield name, merge_tensor(layout, models, name)


def merge_tensor(layout: Layout, models: Mapping[str, ModelFolder], name: str, device: Any = "cpu") -> torch.Tensor:
    """One merged tensor, computed on `device` in the recipe's dtype, then rounded to its `out_dtype`."""
    weights = layout.weights(name)
    dtype = working_dtype(layout, models, name)
    base = load_finite(models[layout.recipe.base_model], name, dtype, device)
    siblings = [load_finite(models[ref], name, dtype, device) for ref, _ in weights]
    normalize = bool(layout.parameter("normalize", name, default=False))
    scale = float(layout.parameter("lambda", name, default=1.0))
    merged = task_arithmetic(base, siblings, [w for _, w in weights], normalize, scale)
    return merged.to(dtype_named(layout.recipe.out_dtype) or dtype)


def working_dtype(layout: Layout, models: Mapping[str, ModelFolder], name: str) -> torch.dtype:
    """The recipe's `dtype`; without one, the widest that the tensor has on disk."""
    named = dtype_named(layout.recipe.dtype)
    if named is not None:
        return named
    on_disk = [models[ref].dtype(name) for ref in (layout.recipe.base_model, *(ref for ref, _ in layout.weights(name)))]
    return reduce(torch.promote_types, on_disk)


def load_finite(model: ModelFolder, name: str, dtype: torch.dtype, device: Any = "cpu") -> torch.Tensor:
    """A tensor in `dtype`. Raises ModelError when it holds NaN or infinite numbers."""
    tensor = model.get_tensor(name)
    tensor = tensor.to(device=device, dtype=dtype)
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


def dtype_named(name: str | None) -> torch.dtype | None:
    """torch's dtype of that name; None stays None."""
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise RecipeError("unknown dtype", found=name, remedy="Use bfloat16, float16 or float32.")
    return dtype
