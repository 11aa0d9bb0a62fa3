"""A study as users see it: its trials, its verdict, its winner, its plots, and its files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.api.inputs import (
    check_no_study_file,
    result_files,
    results_folder,
    study_inputs,
)
from evomerge.outputs import check_outputs

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from evomerge.console import Console
    from evomerge.recipe import Recipe
    from evomerge.searching.records.front_record import Front
    from evomerge.searching.records.trial_record import TrialRecord
    from evomerge.searching.records.verdict_record import Verdict
    from evomerge.searching.snapshot import StudySnapshot
    from evomerge.study import Study


@dataclass(frozen=True)
class LoadedStudy:
    """A study, finished or still running, as its storage held it when it was loaded.

    The plots are Plotly figures by Optuna (`pip install 'evomerge[plot]'`): `figure.show()` shows
    one, `figure.write_html(path)` keeps it.
    """

    snapshot: StudySnapshot
    storage: str  # its URL
    written: tuple[Path, ...] = ()  # the result files, where `search` returned it

    def __repr__(self) -> str:
        state = "running" if self.verdict is None else "finished"
        return f"<study {self.name}, {state}, {len(self.records)} trials>"

    @property
    def name(self) -> str:
        """The study's name."""
        return self.snapshot.ledger.name

    @property
    def study(self) -> Study:
        """The study file that it runs by, with every default."""
        return self.snapshot.study

    @property
    def records(self) -> list[TrialRecord]:
        """Every trial in the order of its number, grades by task included."""
        return self.snapshot.records

    @property
    def _inputs(self) -> list[str | Path | None]:
        return study_inputs(self.study, self.storage, self.name)

    @property
    def trials(self) -> pandas.DataFrame:
        """One row per trial, with the columns of trials.csv.

        number, generation and index (both from 1), role, state, score, stderr, n (tasks),
        truncated (share of answers), seconds by phase, reason of a failure, a column per weight.
        """
        import pandas

        from evomerge.reporting.export import slice_labels
        from evomerge.reporting.trial_table import trial_rows

        frame = pandas.DataFrame(trial_rows(self.records, slice_labels(self.snapshot)))
        return frame.astype({"generation": "Int64", "index": "Int64", "score": "float64"})

    @property
    def verdict(self) -> Verdict | None:
        """The winner against its parents and the best uniform weight on the held-out tasks.

        None while the search is not finished.
        """
        return self.snapshot.verdict

    @property
    def notes(self) -> list[str]:
        """What a reader of the verdict must know besides its figures, one sentence each."""
        from evomerge.reporting.sentences import notes

        return notes(self.snapshot.ledger.facts)

    @property
    def winner(self) -> TrialRecord:
        """The trial that the verdict names, or the choice by the trials so far.

        It is a parent or a uniform weight where no merge was found that beats it.
        """
        return self.snapshot.winner

    @property
    def unbeaten(self) -> str | None:
        """The name of the parent or uniform weight that wins; None where the search's merge does.

        base, instruct, sibling:NAME or uniform 0.5, for example.
        """
        return self.snapshot.unbeaten

    @property
    def best(self) -> TrialRecord:
        """The candidate with the highest score on the search tasks: good, and lucky as well."""
        from evomerge.searching.history import History

        return History(tuple(self.records)).best_candidate()

    def with_trial(self, number: int) -> LoadedStudy:
        """The same study with another trial's recipe in the winner's place, to export it.

        `recipe`, `recipe_yaml`, `build_model` and `write_runner` are that trial's then. Raises
        StudyError for a trial that is unknown or not finished.
        """
        return replace(self, snapshot=self.snapshot.with_trial(number))

    def with_point(self, wanted: str) -> LoadedStudy:
        """The same with a point of the front: its number, "knee", or "answer_tokens<=300".

        Of the points that meet a constraint it is the best in the other objective. Raises
        InputError for one that there is not, StudyError for a study that has no front.
        """
        return replace(self, snapshot=self.snapshot.with_point(wanted))

    @property
    def front(self) -> Front:
        """The merges that no other beats in every objective, or in score and tokens of an answer.

        On the held-out tasks where a search of several objectives has ended, else on the search
        tasks. Raises StudyError for a study of an older version that did not record them.
        """
        return self.snapshot.known_front

    @property
    def recipe(self) -> Recipe:
        """The winner's recipe, or that of `with_trial` or `with_point`."""
        return self.snapshot.recipe

    @property
    def recipe_yaml(self) -> str:
        """The same recipe as a mergekit configuration."""
        from evomerge.reporting.export import recipe_text

        return recipe_text(self.snapshot)

    @property
    def answer_cache(self) -> Path:
        """The file with the answers that the study keeps."""
        from evomerge.searching.ledger import cache_path

        return cache_path(self.storage, self.name)

    def plot_history(self) -> plotly.graph_objects.Figure:
        """Every trial's score and the best so far. Raises InputError without Plotly."""
        from evomerge.reporting.plots import plot_history

        return plot_history(self.snapshot)

    def plot_importances(self) -> plotly.graph_objects.Figure:
        """How much of the score's variance each weight explains (fANOVA)."""
        from evomerge.reporting.plots import plot_importances

        return plot_importances(self.snapshot)

    def plot_slices(self) -> plotly.graph_objects.Figure:
        """The score over each weight."""
        from evomerge.reporting.plots import plot_slices

        return plot_slices(self.snapshot)

    def plot_parallel(self) -> plotly.graph_objects.Figure:
        """All weights of each trial as a line, coloured by the score."""
        from evomerge.reporting.plots import plot_parallel

        return plot_parallel(self.snapshot)

    def to_json(self, pareto: bool = False) -> dict[str, Any]:
        """The stable form that `evomerge show --json` prints, with --pareto the front too."""
        from evomerge.reporting.export import as_json

        return as_json(self.snapshot, pareto)

    def write_results(self, results: str | Path | None = None) -> list[Path]:
        """Write best.yaml, README.md, verdict.json, trials.csv and report.html to results/NAME/.

        Returns their paths. Raises OutputError, InputError where one of them is an input.
        """
        from evomerge.reporting.export import write_results

        folder = results_folder(results, self.name)
        check_outputs(files=result_files(folder), inputs=self._inputs)
        return write_results(replace(self.snapshot, picked=None), folder)

    def write_recipe(self, out: str | Path) -> Path:
        """Write the winner's recipe to a file.

        Raises InputError where that is a study file or something that the study reads, OutputError.
        """
        from evomerge.files import replace_file

        out, text = Path(out), self.recipe_yaml
        check_outputs(files=[out], inputs=self._inputs)
        check_no_study_file(out)
        return replace_file(out, lambda path: path.write_text(text, encoding="utf-8"))

    def build_model(
        self,
        out: str | Path,
        *,
        shard_size: str | int = "5GB",
        console: Console | None = None,
    ) -> Path:
        """Build the winner as a new model folder, its model card with the verdict included.

        Raises InputError where the folder exists, ModelError, OutputError.
        """
        check_outputs(folders=[out], inputs=self._inputs)
        from evomerge.console import Console
        from evomerge.reporting.export import card, use_threads

        use_threads(self.snapshot)
        return build_model_folder(
            self.recipe,
            Path(out),
            self.recipe_yaml,
            shard_size,
            self.study.search.seed,
            console or Console(),
            card(self.snapshot),
        )

    def write_runner(self, out: str | Path, knowledge: str | Path | None = None) -> list[Path]:
        """Write a folder that answers tasks with the winner where evomerge is not installed.

        `knowledge` replaces the study's knowledge base. Returns the files. Raises InputError where
        the folder exists, StudyError where the study's knowledge base has changed, KnowledgeError.
        """
        from evomerge.inference.opening import check_unchanged_base
        from evomerge.knowledge.read_base import read_knowledge
        from evomerge.reporting.runner import write_runner

        check_outputs(folders=[out], inputs=[*self._inputs, knowledge])
        base = knowledge or self.study.prompt.knowledge
        if base is not None and knowledge is None:
            known = self.snapshot.ledger.facts.knowledge
            check_unchanged_base(str(base), known, self.name)
        read = None if base is None else read_knowledge(base)
        return write_runner(self.snapshot, Path(out), read)


def build_model_folder(
    recipe: Recipe,
    out: Path,
    text: str,
    shard_size: str | int,
    random_seed: int,
    console: Console,
    card: str | None = None,
) -> Path:
    """Build a recipe's model folder with a progress bar; `text` is its configuration as written.

    `card`: the model card; None: one that describes the recipe.
    """
    from evomerge.console import byte_progress
    from evomerge.merging.build import build_model
    from evomerge.reporting.card import model_card

    def write_card(recipe: Recipe, name: str, *, recipe_text: str, only_here: bool) -> str:
        return card or model_card(recipe, name, recipe_text=recipe_text, only_here=only_here)

    return build_model(
        recipe,
        out,
        write_card=write_card,
        recipe_text=text,
        shard_size=shard_size,
        random_seed=random_seed,
        progress=byte_progress(console, "merging"),
    )
