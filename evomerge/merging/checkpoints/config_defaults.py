"""What a key means that config.json leaves out: the default of transformers' class."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from evomerge.merging.architecture.text_config import PARTS, text_config

# other keys by which types have a value; transformers' class has it by the first one too
SPELLINGS = {"num_attention_heads": ("n_head", "n_heads", "num_heads", "attention_heads")}


def config_value(config: Mapping[str, Any], key: str) -> Any:
    """The value in the file; where there is none, the class's default for such a model.

    None for a model type that transformers does not know. The import of transformers takes a
    second or more, so it waits until a key is missing.
    """
    value = config.get(key)
    if value is not None:
        return value
    return getattr(_made(config), key, None)


def text_value(config: Mapping[str, Any], key: str) -> Any:
    """The same for the text decoder, of a whole configuration.

    Its class is asked first for what types name differently, and for the decoder's type, which
    neither files of older releases without a part for it state, nor all that have such a part.
    """
    text = text_config(config)
    asked = key in SPELLINGS or key == "model_type"
    if text.get(key) is not None and not asked:
        return text[key]
    made = _text_part(_made(config))
    if made is None and text is not config:
        made = _made(text)
    found = getattr(made, key, None)
    if found is not None:
        return found
    stated = [text.get(name) for name in (key, *SPELLINGS.get(key, ()))]
    return next((value for value in stated if value is not None), None)


def _text_part(made: Any) -> Any:
    """The text decoder's part of a configuration that transformers has made."""
    for part in PARTS:
        inner = getattr(made, part, None)
        if inner is not None:
            return _text_part(inner)
    return made


def _made(config: Mapping[str, Any]) -> Any:
    """transformers' configuration of such a file; None where it cannot be made."""
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
    except Exception:  # KeyError, TypeError and others, by what is wrong in the file
        return None
