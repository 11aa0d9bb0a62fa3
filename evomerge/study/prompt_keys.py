"""`tasks:`, `split:`, `prompt:` and `generation:` from a task to an answer."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from evomerge.study.section import (
    PathText,
    Remedy,
    Section,
    Seed,
    Text,
    Texts,
    Weight,
    require,
)


class TaskSource(Section):
    """One place that tasks come from: `file`, `dataset`, or `name`, as in mergekit-evolve."""

    file: PathText | None = Field(
        default=None, min_length=1, description="A .jsonl, .json, .csv, .xlsx or .parquet file."
    )
    dataset: Text | None = Field(default=None, description="A dataset on the hub.")
    split: Text | None = Field(
        default=None, description='With dataset: the split to use; null: "test".'
    )
    name: Text | None = Field(default=None, description="An lm-eval task or group.")
    metric: Text = Field(
        default="acc,none", description='With name: the metric, as lm-eval\'s "metric,filter".'
    )
    weight: Weight = Field(
        default=1.0,
        description="With several sources, the score is "
        "sum(weight * mean of the source's tasks) / sum(|weight|).",
    )

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        places = {"file": self.file, "dataset": self.dataset, "name": self.name}
        named = {key: value for key, value in places.items() if value is not None}
        require(
            len(named) == 1,
            "",
            "needs exactly one of `file`, `dataset` and `name`",
            named,
            "Name one task file, dataset or (with `name`) lm-eval task.",
        )
        return self


class SplitSection(Section):
    """Which tasks are kept for the verdict."""

    held_out: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        examples=[0.5],
        description="Share of the tasks, of each kind, that the search never sees.",
    )
    validation: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        examples=[0.2],
        description="Share of the other tasks, of each kind, that are validation tasks, which only "
        "choose the winner; 0: none.",
    )
    seed: Seed = Field(default=0, description="Seed that decides which tasks are drawn.")


class PromptSection(Section):
    """How a task becomes a prompt."""

    format: Literal["chat", "competition", "template"] = Field(
        default="chat",
        description="chat: the tokenizer's chat template; competition: the competition's; "
        "template: your own.",
    )
    template: Text | None = Field(
        default=None, description="With format template: a text that contains {input}."
    )
    system: Text | None = Field(default=None, description="With format chat: the system turn.")
    too_long: Literal["refuse", "truncate"] = Field(
        default="refuse",
        description="What happens to a prompt that leaves no room for an answer; truncate: it is "
        "cut from the left, with a warning.",
    )
    knowledge: PathText | None = Field(
        default=None,
        description="A knowledge base: a task's class gives system text, template, examples and "
        "generation settings.",
    )
    retriever: Text = Field(
        default="tfidf",
        description="What finds examples: tfidf, bm25, embeddings:MODEL, or several joined by +.",
    )
    default_class: Text | None = Field(
        default=None,
        description="The class of tasks that are classified with less confidence than threshold; "
        "null: the best guess is kept.",
    )
    threshold: float = Field(
        default=0.35,
        ge=0,
        le=1,
        examples=[0.35],
        description="The confidence that a class needs, if default_class is set.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.format == "template":
            need = "Write a text that contains {input}: `format: template` needs it."
            require(self.template is not None, "template", "is missing", None, need)
        require(
            self.format == "template" or self.template is None,
            "template",
            "applies only to `format: template`",
            self.template,
            "Set that format, or remove the template.",
        )
        require(
            self.template is None or "{input}" in self.template,
            "template",
            "does not contain {input}",
            self.template,
            "Write {input} where the task goes.",
        )
        require(
            self.default_class is None or self.knowledge is not None,
            "default_class",
            "is a class of a knowledge base, and there is none",
            self.default_class,
            "Set prompt.knowledge too, or remove it.",
        )
        return self


class GenerationSection(Section):
    """How answers are generated; names and meanings as in transformers."""

    max_new_tokens: int = Field(
        default=256, ge=1, le=10**7, description="Longest answer, in tokens."
    )
    do_sample: bool = Field(default=False, description="false: greedy decoding.")
    temperature: Annotated[float, Remedy("Use 0.001 to 1000; `do_sample: false` is greedy.")] = (
        Field(default=1.0, ge=0.001, le=1000, description="With do_sample: sampling temperature.")
    )
    top_p: float = Field(
        default=1.0,
        ge=1e-6,
        le=1,
        description="With do_sample: nucleus sampling within this share of probability.",
    )
    repetition_penalty: Annotated[float, Remedy("Use 0.001 to 1000; 1.0 switches it off.")] = Field(
        default=1.0, ge=0.001, le=1000, description="Above 1: repeated tokens become less likely."
    )
    stop: Annotated[Texts, Remedy("Remove it: an empty text would end every answer.")] = Field(
        default=(), description="Texts that end an answer; they are not part of it."
    )
    seed: Seed | None = Field(default=None, description="Seed of sampling; null: search.seed.")

    @model_validator(mode="after")
    def _check_stop(self) -> Self:
        remedy = "Remove it: an empty text would end every answer."
        require(all(self.stop), "stop", "contains an empty text", self.stop, remedy)
        return self
