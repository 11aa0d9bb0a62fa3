"""Prompts, engines, and the cache of answers."""
