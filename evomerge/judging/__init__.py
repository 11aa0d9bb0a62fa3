"""Judges: each takes a task and an answer and gives a grade."""
