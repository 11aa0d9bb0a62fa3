"""Spreadsheets as people have them, for task files and knowledge bases: .xlsx and CSV exports."""
