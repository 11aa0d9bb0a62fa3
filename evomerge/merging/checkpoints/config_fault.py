"""Which key of a config.json transformers cannot make a model of."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from evomerge.errors import ModelError
from evomerge.merging.architecture.empty_model import model_class, stored_number, without_attention

LONGEST = 200  # characters of transformers' own words
_FIELD = re.compile(r"Validation error for field '(\w+)'")
_BEFORE = re.compile(r"\A(?:Class v|V)alidation error for \w+ '\w+': \w+: ")
_NAMED = re.compile(r"`(\w+)`")
# as transformers calls it, and as older files do, whose key then counts
_FORMER = {"rope_parameters": "rope_scaling", "dtype": "torch_dtype"}


def made_without_weights(config: Mapping[str, Any]) -> Any:
    """transformers' model of a config.json, on torch's meta device.

    Raises what transformers raises: KeyError, TypeError and others.
    """
    import torch
    from transformers import AutoConfig

    plain = json.loads(json.dumps(config), object_hook=stored_number)
    settings = without_attention(plain)  # a kernel of the hub would be loaded
    parsed = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        return model_class(parsed).from_config(parsed)


def check_config(config: Mapping[str, Any], where: object = None) -> None:
    """Raise ModelError naming the key, as far as it is known, where no model can be made."""
    try:
        made_without_weights(config)
    except Exception as error:  # by what is wrong in the file
        raise config_error(config, error, where) from error


def config_error(config: Mapping[str, Any], error: Exception, where: object = None) -> ModelError:
    """What transformers has raised at a config.json, as a line about the key that is at fault."""
    from transformers import CONFIG_MAPPING

    named = config.get("model_type")
    if not isinstance(named, str) or named not in CONFIG_MAPPING:
        return ModelError(
            "transformers does not know the `model_type` in config.json",
            where=where,
            found=named,
            remedy="Correct it, or install a version of transformers that has it.",
        )
    if isinstance(error, ImportError):
        needed = " ".join(str(error).split()).split(". ")[0][:LONGEST]
        return ModelError(
            f"transformers lacks a package for the model: {needed}",
            where=where,
            remedy="Install it.",
        )
    reason = _BEFORE.sub("", " ".join(str(error).split())).split(". Errors: ")[0][:LONGEST]
    if isinstance(error, KeyError) and " " not in reason:
        reason = f"transformers has no {reason}"
    path = _named_path(config, str(error)) or _trial(json.dumps(config))
    if path is None:
        return ModelError(
            f"transformers cannot make a model of config.json: {reason}",
            where=where,
            remedy="Correct it, or copy the model's file again.",
        )
    return ModelError(
        f"`{'.'.join(path)}` in config.json cannot be used: {reason}",
        where=where,
        found=_at(config, path),
        remedy="Correct it, or copy the model's file again.",
    )


def _named_path(config: Mapping[str, Any], text: str) -> tuple[str, ...] | None:
    """The key that an error's words name."""
    by_key = {path[-1]: path for path in reversed(list(_paths(config)))}
    for name in (*_FIELD.findall(text), *_NAMED.findall(text)):
        for key in (_FORMER.get(name), name):
            if key in by_key:
                return by_key[key]
    return None


@lru_cache(maxsize=4)
def _trial(text: str) -> tuple[str, ...] | None:
    """The first key without which transformers makes a model."""
    for path in _paths(json.loads(text)):
        config = json.loads(text)
        del _at(config, path[:-1])[path[-1]]
        try:
            made_without_weights(config)
        except Exception:  # another key's fault
            continue
        return path
    return None


def _paths(config: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The keys of a configuration, those of its parts first."""
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, Mapping):
            for inner in value:
                yield key, inner
    for key in config:
        if key not in ("model_type", "architectures"):
            yield (key,)


def _at(config: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    found: Any = config
    for key in path:
        found = found[key]
    return found
