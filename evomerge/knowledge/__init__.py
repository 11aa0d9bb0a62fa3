"""The Excel knowledge base and retrieval from it."""
