"""The keys of a recipe other than its sources: method, base, dtypes, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.errors import RecipeError, UnsupportedRecipe
from evomerge.recipe.layers import TokenizerSection
from evomerge.recipe.mergekit_keys import CHAT_TEMPLATES, DTYPES, KEYS, MERGEKIT
from evomerge.recipe.method_traits import METHODS
from evomerge.recipe.model_references import model_reference, tokenizer_of
from evomerge.recipe.modules import Listed
from evomerge.recipe.own_methods import find_method
from evomerge.recipe.unread_keys import UnreadKeys


def check_top_level(data: Any, where: str, unread: UnreadKeys, folder: Path | None) -> str:
    """Check the top level's keys and note those that nothing reads; return the merge method.

    The file of a user's own method is relative to `folder`. Raises RecipeError naming the key,
    UnsupportedRecipe where only mergekit itself can help.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(
            "is not a mapping of keys",
            where=where,
            found=data,
            remedy="Write a mergekit configuration.",
        )
    unread.check(data, KEYS, where)
    return _method(data, where, folder)


def read_base(data: Mapping[str, Any], merged: Listed, method: str, where: str) -> str | None:
    """The base model. Raises RecipeError where the method needs one and nothing names it."""
    base, by_slice = data.get("base_model"), merged.kind == "slices"
    if base is not None:
        return model_reference(base, "`base_model`", where)
    for item in merged.items:
        by_slice = by_slice and isinstance(item, Mapping) and bool(item.get("base_model"))
    if METHODS[method].needs_base and not by_slice:
        raise RecipeError(
            "`base_model` is missing",
            where=where,
            remedy="Name the model that the siblings were fine-tuned from.",
        )
    return None


def read_dtype(data: Mapping[str, Any], key: str, where: str) -> str | None:
    """`dtype` or `out_dtype`, which may be written torch.bfloat16. Raises UnsupportedRecipe."""
    given = data.get(key)
    if given is None:
        return None
    name = given
    if isinstance(given, str):
        name = given.removeprefix("torch.")
    if name not in DTYPES:
        raise UnsupportedRecipe(
            f"`{key}` is not supported",
            where=where,
            found=given,
            remedy=f"Use {', '.join(DTYPES)}.",
        )
    return str(name)


def read_chat_template(data: Mapping[str, Any], where: str) -> str | None:
    """`auto`, the name of a built-in template, or a template. Raises RecipeError."""
    given = data.get("chat_template")
    if given is None or given == "":
        return None
    if not isinstance(given, str) or ("{" not in given and given not in ("auto", *CHAT_TEMPLATES)):
        raise RecipeError(
            "`chat_template` is not a template",
            where=where,
            found=given,
            remedy=f"Write auto, one of {', '.join(CHAT_TEMPLATES)}, or the template in Jinja.",
        )
    return given


def read_tokenizer_section(
    data: Mapping[str, Any], where: str, unread: UnreadKeys
) -> TokenizerSection | None:
    """`tokenizer_source: X`, or mergekit's `tokenizer: {source, tokens, pad_to_multiple_of}`.

    Raises RecipeError.
    """
    section, source = data.get("tokenizer"), data.get("tokenizer_source")
    if source is not None and section is not None:
        raise RecipeError(
            "has both `tokenizer` and `tokenizer_source`", where=where, remedy="Keep one of them."
        )
    if source is not None:
        return TokenizerSection(tokenizer_of(source, "`tokenizer_source`", where), {}, None)
    if section is None:
        return None
    return _tokenizer_section(section, where, unread)


def _method(data: Mapping[str, Any], where: str, folder: Path | None) -> str:
    method = data.get("merge_method")
    if not isinstance(method, str):
        raise RecipeError(
            "`merge_method` is missing",
            where=where,
            found=method,
            remedy=f"Use {', '.join(METHODS)}.",
        )
    method = find_method(method, folder, where)
    if method not in METHODS:
        raise UnsupportedRecipe(
            "`merge_method` is not supported",
            where=where,
            found=method,
            remedy=f"Use {', '.join(METHODS)}, or FILE.py:FUNCTION. {MERGEKIT}",
        )
    return method


def _tokenizer_section(section: Any, where: str, unread: UnreadKeys) -> TokenizerSection:
    if not isinstance(section, Mapping):
        raise RecipeError(
            "`tokenizer` is not a mapping",
            where=where,
            found=section,
            remedy="Write tokenizer: {source: union}.",
        )
    unread.check(section, ("source", "tokens", "pad_to_multiple_of"), f"{where}, tokenizer")
    source = tokenizer_of(section.get("source", "union"), "`tokenizer.source`", where)
    tokens = section.get("tokens") or {}
    pad = section.get("pad_to_multiple_of")
    if not isinstance(tokens, Mapping):
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
    rules = {}
    for token, item in tokens.items():
        rules[str(token)] = _rule(item, f"{where}, tokenizer.tokens[{token!r}]", unread)
    return TokenizerSection(source, rules, pad)


def _rule(item: Any, where: str, unread: UnreadKeys) -> Any:
    """One of `tokens:` without what nothing reads; its values are checked with the tokenizers."""
    if not isinstance(item, Mapping):
        return item
    unread.check(item, ("source", "force"), where)
    rule = {key: item[key] for key in ("source", "force") if key in item}
    source = item.get("source")
    if not isinstance(source, Mapping):
        return rule
    if "kind" not in source:
        rule["source"] = model_reference(source, "`source`", where)
        return rule
    keys = ["kind"]
    if source["kind"] == "model_token":
        keys += ["model", "token", "token_id"]
    unread.check(source, keys, where)
    rule["source"] = {key: source[key] for key in keys if source.get(key) is not None}
    if isinstance(source.get("model"), Mapping) and source["kind"] == "model_token":
        rule["source"]["model"] = model_reference(source["model"], "`source.model`", where)
    return rule
