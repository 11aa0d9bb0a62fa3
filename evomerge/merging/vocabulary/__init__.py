"""Models with different tokens in one merge."""
