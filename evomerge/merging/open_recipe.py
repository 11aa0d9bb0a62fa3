"""The models of a recipe, opened and checked to fit, and the recipe laid over them."""

from __future__ import annotations

from collections.abc import Mapping

from evomerge.merging.architecture.architecture import architecture_of, check_modules
from evomerge.merging.checkpoints.compatibility import (
    check_fit,
    check_meaning,
    check_tensors,
    check_whole,
    tell_what_is_spare,
)
from evomerge.merging.checkpoints.model_folder import ModelFolder, num_layers
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.layout import Layout
from evomerge.recipe import Recipe


def open_recipe(recipe: Recipe) -> dict[str, ModelFolder]:
    """Every model of a recipe by its reference, the base first, checked to fit the first one.

    Of models in slices, only what is merged has to fit.
    """
    models = {ref: open_model(ref) for ref in recipe.models}
    first, *others = models.values()
    same_vocabulary = recipe.tokenizer is None
    if all(source.layers is None for piece in recipe.slices for source in piece.sources):
        check_fit(first, others, same_vocabulary)
        return models
    check_meaning(first, others)
    layout = make_layout(recipe, models)
    merged: dict[str, set[str]] = {ref: set() for ref in models}
    for name in layout.names(models):
        inputs = [(models[ref], source) for ref, source in layout.inputs(name)]
        for model, source in inputs:
            merged[model.ref].add(model.stored(source))
        lacked = any(model.stored(source) not in model.files for model, source in inputs)
        is_spare = lacked and any(source in model.spare for model, source in inputs)
        if not layout.stays(name) and not is_spare:
            check_tensors(inputs[0], inputs[1:], same_vocabulary)
    for ref, names in merged.items():
        check_whole(models[ref], names, layout.architecture)
    tell_what_is_spare(first, others)
    return models


def make_layout(recipe: Recipe, models: Mapping[str, ModelFolder]) -> Layout:
    """The recipe laid over these models. Raises RecipeError, UnsupportedRecipe."""
    donor = models[recipe.donor]
    check_modules(recipe.modules, donor.config)
    architecture = donor.architecture
    if recipe.architecture is not None:
        config = {**donor.config, "architectures": [recipe.architecture]}
        architecture = architecture_of(config, donor.keys)
    depths = {ref: num_layers(model.config) for ref, model in models.items()}
    return Layout(recipe, num_layers(donor.config), architecture, depths)
