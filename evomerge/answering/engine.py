"""What an engine is: something that takes a recipe's weights and answers prompts; and how one is
chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    from evomerge.merging.checkpoints.model_folder import ModelFolder
    from evomerge.recipe import Recipe
    from evomerge.study import EngineSection, GenerationSection

Watch = Callable[[int, int], None]  # (answers that have ended, new tokens) of the batch under way
# each prompt's own; None: the engine's for all
Settings: TypeAlias = "Sequence[GenerationSection] | None"
Got = Callable[[int, "Answer"], None]  # a prompt's place in the batch, and its answer


@dataclass(frozen=True)
class Answer:
    """What the model said to one prompt.

    `truncated` is True when `max_new_tokens`, or a deadline, ended it rather than an end token or a
    stop string; `tokens` counts new tokens.
    """

    text: str
    truncated: bool
    tokens: int


class Engine(Protocol):
    """One loaded model whose weights are replaced in place between candidates.

    `tokenizer` is transformers' of the model. `context`: tokens that it has positions for, None
    where that is not known. `limits` holds what memory has forced, such as a smaller
    `batch_tokens`: a search remembers it and gives it back when it goes on. `watch`, where it is
    set, is called while a batch is answered. `settings` are each prompt's own; None: the engine's
    for all.
    """

    tokenizer: Any
    context: int | None
    limits: dict[str, int]
    watch: Watch | None

    def apply(self, recipe: Recipe) -> None:
        """Give the live model the recipe's weights, computed from the untouched base."""

    def batches(self, prompts: Sequence[str], settings: Settings = None) -> list[list[int]]:
        """Which prompts share a batch, by index: a function of the prompts and the settings alone.
        Raises EngineError.
        """

    def answer(
        self,
        prompts: Sequence[str],
        settings: Settings = None,
        got: Got | None = None,
        deadline: float | None = None,
    ) -> list[Answer]:
        """Answer the prompts of one batch, in their order; what `limits` forbid is answered in
        parts.

        A prompt is the whole text the model sees, special tokens included as text. `got` is called
        as soon as an answer has ended by itself. At `deadline`, a time.monotonic(), answers under
        way end with what they have and `got` is not called for them; one that was not begun is
        empty, and both are truncated. Raises EngineError.
        """


def make_engine(
    base: ModelFolder,
    siblings: Sequence[ModelFolder],
    engine: EngineSection,
    generation: GenerationSection,
    dtype: str,
    seed: int = 0,
    too_long: Literal["refuse", "truncate"] = "refuse",
) -> Engine:
    """The engine that `engine.kind` names, its model loaded. Raises EngineError, and ModelError for
    a model it cannot load.
    """
    if engine.kind == "vllm":
        from evomerge.answering.vllm.engine import VllmEngine

        return VllmEngine(base, siblings, engine, generation, dtype, seed, too_long)
    from evomerge.answering.hf.population import PopulationEngine

    return PopulationEngine(base, siblings, engine, generation, dtype, seed, too_long)


def pack(
    lengths: Sequence[int], new_tokens: int | Sequence[int], rows: int, tokens: int | None = None
) -> list[list[int]]:
    """Indices of prompts of these lengths, longest first, in batches; ties keep their order.

    A batch has at most `rows` prompts, and prompts x (longest + most new_tokens) is at most
    `tokens`, unless it is a single one.
    """
    new = [new_tokens] * len(lengths) if isinstance(new_tokens, int) else new_tokens
    batches: list[list[int]] = []
    longest = most = 0  # of the last batch
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size = len(batches[-1]) + 1 if batches else 1
        if (
            batches
            and size <= rows
            and (tokens is None or size * (longest + max(most, new[i])) <= tokens)
        ):
            batches[-1].append(i)
            most = max(most, new[i])
        else:
            batches.append([i])
            longest, most = lengths[i], new[i]
    return batches
