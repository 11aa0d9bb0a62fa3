"""The file formats of a knowledge base: Excel, YAML and CSV, all read into tables.py."""
