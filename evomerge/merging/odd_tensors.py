"""Tensors that a method cannot take as it takes others."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch

from evomerge.merging.checkpoints.model_folder import ModelFolder
from evomerge.merging.tensor_merge import MASK_NUMBER
from evomerge.merging.tensor_plan import TensorPlan
from evomerge.once import warn_once

log = logging.getLogger(__name__)


def is_infinite_mask(model: ModelFolder, name: str, dtype: torch.dtype | None) -> bool:
    """Whether it is the number that masks a place, and infinite in the recipe's dtype."""
    if not name.endswith(MASK_NUMBER):
        return False
    found = model.get_tensor(name)
    return bool(found.to(dtype or found.dtype).isinf().any())


def with_whole_rows(plan: TensorPlan, name: str, models: Mapping[str, ModelFolder]) -> TensorPlan:
    """The plan of a method that drops by rank, without drops where a row has one number."""
    if not plan.draws or not _has_rows_of_one(plan, models):
        return plan
    warn_once(
        log,
        f"{plan.method} drops nothing of tensors like {_kind(name)}, whose rows have one number "
        "each; mergekit needs `density: 1` for them",
    )
    return replace(plan, densities=tuple(1.0 for _ in plan.densities), draws=0)


def _has_rows_of_one(plan: TensorPlan, models: Mapping[str, ModelFolder]) -> bool:
    ref, source = plan.inputs[0]
    shape = models[ref].shape(source)
    if len(shape) < 2:
        return shape in ((), (1,))
    return shape[1] == 1


def _kind(name: str) -> str:
    """The end of a tensor's name, which all layers have."""
    return ".".join(name.split(".")[-2:])
