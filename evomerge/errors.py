"""Errors that a user can cause or meet, each printed as one line.

    EvomergeError                 exit 1
    ├── InputError                exit 2: something the user wrote or named
    │   ├── StudyFileError        the study file: unknown key, wrong value
    │   ├── StudyError            a study by name: unknown, changed, busy
    │   ├── RecipeError           a mergekit configuration
    │   │   └── UnsupportedRecipe a valid one that only mergekit itself can merge
    │   ├── ModelError            a model folder: missing, damaged, of another shape
    │   ├── TaskError             a task file or dataset
    │   └── KnowledgeError        the Excel base
    └── RunError                  exit 1: something that happened while running
        ├── EngineError           the model could not be loaded or could not answer
        │   └── PromptRefused     a server refused one prompt; others may be answered
        ├── JudgeError            the judge could not grade: the run stops, all recorded
        │   └── JudgePaused       exit 3: a budget is spent, or grades are missing
        └── OutputError           a full disk, no permission

A line reads ``where: what (found: value). remedy``; passwords in URLs are masked in all of it.
"""

from __future__ import annotations

from evomerge.masking import masked


class EvomergeError(Exception):
    """The root; `where`, `found` and `remedy` are optional parts of the line."""

    exit_code = 1

    def __init__(
        self, what: str, *, where: object = None, found: object = None, remedy: str | None = None
    ) -> None:
        line = what
        if where is not None:
            line = f"{where}: {what}"
        if found is not None:
            line += f" (found: {_short(found)})"
        if remedy is not None:
            line = f"{line.rstrip('.')}. {remedy}"
        super().__init__(masked(" ".join(line.split())))
        self.what, self.where, self.found, self.remedy = what, where, found, remedy


class InputError(EvomergeError):
    """Something the user wrote or named is wrong."""

    exit_code = 2


class StudyFileError(InputError):
    """A key or value of the study file."""


class StudyError(InputError):
    """A study that is unknown, has changed, or is in use."""


class RecipeError(InputError):
    """A mergekit configuration that is wrong or not supported."""


class UnsupportedRecipe(RecipeError):
    """A configuration that `evomerge merge` leaves to mergekit."""


class ModelError(InputError):
    """A model that is missing, damaged, or does not fit its siblings."""


class TaskError(InputError):
    """A task file or dataset."""


class KnowledgeError(InputError):
    """An Excel knowledge base."""


class RunError(EvomergeError):
    """Something that went wrong while running."""


class EngineError(RunError):
    """The model could not be loaded or could not answer."""


class PromptRefused(EngineError):
    """A server refused one prompt, which is too long or not to its content filter's liking."""


class JudgeError(RunError):
    """The judge failed; a run stops, and everything so far is recorded."""


class JudgePaused(JudgeError):
    """Grades are missing: everything so far is recorded, and the same command resumes."""

    exit_code = 3


class OutputError(RunError):
    """A result could not be written."""


def _short(value: object, limit: int = 80) -> str:
    text = masked(repr(value))  # before it is cut: half a URL is not recognised
    if len(text) > limit:
        tail = limit // 2  # the end of a path says more than its middle
        text = text[: limit - tail - 1] + "…" + text[-tail:]
    return text
