"""The public API: search, check, merge, infer, load_study, list_studies, delete_study.

Importing it is cheap: each function imports what it needs when it is called.
"""

from evomerge.api.loaded_study import LoadedStudy
from evomerge.api.public import check, infer, load_study, merge, search
from evomerge.api.stored_studies import delete_study, list_studies

__all__ = [
    "LoadedStudy",
    "check",
    "delete_study",
    "infer",
    "list_studies",
    "load_study",
    "merge",
    "search",
]
