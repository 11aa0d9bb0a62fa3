"""A recipe: one mergekit configuration, read, checked, digested and written."""

from evomerge.recipe.configuration import Recipe, read_recipe, task_arithmetic_recipe
from evomerge.recipe.layers import Slice, Source, TokenizerSection
from evomerge.recipe.mergekit_keys import BOOLEANS, MERGEKIT, scalar
from evomerge.recipe.method_traits import METHODS, MethodParameter, MethodTraits
from evomerge.recipe.own_methods import OWN, find_method

__all__ = [
    "BOOLEANS",
    "MERGEKIT",
    "METHODS",
    "OWN",
    "MethodParameter",
    "MethodTraits",
    "Recipe",
    "Slice",
    "Source",
    "TokenizerSection",
    "find_method",
    "read_recipe",
    "scalar",
    "task_arithmetic_recipe",
]
