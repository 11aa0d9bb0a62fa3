"""Merge methods: one pure function each, and the registry that a user's own method can join."""
