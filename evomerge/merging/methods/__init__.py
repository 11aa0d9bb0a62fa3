"""Merge methods: one pure function each."""
