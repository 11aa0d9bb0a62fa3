"""The public API: search, check, merge, infer, load_study.

Importing it is cheap: each function imports what it needs when it is called.
"""

from evomerge.api.loaded_study import LoadedStudy
from evomerge.api.public import check, infer, load_study, merge, search

__all__ = ["LoadedStudy", "check", "infer", "load_study", "merge", "search"]
