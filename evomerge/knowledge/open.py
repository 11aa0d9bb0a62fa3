"""The base that a study's prompts are made with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from evomerge.knowledge.read_base import Knowledge, read_knowledge
from evomerge.knowledge.classification.by_model import ModelClassifier
from evomerge.knowledge.chooser import Chooser

if TYPE_CHECKING:
    from evomerge.study import PromptSection


def open_knowledge(
    prompt: PromptSection,
    say: Callable[[str], None],
    classify: str = "neighbours",
    by_model: Callable[[Knowledge], ModelClassifier] | None = None,
) -> Chooser | None:
    """What chooses classes and examples, if there is a base; `by_model` makes what classifies by a
    model.

    Raises KnowledgeError, and InputError for a retriever that is not there.
    """
    if prompt.knowledge is None:
        return None
    knowledge = read_knowledge(prompt.knowledge)
    model = None if by_model is None else by_model(knowledge)
    threshold, default = prompt.threshold, prompt.default_class
    return Chooser(
        knowledge,
        prompt.retriever,
        classify=classify,
        by_model=model,
        threshold=threshold,
        default=default,
        say=say,
    )
