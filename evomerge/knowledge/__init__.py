"""The knowledge base: classes of tasks with prompts, examples and documents.

read_base.py and write_base.py are the files of a base (formats/ has one module for each format),
records.py is its content, chooser.py picks what a task's prompt gets from it, with retrieval/ and
classification/. drafting.py and starter.py make new bases.
"""
