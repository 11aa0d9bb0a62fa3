"""Model families, by name, and the split of families that keeps tuning a judge from testing it.

Two models of one family answer alike, so a judge fitted on one has practically seen the other. A
family is the organisation that trained the model to answer: Shisa's fine-tunes of Llama and Mistral
are one family, since the training data decides how an answer reads. Where the name does not tell,
it is the base's family, and else the organisation or the name itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from hashlib import sha256

# In order: trainers before the bases that they trained on. (family, what its models' names hold)
FAMILIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("shisa", ("shisa",)),
    ("tulu", ("tulu", "olmo")),
    ("hermes", ("hermes",)),
    ("nemotron", ("nemotron",)),
    ("swallow", ("swallow",)),
    ("elyza", ("elyza",)),
    ("cyberagent", ("cyberagent", "calm2", "calm3", "mistral-nemo-japanese")),
    ("karakuri", ("karakuri",)),
    ("ezo", ("axcxept", "-ezo-")),
    ("lightblue", ("lightblue", "karasu")),
    ("arrowpro", ("arrowpro",)),
    ("blue-lizard", ("blue-lizard",)),
    ("rakuten", ("rakuten",)),
    ("zephyr", ("zephyr",)),
    ("starling", ("starling", "openchat")),
    ("wizardlm", ("wizardlm",)),
    ("athene", ("athene",)),
    ("deepseek", ("deepseek",)),
    ("alice", ("alice-v",)),
    ("plamo", ("plamo",)),
    ("llm-jp", ("llm-jp",)),
    ("stockmark", ("stockmark",)),
    ("falcon", ("falcon",)),
    ("xverse", ("xverse",)),
    ("glm", ("glm-4", "chatglm")),
    ("aya", ("aya-", "command-r")),
    ("gemini", ("gemini",)),
    ("gemma", ("gemma",)),
    ("claude", ("claude",)),
    ("gpt", ("gpt-3", "gpt-4", "gpt-5", "gpt-oss", "quasar-alpha")),
    ("phi", ("phi-",)),
    ("qwen", ("qwen", "qwq")),
    ("yi", ("yi-", "yi1.5")),
    ("mistral", ("mistral", "mixtral")),
    ("llama", ("llama",)),
)


def family(model: str) -> str:
    """A model's family by its name: `llama` for `meta-llama__Llama-3.1-8B-Instruct`."""
    name = model.lower()
    for known, marks in FAMILIES:
        if any(mark in name for mark in marks):
            return known
    # an organisation before / or __, or the name up to its first number, where sizes and versions
    # begin
    first = re.split(r"/|__", name.strip("_/"))[0]
    return re.split(r"[-_.~ ]?v?\d", first)[0] or first


def is_tuning(model: str) -> bool:
    """Whether tuning or fitting a judge may use this model; the others test the judge.

    By the first byte of the family's SHA-256: even is tuning. It does not depend on any grade.
    """
    return sha256(family(model).encode()).digest()[0] % 2 == 0


def split_models(models: Iterable[str]) -> tuple[list[str], list[str]]:
    """(models of the tuning families, of the test families), each sorted, without doubles."""
    names = sorted(set(models))
    return list(filter(is_tuning, names)), [name for name in names if not is_tuning(name)]


def wanted_models(which: str) -> Callable[[str | None], bool]:
    """A filter of models by `which`: all, tuning or test. None is a model without a name."""
    if which == "all":
        return lambda model: True
    return lambda model: is_tuning(model or "") == (which == "tuning")
