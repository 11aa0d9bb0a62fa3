"""Open tasks: measures of an answer against the reference, summed to a grade."""
