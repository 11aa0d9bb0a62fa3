"""evomerge: find the best merge of a base model and its fine-tuned siblings.

    search        run a study: find the merge weights, and prove the winner on held-out tasks
    check         report what a study needs
    merge         a mergekit configuration to a model folder
    infer         tasks in, answers out
    load_study    a study's trials, verdict, winner and plots

Importing this is cheap; torch, transformers and Optuna are imported when a function needs them.
"""

from evomerge.api import LoadedStudy, check, infer, load_study, merge, search

__version__ = "0.2.0"
__all__ = ["LoadedStudy", "__version__", "check", "infer", "load_study", "merge", "search"]
