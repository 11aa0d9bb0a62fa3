"""The whole study file: its sections, top-level keys, and the rules between sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from evomerge.recipe import METHODS
from evomerge.study.as_written import AsWritten
from evomerge.study.engine_keys import EngineSection
from evomerge.study.environment import expanded
from evomerge.study.genome_keys import GenomeSection
from evomerge.study.judge_keys import JudgeSection
from evomerge.study.messages import validated
from evomerge.study.objective_keys import ObjectiveSection, check_objective
from evomerge.study.older_defaults import BEFORE
from evomerge.study.prompt_keys import GenerationSection, PromptSection, SplitSection, TaskSource
from evomerge.study.search_keys import SearchSection, check_parameter_bounds
from evomerge.study.section import STORED, PathText, Remedy, StudyName, as_tuple, require


def _named_tasks(tasks: object) -> object:
    """mergekit-evolve's plain names of lm-eval tasks as sources."""
    if not isinstance(tasks, list):
        return tasks
    return tuple({"name": entry} if isinstance(entry, str) else entry for entry in tasks)


def _one_or_several(paths: object) -> object:
    if isinstance(paths, str):
        return (paths,)
    return as_tuple(paths)


class Study(AsWritten):
    """One search, by name."""

    genome: GenomeSection = Field(description="What is merged and how.")
    tasks: Annotated[
        tuple[TaskSource, ...],
        BeforeValidator(
            _named_tasks,
            json_schema_input_type=Annotated[list[TaskSource | str], Field(min_length=1)],
        ),
        Remedy("Name at least one task file or dataset."),
    ] = Field(
        min_length=1,
        description="What the merged model must answer; a plain text is the name of an lm-eval "
        "task.",
    )
    study: StudyName = Field(
        default="", description="The study's name; the file's stem by default."
    )
    split: SplitSection = Field(
        default=SplitSection(), description="Which tasks are kept for the verdict."
    )
    prompt: PromptSection = Field(
        default=PromptSection(), description="How a task becomes a prompt."
    )
    generation: GenerationSection = Field(
        default=GenerationSection(), description="How answers are generated."
    )
    judge: JudgeSection = Field(
        default=JudgeSection(), description="Which judge grades the answers."
    )
    objective: ObjectiveSection = Field(
        default=ObjectiveSection(), description="What is maximised."
    )
    search: SearchSection = Field(
        default=SearchSection(), description="CMA-ES over the genome's numbers."
    )
    engine: EngineSection = Field(default=EngineSection(), description="Which engine answers.")
    limit: int | None = Field(
        default=None,
        le=10**9,
        description="With lm-eval tasks: documents of each, search and held-out together, the same "
        "for every candidate.",
    )
    num_fewshot: int | None = Field(
        default=None,
        ge=0,
        le=10_000,
        description="With lm-eval tasks: examples in each prompt; null: the task's own number.",
    )
    shuffle: bool = Field(
        default=False,
        description="With limit: documents drawn at random, once, by split.seed, instead of the "
        "first ones.",
    )
    random_init: bool = Field(
        default=False, description="The first mean is drawn within the bounds, by search.seed."
    )
    apply_chat_template: bool = Field(
        default=True, description="With lm-eval tasks: prompts use the chat template."
    )
    fewshot_as_multiturn: bool = Field(
        default=True, description="With the chat template: each example is a separate turn."
    )
    task_search_path: Annotated[
        tuple[PathText, ...],
        BeforeValidator(_one_or_several, json_schema_input_type=str | list[str]),
    ] = Field(default=(), description="Folders with lm-eval tasks of your own: one or a list.")

    @property
    def lm_eval(self) -> bool:
        """Whether the tasks are lm-eval's."""
        return any(source.name is not None for source in self.tasks)

    @property
    def metric(self) -> str:
        """Which figure of a task's grades is optimised, and compared in the verdict."""
        if self.objective.several:
            return self.judge.metric
        weights = {source.weight for source in self.tasks}
        weighted = len(weights) > 1 and not self.lm_eval
        if weighted or self.objective != ObjectiveSection():
            return "objective"
        return self.judge.metric

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest weight; for slerp, what `start` and `sigma` are shares of."""
        walks = METHODS[self.genome.merge_method].walks
        negative = self.genome.allow_negative_weights and not walks
        return self.search.bounds or ((-2.0, 2.0) if negative else (0.0, 2.0))

    @property
    def density_bounds(self) -> tuple[float, float]:
        """Lowest and highest density.

        Below 0.1 a random tenth is scaled up tenfold, which is noise.
        """
        return self.search.density_bounds or (0.1, 1.0)

    @property
    def start_density(self) -> float:
        """First mean of the densities.

        Not 1: half of the draws around a bound would fall outside and be drawn again.
        """
        if self.search.start_density is not None:
            return self.search.start_density
        low, high = self.density_bounds
        if low < 0.8 < high:
            return 0.8
        return (low + high) / 2

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Study:
        """The inverse of `to_dict`; variables that are not set stay as they are written.

        A key that an older version did not store keeps the behaviour of that version. Raises
        StudyFileError.
        """
        whole = expanded(dict(data))
        for section, values in BEFORE.items():
            whole[section] = values | whole.get(section, {})
        study = validated(cls, whole, "the stored study", folder=STORED)
        return study.with_stored_variables(data)

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        """The start lies within bounds whose defaults depend on the method."""
        search, method = self.search, self.genome.merge_method
        low, high = self.bounds
        start = f"is not within the bounds {low} to {high}"
        holds = search.start is None or low <= search.start <= high
        require(holds, "search.start", start, search.start, "Change one.")
        sparse, dense = self.density_bounds
        require(
            sparse <= self.start_density <= dense,
            "search.start_density",
            f"is not within the bounds {sparse} to {dense}",
            search.start_density,
            "Change one.",
        )
        require(
            METHODS[method].weighted or search.bounds is None,
            "search.bounds",
            f"cannot be combined with {method}, which has no weights",
            search.bounds,
            "Remove it.",
        )
        check_parameter_bounds(search.parameter_bounds, method)
        for key in ("density_bounds", "start_density"):
            value = getattr(search, key)
            require(
                value is None or METHODS[method].has_densities,
                f"search.{key}",
                f"has no effect: {method} has no densities",
                value,
                "Remove it.",
            )
        return self

    @model_validator(mode="after")
    def _check_start(self) -> Self:
        search = self.search
        require(
            search.source_study is None or search.source_study != self.study,
            "search.source_study",
            "is this study itself",
            search.source_study,
            "Name another study.",
        )
        if self.random_init:
            given = search.demanded_start or search.source_study
            require(
                given is None,
                "random_init",
                "cannot be combined with `search.warm_start` or `source_study`, which set the "
                "start",
                given,
                "Remove it.",
            )
            require(
                search.start in (None, 1.0),  # 1 is what every older study has stored
                "search.start",
                "has no effect: `random_init` draws the start",
                search.start,
                "Remove it.",
            )
        return self

    @model_validator(mode="after")
    def _check_evaluation(self) -> Self:
        """The rules on engine, judge and cost."""
        search, engine, judge = self.search, self.engine, self.judge
        require(
            search.max_cost is None
            or search.hourly_price + judge.input_price + judge.output_price > 0,
            "search.max_cost",
            "needs a price",
            search.max_cost,
            "Set search.hourly_price, or the judge's prices.",
        )
        if search.ranking == "race":
            race = "cannot be combined with `search.ranking: race`, which answers one by one"
            require(not engine.population, "engine.population", race, True, "Remove it.")
            cascade = "cannot be race with the cascade judge"
            require(
                judge.kind != "cascade", "search.ranking", cascade, "race", "Use subset or all."
            )
        require(
            any(source.weight for source in self.tasks),
            "tasks",
            "has only weights of 0",
            [source.weight for source in self.tasks],
            "Give one source a weight.",
        )
        check_objective(self.objective, self.tasks, search, judge, engine)
        return self

    @model_validator(mode="after")
    def _check_lm_eval(self) -> Self:
        """lm-eval's metrics are over all documents, and its engine is transformers."""
        if not self.lm_eval:
            return self
        files = [source.file or source.dataset for source in self.tasks if source.name is None]
        require(
            not files,
            "tasks",
            "mixes lm-eval tasks with files, whose grades differ in scale",
            next(iter(files), None),
            "Make two studies.",
        )
        everything = "cannot be combined with lm-eval tasks, whose metrics are over all documents"
        found = {
            "search.ranking": None if self.search.ranking == "all" else self.search.ranking,
            "split.validation": self.split.validation or None,
            "search.warm_start": self.search.demanded_start,
        }
        for key, value in found.items():
            require(value is None, key, everything, value, "Remove it.")
        require(
            self.objective == ObjectiveSection(),
            "objective",
            "cannot be combined with lm-eval tasks",
            None,
            "Remove it.",
        )
        kind = self.engine.kind
        need = "must be transformers for lm-eval tasks"
        require(kind == "transformers", "engine.kind", need, kind, "Change it.")
        one_by_one = (
            "cannot be combined with lm-eval tasks, which are answered candidate by candidate"
        )
        require(not self.engine.population, "engine.population", one_by_one, True, "Remove it.")
        require(
            self.limit is None or self.limit >= 2,
            "limit",
            "leaves nothing to hold out",
            self.limit,
            "Use at least 2.",
        )
        return self
