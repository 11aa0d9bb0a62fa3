"""Optuna's plots of a study's trials, as Plotly figures."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from evomerge.errors import InputError

if TYPE_CHECKING:
    import optuna
    import plotly.graph_objects

    from evomerge.searching.snapshot import StudySnapshot

SCORE = "score"


def plot_history(snapshot: StudySnapshot) -> plotly.graph_objects.Figure:
    """Every trial's score and the best so far."""
    from optuna.visualization import plot_optimization_history

    return plot_optimization_history(_trials(snapshot), target_name=SCORE)


def plot_importances(snapshot: StudySnapshot) -> plotly.graph_objects.Figure:
    """How much of the score's variance each weight explains.

    By fANOVA (Hutter, Hoos and Leyton-Brown, "An Efficient Approach for Assessing Hyperparameter
    Importance", 2014), with a fixed seed.
    """
    from optuna.importance import FanovaImportanceEvaluator
    from optuna.visualization import plot_param_importances

    evaluator = FanovaImportanceEvaluator(seed=snapshot.study.search.seed)
    return plot_param_importances(_trials(snapshot), evaluator=evaluator, target_name=SCORE)


def plot_slices(snapshot: StudySnapshot) -> plotly.graph_objects.Figure:
    """The score over each weight."""
    from optuna.visualization import plot_slice

    return plot_slice(_trials(snapshot), target_name=SCORE)


def plot_parallel(snapshot: StudySnapshot) -> plotly.graph_objects.Figure:
    """All weights of each trial as a line, coloured by the score."""
    from optuna.visualization import plot_parallel_coordinate

    return plot_parallel_coordinate(_trials(snapshot), target_name=SCORE)


def _trials(snapshot: StudySnapshot) -> optuna.Study:
    """The Optuna study behind the plots. Raises InputError without Plotly."""
    if importlib.util.find_spec("plotly") is None:
        raise InputError(
            "plots need Plotly", where="plot", remedy="Run: pip install 'evomerge[plot]'."
        )
    return snapshot.ledger.storage.study
