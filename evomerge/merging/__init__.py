"""A recipe as a stream of merged tensors, and their destinations."""
