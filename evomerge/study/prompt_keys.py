"""`tasks:`, `split:`, `prompt:` and `generation:` from a task to an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

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

# of transformers' `apply_chat_template`: what the prompts' own turns and settings decide
RESERVED = (
    *("messages", "conversation", "tools", "documents", "chat_template", "self"),
    *("add_generation_prompt", "continue_final_message", "sanitize_control_tokens"),
    *("tokenize", "tokenizer_kwargs", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
)


def _template_kwargs(value: object) -> object:
    """Variables of a chat template: names that are free, and values that JSON can hold."""
    remedy = "Write, for example, {enable_thinking: true}."
    require(isinstance(value, Mapping), "", "is not a mapping", value, remedy)
    assert isinstance(value, Mapping)
    for name, given in value.items():
        fine = isinstance(name, str) and re.fullmatch(r"[^\W\d]\w*", name)
        require(fine, "", "has a name that no variable can have", name, remedy)
        what = f"cannot set `{name}`, which evomerge sets itself"
        require(name not in RESERVED, "", what, given, "Remove it.")
        try:
            json.dumps(given, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            what = f"has a value of `{name}` that JSON cannot hold"
            require(False, "", what, given, "Use texts, numbers, true, false, lists or mappings.")
    return dict(value)


def _reasoning(value: object) -> object:
    """The marks of thoughts as a section; `auto` and null as they are."""
    if value is None or value == "auto" or isinstance(value, ReasoningSection):
        return value
    remedy = "Write auto, null, or {start: <think>, end: </think>}."
    require(isinstance(value, Mapping), "", "is neither auto nor null nor two marks", value, remedy)
    assert isinstance(value, Mapping)
    wrong = [key for key in value if key not in ReasoningSection.model_fields]
    require(not wrong, "", "has an unknown key", wrong[:1], remedy)
    texts = [value.get("start"), value.get("end")]
    fine = all(isinstance(text, str) and text.strip() for text in texts)
    require(fine, "", "needs a start and an end", dict(value), remedy)
    require(texts[0] != texts[1], "", "has the same start and end", texts[0], remedy)
    return ReasoningSection(**value)


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
    # not in its repr, by which older versions have named what inferences were made from
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(_template_kwargs)] = Field(
        default={},
        repr=False,
        description="With format chat: variables of the chat template, such as "
        "{enable_thinking: true}.",
    )
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
            self.format == "chat" or not self.chat_template_kwargs,
            "chat_template_kwargs",
            "applies only to `format: chat`",
            self.chat_template_kwargs,
            "Set that format, or remove them.",
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


class ReasoningSection(Section):
    """The marks around what a model thinks before it answers."""

    start: Text = Field(description="What a reply begins with, or the prompt ends with.")
    end: Text = Field(description="What stands between thoughts and answer.")


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
    # not in its repr: see `chat_template_kwargs`
    reasoning: Annotated[
        ReasoningSection | Literal["auto"] | None,
        BeforeValidator(
            _reasoning,
            json_schema_input_type=ReasoningSection | Literal["auto"] | None,
        ),
    ] = Field(
        default="auto",
        repr=False,
        description="The marks of a model's thoughts, which no judge sees and which are kept apart "
        "from the answer. auto: `<think>` and `</think>`, or what else the tokenizer or its chat "
        "template has; null: a reply is the answer as a whole.",
    )

    @model_validator(mode="after")
    def _check_stop(self) -> Self:
        remedy = "Remove it: an empty text would end every answer."
        require(all(self.stop), "stop", "contains an empty text", self.stop, remedy)
        return self

    def made_from(self) -> dict[str, Any]:
        """What of the settings a reply depends on, as plain values.

        Not `reasoning`, which only decides how the reply is read.
        """
        return self.model_dump(exclude={"reasoning"})
