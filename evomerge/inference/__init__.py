"""Final inference: tasks in, answers out."""

from evomerge.inference.answer_file import run_inference

__all__ = ["run_inference"]
