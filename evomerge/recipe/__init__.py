"""A recipe: one mergekit configuration, read, checked, digested and written."""

from evomerge.recipe.configuration import Recipe, read_recipe, task_arithmetic_recipe
from evomerge.recipe.layers import Slice, Source, TokenizerSection
from evomerge.recipe.mergekit_keys import (
    BOOLEANS,
    BUILT_IN,
    DARE,
    MERGEKIT,
    METHODS,
    MethodTraits,
    scalar,
)

__all__ = [
    "BOOLEANS",
    "BUILT_IN",
    "DARE",
    "MERGEKIT",
    "METHODS",
    "MethodTraits",
    "Recipe",
    "Slice",
    "Source",
    "TokenizerSection",
    "read_recipe",
    "scalar",
    "task_arithmetic_recipe",
]
