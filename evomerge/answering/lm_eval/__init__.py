"""Tasks of lm-eval, answered by the live model."""
