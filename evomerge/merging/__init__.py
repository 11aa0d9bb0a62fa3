"""A recipe as a stream of merged tensors, and whatever takes them."""
