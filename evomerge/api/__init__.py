"""The public API: search, check, merge, infer, load_study.

Importing it is cheap: each function imports what it needs when it is called.
"""

from evomerge.api.functions import check, infer, load_study, merge, search
from evomerge.api.loaded_study import LoadedStudy

__all__ = ["LoadedStudy", "check", "infer", "load_study", "merge", "search"]
