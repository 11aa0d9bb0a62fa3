"""One generation: the tasks it answers, who stops early, who grades, and when the search ends."""
