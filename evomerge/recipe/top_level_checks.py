"""The keys of a recipe other than its sources: method, base, dtypes, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.errors import RecipeError, UnsupportedRecipe
from evomerge.recipe.layers import TokenizerSection
from evomerge.recipe.mergekit_keys import (
    DTYPES,
    KEYS,
    MERGEKIT,
    MERGEKIT_ONLY,
    METHODS,
    check_keys,
)


def check_top_level(data: Any, where: str) -> str:
    """Check the keys that are not sources, parameters or the tokenizer; return the merge method.

    Raises RecipeError naming the key, UnsupportedRecipe where only mergekit itself can help.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(
            "is not a mapping of keys",
            where=where,
            found=data,
            remedy="Write a mergekit configuration.",
        )
    method = _method(data, where)
    for key in MERGEKIT_ONLY:
        if data.get(key):
            raise UnsupportedRecipe(f"`{key}` is not supported", where=where, remedy=MERGEKIT)
    check_keys([key for key in data if key not in MERGEKIT_ONLY], KEYS, where)
    _check_base(data, method, where)
    if bool(data.get("slices")) == bool(data.get("models")):
        raise RecipeError(
            "needs exactly one of `slices` and `models`", where=where, remedy="Keep one of them."
        )
    for key in ("dtype", "out_dtype"):
        if data.get(key) not in (None, *DTYPES):
            raise UnsupportedRecipe(
                f"`{key}` is not supported",
                where=where,
                found=data[key],
                remedy=f"Use {', '.join(DTYPES)}.",
            )
    kind = "slices" if data.get("slices") else "models"
    if not isinstance(data[kind], list):
        raise RecipeError(
            f"`{kind}` is not a list",
            where=where,
            found=data[kind],
            remedy="Write one item per line, each after a dash.",
        )
    return method


def read_tokenizer_section(data: Mapping[str, Any], where: str) -> TokenizerSection | None:
    """`tokenizer_source: X`, or mergekit's `tokenizer: {source, tokens, pad_to_multiple_of}`.

    Raises RecipeError.
    """
    section, source = data.get("tokenizer"), data.get("tokenizer_source")
    if source is not None and section is not None:
        raise RecipeError(
            "has both `tokenizer` and `tokenizer_source`", where=where, remedy="Keep one of them."
        )
    if source is not None:
        if not isinstance(source, str):
            raise RecipeError(
                "`tokenizer_source` is not a name",
                where=where,
                found=source,
                remedy="Write base, union or a model.",
            )
        return TokenizerSection(source, {}, None)
    return None if section is None else _tokenizer_section(section, where)


def _method(data: Mapping[str, Any], where: str) -> str:
    method = data.get("merge_method")
    if not isinstance(method, str):
        raise RecipeError(
            "`merge_method` is missing",
            where=where,
            found=method,
            remedy=f"Use {', '.join(METHODS)}.",
        )
    if method not in METHODS:
        raise UnsupportedRecipe(
            "`merge_method` is not supported",
            where=where,
            found=method,
            remedy=f"Use {', '.join(METHODS)}. {MERGEKIT}",
        )
    return method


def _check_base(data: Mapping[str, Any], method: str, where: str) -> None:
    base, slices = data.get("base_model"), data.get("slices")
    named = isinstance(base, str)
    if not named and slices and isinstance(slices, list):
        # a slice may name its own base
        named = all(isinstance(item, Mapping) and item.get("base_model") for item in slices)
    if METHODS[method].needs_base and not named:
        raise RecipeError(
            "`base_model` is missing",
            where=where,
            remedy="Name the model that the siblings were fine-tuned from.",
        )
    if base is not None and not isinstance(base, str):
        raise RecipeError(
            "`base_model` is not a name",
            where=where,
            found=base,
            remedy="Name a folder or a hub name.",
        )


def _tokenizer_section(section: Any, where: str) -> TokenizerSection:
    if not isinstance(section, Mapping):
        raise RecipeError(
            "`tokenizer` is not a mapping",
            where=where,
            found=section,
            remedy="Write tokenizer: {source: union}.",
        )
    check_keys(section, ("source", "tokens", "pad_to_multiple_of"), f"{where}, tokenizer")
    source = section.get("source", "union")
    tokens = section.get("tokens") or {}
    pad = section.get("pad_to_multiple_of")
    if not isinstance(source, str) or not isinstance(tokens, Mapping):
        raise RecipeError(
            "`tokenizer` is malformed",
            where=where,
            found=section,
            remedy="Write tokenizer: {source: union, tokens: {}}.",
        )
    if pad is not None and (
        not isinstance(pad, int) or isinstance(pad, bool) or not 0 < pad <= 10**6
    ):
        raise RecipeError(
            "`tokenizer.pad_to_multiple_of` is not a number of rows",
            where=where,
            found=pad,
            remedy="Write 64, for example.",
        )
    return TokenizerSection(source, tokens, pad)
