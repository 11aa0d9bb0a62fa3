"""Closed tasks (a number, a word, a list, a label): does the answer say the expected one?"""
