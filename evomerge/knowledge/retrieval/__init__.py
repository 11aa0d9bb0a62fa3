"""Which texts of the base are nearest to a task."""
