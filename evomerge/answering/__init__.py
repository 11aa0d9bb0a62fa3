"""Prompts, engines, and answers already paid for."""
