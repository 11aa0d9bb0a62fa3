"""`objective:` what is maximised: a weighted sum, or two to four objectives at once."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from evomerge.study.engine_keys import EngineSection
from evomerge.study.judge_keys import JudgeSection
from evomerge.study.prompt_keys import TaskSource
from evomerge.study.search_keys import SearchSection
from evomerge.study.section import STORED, Section, Text, Weight, as_tuple, require

FEWEST, MOST = 2, 4  # objectives
PLAIN = ("grade", "correct", "answer_tokens", "thought_tokens", "length", "likelihood")
SOURCE, GROUP = "tasks:", "group:"  # begin the name of a group of tasks
KNOWN = f"{', '.join(PLAIN)}, {SOURCE}FILE or {GROUP}KIND"
Names = Annotated[tuple[Text, ...], BeforeValidator(as_tuple)]


class ObjectiveSection(Section):
    """What is maximised: a weighted sum of an answer's parts, or several objectives at once.

    Each is recorded for every trial. The weights and the lists exclude each other.
    """

    grade: Weight = Field(default=1.0, description="Weight of judge.metric.")
    length: Weight = Field(
        default=0.0,
        description="Weight of the answer's share of max_new_tokens, 0 to 1, without thoughts; "
        "below 0: shorter is better.",
    )
    likelihood: Weight = Field(
        default=0.0,
        description="Weight of the reference's mean log-likelihood per token, in nats; only with "
        "transformers.",
    )
    maximize: Names = Field(
        default=(),
        description="Instead of weights, two to four objectives here and in minimize, whose best "
        f"compromises are searched: {KNOWN}. The last two are judge.metric on the tasks of one "
        "file (its name without the ending) or dataset, and on those of one kind.",
    )
    minimize: Names = Field(default=(), description="The objectives of which less is better.")

    @property
    def several(self) -> tuple[str, ...]:
        """The names of several objectives, those to maximize first; () with weights."""
        return (*self.maximize, *self.minimize)

    @property
    def signs(self) -> dict[str, float]:
        """Each of several objectives, and what makes more of it better: 1 or -1."""
        return dict.fromkeys(self.maximize, 1.0) | dict.fromkeys(self.minimize, -1.0)

    @property
    def needs_likelihood(self) -> bool:
        """Whether the references' likelihood is a part of it."""
        return bool(self.likelihood) or "likelihood" in self.several

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        weighted = self.grade or self.length or self.likelihood
        require(weighted, "", "has no part with a weight", None, "Give one part a weight.")
        return self

    @model_validator(mode="after")
    def _check_lists(self, info: ValidationInfo) -> Self:
        if not self.several:
            return self
        weights = self.model_fields_set & {"grade", "length", "likelihood"}
        require(
            info.context is STORED or not weights,
            "",
            "has both weights and objectives to maximize or minimize",
            sorted(weights),
            "Keep one of the two.",
        )
        for name in self.several:
            near = difflib.get_close_matches(name, PLAIN, n=1)
            remedy = f"Did you mean {near[0]}?" if near else f"Use {KNOWN}."
            is_group = name.startswith((SOURCE, GROUP)) and not name.endswith(":")
            require(name in PLAIN or is_group, "", "names no objective", name, remedy)
        twice = [name for name, count in Counter(self.several).items() if count > 1]
        require(not twice, "", "names an objective twice", ", ".join(twice), "Remove one of them.")
        require(
            FEWEST <= len(self.several) <= MOST,
            "",
            f"needs {FEWEST} to {MOST} objectives in maximize and minimize together",
            list(self.several),
            "Add or remove some; `judge.metric` alone needs none.",
        )
        return self


def source_names(sources: Sequence[TaskSource]) -> list[str]:
    """What the tasks' sources are called: a file without its ending, the last part of a dataset."""
    names = []
    for source in sources:
        place = PurePath(source.file or source.dataset or source.name or "")
        names.append(place.stem if source.file else place.name)
    return names


def check_objective(
    objective: ObjectiveSection,
    sources: Sequence[TaskSource],
    search: SearchSection,
    judge: JudgeSection,
    engine: EngineSection,
) -> None:
    """The rules between `objective` and the other sections."""
    wanted = "likelihood" if "likelihood" in objective.several else objective.likelihood
    need = "needs `engine.kind: transformers`"
    holds = not objective.needs_likelihood or engine.kind == "transformers"
    require(holds, "objective.likelihood", need, wanted, "Change one of them.")
    if not objective.several:
        return
    names = source_names(sources)
    for name in objective.several:
        if name.startswith(SOURCE):
            count = names.count(name.removeprefix(SOURCE))
            what = f"names {count or 'none'} of the task sources"
            remedy = f"Use one of {', '.join(SOURCE + known for known in dict.fromkeys(names))}."
            if count > 1:
                remedy = "Give each file a name of its own."
            require(count == 1, "objective", what, name, remedy)
    weights = [source.weight for source in sources]
    several = "cannot be combined with several objectives"
    require(len(set(weights)) == 1, "tasks", f"with weights {several}", weights, "Remove them.")
    raced, paid = search.ranking == "race", judge.kind == "cascade"
    require(not raced, "search.ranking", several, "race", "Use subset or all.")
    require(not paid, "judge.kind", several, "cascade", "Use llm or learned.")
    require(search.patience is None, "search.patience", several, search.patience, "Remove it.")
