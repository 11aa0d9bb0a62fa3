"""Whether the study's models can be merged in a live model, tried on one without weights."""

from __future__ import annotations

import copy
import math

from evomerge.merging.architecture.empty_model import empty_model
from evomerge.merging.checkpoints.stored_forms import check_shapes
from evomerge.merging.live import LiveModel
from evomerge.merging.open_recipe import open_recipe
from evomerge.merging.stream import MergePlan
from evomerge.recipe import METHODS
from evomerge.searching.prepare import Prepared


def check_first_merge(prepared: Prepared) -> bool:
    """Raise ModelError or RecipeError as the search would before its first trial.

    It plans the first reference on transformers' own model of the configuration, with the live
    model's checks and no numbers. False where that model is not known, or another engine loads it.
    """
    study, base = prepared.study, prepared.base
    model = empty_model(base.config)
    if model is None or study.engine.kind != "transformers":
        return False
    # a live model may untie its head, and the empty one is kept
    live = LiveModel(
        copy.deepcopy(model), base, prepared.siblings or [base], study.search.seed, "disk"
    )
    check_shapes(base)
    _, vector = prepared.genome.references(study.search.uniform)[0]
    live.check_in_place(live.plan(prepared.genome.decode(vector)))
    return True


def try_own_method(prepared: Prepared) -> str | None:
    """Run a merge method of the user's own on the smallest tensor of each number of axes.

    None where the method is the package's, else what was merged. Raises RecipeError and ModelError
    as the merge would.
    """
    _, vector = prepared.genome.references(prepared.study.search.uniform)[-1]
    recipe = prepared.genome.decode(vector)
    if METHODS[recipe.merge_method].built_in:
        return None
    plan = MergePlan(recipe, open_recipe(recipe))
    smallest: dict[int, str] = {}  # number of axes -> name
    for name in sorted(plan.names, key=lambda name: math.prod(plan.shape(name))):
        if not plan.tensors[name].is_copy:
            smallest.setdefault(len(plan.shape(name)), name)
    for name in smallest.values():
        plan.merge(name)
    return ", ".join(smallest.values())
