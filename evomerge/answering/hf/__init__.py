"""The transformers engine: one live model, a decode loop of its own, and its capabilities."""
