"""Pure functions from a study's history to the next vector."""
