"""What a key means that config.json leaves out: the default of transformers' class."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any


def config_value(config: Mapping[str, Any], key: str) -> Any:
    """The value in the file; where there is none, the class's default for such a model.

    None for a model type that transformers does not know. The import of transformers takes a
    second or more, so it waits until a key is missing.
    """
    value = config.get(key)
    if value is not None:
        return value
    from transformers import CONFIG_MAPPING

    try:
        made: Any = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(dict(config)))
    except Exception:  # KeyError, TypeError and others, by what is wrong in the file
        return None
    return getattr(made, key, None)
