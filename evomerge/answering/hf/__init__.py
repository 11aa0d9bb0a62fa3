"""The transformers engine: one live model, its own decode loop, and its capabilities."""
