"""Which numbers are searched: a vector to a recipe, and back."""
