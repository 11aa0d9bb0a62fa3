"""The interface of engines: an engine takes the weights of a recipe and answers prompts.

A capability that only some engines have is an attribute that holds an object or None; see below.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from evomerge.answering.thoughts import Marks
    from evomerge.genome.genome import Genome
    from evomerge.merging.checkpoints.model_folder import ModelFolder
    from evomerge.recipe import Recipe
    from evomerge.study import EngineSection, GenerationSection, Study

T = TypeVar("T")
Watch = Callable[[int, int], None]  # (finished answers, new tokens) of the current batch
# one per prompt; None: the engine's defaults for all of them
PromptSettings: TypeAlias = "Sequence[GenerationSection] | None"
# a prompt's index in the batch, and its answer, as soon as it has ended
OnAnswer = Callable[[int, "Answer"], None]
Pairs: TypeAlias = "Sequence[tuple[str, str]]"  # a prompt, and the text that follows it


@dataclass(frozen=True)
class Answer:
    """What the model said to one prompt.

    `truncated` is True when `max_new_tokens` or a deadline ended it, not an end token or a stop
    string; `tokens` counts new tokens, those of thoughts included. `thoughts` are what the model
    wrote before the answer, and amid it, with their marks; `thought_tokens` is None where no marks
    are known.
    """

    text: str
    truncated: bool
    tokens: int
    thoughts: str = ""
    thought_tokens: int | None = None

    @property
    def answer_tokens(self) -> int:
        """The new tokens of the answer alone."""
        return self.tokens - (self.thought_tokens or 0)

    @property
    def whole(self) -> str:
        """The whole reply as the model wrote it, but with thoughts amid the answer before it."""
        return self.thoughts + self.text


@dataclass(frozen=True)
class EngineSpec:
    """Everything an engine is built from.

    Without siblings the model answers as it is on disk and `apply` is not available. `too_long`
    says what happens to a prompt that leaves no room for its answer in the context.
    """

    base: ModelFolder
    siblings: Sequence[ModelFolder]
    engine: EngineSection
    generation: GenerationSection
    dtype: str  # a torch name, such as bfloat16
    seed: int = 0
    too_long: Literal["refuse", "truncate"] = "refuse"

    @classmethod
    def of_study(
        cls, study: Study, base: ModelFolder, siblings: Sequence[ModelFolder]
    ) -> EngineSpec:
        """The engine that a study names, on these models."""
        return cls(
            base=base,
            siblings=siblings,
            engine=study.engine,
            generation=study.generation,
            dtype=study.search.dtype,
            seed=study.search.seed,
            too_long=study.prompt.too_long,
        )


@dataclass(frozen=True, eq=False)
class NextTokens:
    """A model's distributions of each of a text's n tokens, cut to the k likeliest, on the CPU.

    tokens, logprobs (n, k). The rest of a distribution counts as one more token.
    """

    tokens: Tensor
    logprobs: Tensor


@dataclass(frozen=True)
class LikelihoodGradient:
    """The log-likelihood of references at one vector, and its gradient.

    With teachers, minus the divergence from them in its place.
    """

    values: tuple[float, ...]  # each text's mean per token, in nats
    gradient: tuple[float, ...]  # (d,): the derivative of the mean of `values`

    @property
    def mean(self) -> float:
        """The mean over texts, in nats per token."""
        return sum(self.values) / len(self.values)


class BatchedCandidatesCapability(Protocol):
    """Answers for many candidates in one pass; the live model keeps its weights."""

    def suits(self, recipes: Sequence[Recipe]) -> bool:
        """Whether these recipes can share a pass."""

    def is_faster(self, candidates: int, prompts: int) -> bool:
        """Whether one pass is known to be faster than one candidate after another."""

    def __call__(
        self, recipes: Sequence[Recipe], prompts: Sequence[str], settings: PromptSettings = None
    ) -> list[list[Answer]]:
        """Every candidate's answers, [candidate][prompt].

        Raises RecipeError for a recipe that does not suit, EngineError as `Engine.answer` does.
        """


class GradientCapability(Protocol):
    """The gradient of the references' log-likelihood with respect to a genome's vector."""

    def __call__(
        self,
        genome: Genome,
        vector: Sequence[float],
        pairs: Pairs,
        teachers: Sequence[NextTokens] | None = None,
    ) -> LikelihoodGradient:
        """The value and gradient at `vector`, (d,), over (prompt, reference) pairs.

        With `teachers`, one for each pair, the value is minus the divergence of the model's
        distributions from the teacher's, KL(teacher || model), in place of the log-likelihood. The
        live model has the vector's weights afterwards. Raises StudyFileError for a genome that is
        not linear in its vector, EngineError when one pair does not fit into memory.
        """

    def teachers(self, recipe: Recipe, pairs: Pairs) -> list[NextTokens]:
        """The recipe's distributions of the tokens that a gradient of these pairs looks at.

        The live model has the recipe's weights afterwards. Raises EngineError.
        """


class LikelihoodCapability(Protocol):
    """The likelihood of continuations of prompts under the model with its current weights."""

    @property
    def model(self) -> Any:
        """The live transformers model itself, which lm-eval wraps."""

    def __call__(self, pairs: Pairs) -> list[float]:
        """log P(continuation | prompt) of each pair, summed over its tokens, in nats.

        Raises EngineError when one pair does not fit into memory.
        """

    def count_tokens(self, pairs: Pairs) -> list[int]:
        """The number of tokens that each continuation has."""


class Engine(Protocol):
    """One loaded model whose weights are replaced in place between candidates.

    `tokenizer` is the model's, from transformers. `context` is the number of positions it has, None
    if unknown. `limits` holds what memory has forced, such as a smaller `batch_tokens`: a search
    stores it and restores it on resume. `watch`, if set, is called while a batch is answered.
    `marks` are those of its model's thoughts, None where it has none.
    """

    tokenizer: Any
    context: int | None
    limits: dict[str, int]
    watch: Watch | None

    @property
    def marks(self) -> Marks | None: ...

    @property
    def batched_candidates(self) -> BatchedCandidatesCapability | None: ...

    @property
    def gradient(self) -> GradientCapability | None: ...

    @property
    def likelihood(self) -> LikelihoodCapability | None: ...

    def apply(self, recipe: Recipe) -> None:
        """Give the live model the recipe's weights, computed from the untouched base."""

    def batches(self, prompts: Sequence[str], settings: PromptSettings = None) -> list[list[int]]:
        """Which prompts share a batch, by index: a function of prompts and settings alone.

        Raises EngineError.
        """

    def answer(
        self,
        prompts: Sequence[str],
        settings: PromptSettings = None,
        on_answer: OnAnswer | None = None,
        deadline: float | None = None,
    ) -> list[Answer]:
        """Answer the prompts of one batch, in order; in parts if `limits` require it.

        A prompt is the whole text the model sees, special tokens included as text. `on_answer` is
        called as soon as an answer has ended by itself. At `deadline`, a time.monotonic(),
        unfinished answers end with what they have and `on_answer` is not called for them; one that
        was not started is empty, and both are truncated. Raises EngineError.
        """


def items_at(items: Sequence[T], indices: Iterable[int]) -> list[T]:
    """The items with these indices, in their order."""
    return [items[i] for i in indices]


def settings_of_each(
    prompts: Sequence[str], settings: PromptSettings, default: GenerationSection
) -> Sequence[GenerationSection]:
    """One per prompt: `settings` where they are given, else the engine's defaults."""
    if settings is None:
        return [default] * len(prompts)
    return settings


def without_thoughts(prompt: str, engine: Engine) -> str:
    """The prompt as a reference follows it: thoughts that the chat template begins are ended."""
    if engine.marks is None:
        return prompt
    return engine.marks.closed(prompt)


def has_passed(deadline: float | None) -> bool:
    """Whether the deadline, a time.monotonic(), has passed; None never does."""
    return deadline is not None and time.monotonic() >= deadline
