"""transformers' own model of a configuration, without weights: it says what each tensor is."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

ATTENTION_KEYS = ("attn_implementation", "_attn_implementation")


def knows_type(config: Mapping[str, Any]) -> bool:
    """Whether transformers has the `model_type` that config.json names.

    Most types are a folder of its package. Its import takes a second, and waits for those that are
    none.
    """
    named = config.get("model_type")
    if not isinstance(named, str):
        return False
    package = importlib.util.find_spec("transformers")
    if package is not None and package.origin is not None:
        folder = Path(package.origin).parent / "models" / named
        if named.isidentifier() and folder.is_dir():
            return True
    from transformers import CONFIG_MAPPING

    return named in CONFIG_MAPPING


def empty_model(config: Mapping[str, Any]) -> Any:
    """The model that config.json describes, on torch's meta device (a PreTrainedModel).

    None for a type that transformers does not know or cannot make from the configuration.
    """
    return _empty_model(json.dumps(config, sort_keys=True))


@lru_cache(maxsize=4)
def _empty_model(text: str) -> Any:
    import torch

    with without_warnings():
        made = _parsed(text)
        try:
            with torch.device("meta"):
                model: Any = model_class(made).from_config(made)
            model.tie_weights()
        except Exception:  # KeyError, TypeError and others, by what is wrong in the file
            return None
    return model


def parsed_config(config: Mapping[str, Any]) -> Any:
    """transformers' configuration of a config.json (a PreTrainedConfig), without quantisation.

    None for a type that it does not know or cannot make of the file.
    """
    with without_warnings():
        return _parsed(json.dumps(config, sort_keys=True))


def _parsed(text: str) -> Any:
    from transformers import CONFIG_MAPPING

    # a kernel of the hub would be loaded
    config = without_attention(json.loads(text, object_hook=stored_number))
    config.pop("quantization_config", None)
    try:
        made: Any = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    except Exception:  # as above
        return None
    return made


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Without those of transformers."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def without_attention(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the default attention, in its parts as well."""
    plain: dict[str, Any] = {}
    for key, value in config.items():
        if key in ATTENTION_KEYS:
            continue
        if isinstance(value, dict):
            value = without_attention(value)
        plain[key] = value
    return plain


def stored_number(item: dict[str, Any]) -> Any:
    """transformers writes an infinite number as {"__float__": "Infinity"}."""
    if set(item) == {"__float__"}:
        return float(item["__float__"])
    return item


def model_class(config: Any) -> Any:
    """transformers' Auto class that makes a model which writes text, of its configuration.

    A class for text alone comes first. The class that config.json names decides where both exist.
    """
    fitting = _fitting(type(config))
    named = set(getattr(config, "architectures", None) or [])
    for auto in fitting:
        made = auto._model_mapping[type(config)]
        if not isinstance(made, tuple) and made.__name__ in named:
            return auto
    return fitting[0] if fitting else _auto_classes()[0]


def text_classes(config: Mapping[str, Any]) -> set[str]:
    """The names of transformers' classes that write text, of the type that config.json names."""
    from transformers import CONFIG_MAPPING

    names: set[str] = set()
    if config["model_type"] not in CONFIG_MAPPING:
        return names
    made: Any = CONFIG_MAPPING[config["model_type"]]
    for auto in _fitting(made):
        classes = auto._model_mapping[made]
        for found in classes if isinstance(classes, tuple) else (classes,):
            names.add(found.__name__)
    return names


def _fitting(config_class: type) -> list[Any]:
    return [auto for auto in _auto_classes() if config_class in auto._model_mapping]


def _auto_classes() -> tuple[Any, ...]:
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
    )

    return AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
