"""Where a search begins: known candidates, another study's distribution, gradient steps."""
