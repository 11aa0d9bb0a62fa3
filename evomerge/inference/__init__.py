"""Final inference: tasks in, answers out."""

from evomerge.inference.run import run_inference

__all__ = ["run_inference"]
