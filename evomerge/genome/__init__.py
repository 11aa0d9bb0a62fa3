"""The searched numbers: from a vector to a recipe, and back."""
