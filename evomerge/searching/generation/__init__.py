"""One generation: its tasks, what stops early, which judge grades, and when the search ends."""
