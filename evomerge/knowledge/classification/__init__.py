"""Which class a task belongs to."""
