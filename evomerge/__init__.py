"""evomerge: find the best merge of a base model and its fine-tuned siblings.

    search           run a study: find the merge weights, and prove the winner on held-out tasks
    check            report what a study needs
    merge            a mergekit configuration to a model folder
    infer            tasks in, answers out
    load_study       a study's trials, verdict, winner and plots
    list_studies     the studies of a storage
    delete_study     delete a study and what belongs to it
    register_method  a merge method of your own, described by a MergeMethod

Importing this is cheap; torch, transformers and Optuna are imported when a function needs them.
"""

from typing import TYPE_CHECKING

from evomerge.api import (
    LoadedStudy,
    check,
    delete_study,
    infer,
    list_studies,
    load_study,
    merge,
    search,
)

if TYPE_CHECKING:
    from evomerge.merging.methods.registry import MergeMethod, register_method

__version__ = "0.2.0"
__all__ = [
    "LoadedStudy",
    "MergeMethod",
    "__version__",
    "check",
    "delete_study",
    "infer",
    "list_studies",
    "load_study",
    "merge",
    "register_method",
    "search",
]


def __getattr__(name: str) -> object:
    """What needs torch is imported when it is first used."""
    if name not in ("MergeMethod", "register_method"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from evomerge.merging.methods import registry

    return getattr(registry, name)
