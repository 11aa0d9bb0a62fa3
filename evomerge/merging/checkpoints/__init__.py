"""Model folders on disk: read, checked, written."""
