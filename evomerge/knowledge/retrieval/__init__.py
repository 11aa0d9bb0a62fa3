"""Which texts of a base are nearest to a task: one module for each kind of similarity."""
