"""The tokenizers of models to merge, and a recipe's rules for single tokens.

Tokenizers are cut to their embeddings and united, all with the meaning of mergekit 0.1.5.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import ModelError, RecipeError
from evomerge.merging.architecture.text_config import text_config
from evomerge.merging.checkpoints.config_defaults import config_value
from evomerge.merging.checkpoints.folder_files import check_links
from evomerge.merging.checkpoints.model_folder import ModelFolder
from evomerge.merging.vocabulary.tokenizer_files import FILES, open_tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rule:
    """The rule that `tokens:` gives for one token: `model`'s row for it, or that model's row `row`.

    No model means zeros.
    """

    token: str
    model: str | None
    row: int | None
    force: bool  # also in the models that have the token


def load_tokenizers(first: str, models: Mapping[str, ModelFolder]) -> dict[str, Any]:
    """Every model's tokenizer, `first`'s before the others and cut to its embeddings.

    A model without tokenizer files is left out: its tokens are assumed to be those of `first`.
    Raises ModelError when a tokenizer cannot be loaded, RecipeError when one that is not a BPE
    would have to be cut.
    """
    tokenizer = read_tokenizer(models[first].path, first)
    found = {first: _cut(tokenizer, vocab_size(models[first]), first)}
    for ref, model in models.items():
        if ref == first:
            continue
        if any((model.path / name).is_file() for name in FILES):
            found[ref] = read_tokenizer(model.path, ref)
        else:
            log.warning("%s has no tokenizer: its tokens are assumed to be those of %s", ref, first)
    return found


def read_tokenizer(path: str | Path, ref: str) -> Any:
    """A folder's (or hub model's) tokenizer. Raises ModelError."""
    name, revision = str(path), None
    if Path(path).is_dir():
        check_links(Path(path))
    elif "@" in name:
        name, revision = name.split("@", 1)
    return open_tokenizer(name, ref, revision=revision or None)


def vocab_size(model: ModelFolder) -> int:
    """Rows of the embeddings by config.json. Raises ModelError."""
    size = config_value(text_config(model.config), "vocab_size")
    if not isinstance(size, int):
        raise ModelError(
            "config.json has no `vocab_size`",
            where=model.path,
            found=size,
            remedy="Add it: the number of rows of the embeddings.",
        )
    return size


def owner_of(
    vocab: Mapping[str, int], owned: Mapping[str, Mapping[str, int]], source: str, first: str
) -> str | None:
    """The model that the output's tokenizer comes from, where it has the same tokens."""
    owner = first if source in ("base", "union") else source
    return owner if owned.get(owner) == vocab else None


def move_ids(settings: Any, rows: Sequence[int]) -> Any:
    """A config.json's or generation_config.json's content with ids of the output's tokens.

    `rows` has the row of each of these in the model of the settings. An id whose token the output
    lacks is left out of a list, and is null alone.
    """
    moved = {row: number for number, row in enumerate(rows) if row >= 0}
    if not isinstance(settings, Mapping) or all(row == moved[row] for row in moved):
        return settings
    changed = dict(settings)
    for key, value in settings.items():
        if not key.endswith("_token_id"):
            continue
        if isinstance(value, list):
            changed[key] = [moved[number] for number in value if number in moved]
        elif isinstance(value, int) and value >= 0:
            changed[key] = moved.get(value)
    return changed


def unite(tokenizers: Mapping[str, Any], sizes: Mapping[str, int]) -> Any:
    """The first tokenizer plus every token that another has within its embeddings' `sizes`.

    Plain tokens come before those that some model holds as added tokens; within each kind they are
    ordered by model and by number.
    """
    plain: dict[str, None] = {}
    added: dict[str, Any] = {}  # the first model's settings (special, strip) of a token hold
    for ref, tokenizer in tokenizers.items():
        vocab = tokenizer.get_vocab()
        for token in sorted(vocab, key=vocab.__getitem__):
            if vocab[token] < sizes[ref]:
                plain[token] = None
        for number, token in sorted(tokenizer.added_tokens_decoder.items()):
            if number < sizes[ref]:
                added.setdefault(token.content, token)
    first = next(iter(tokenizers.values()))
    present = first.get_vocab()
    with tempfile.TemporaryDirectory() as folder:
        # A copy by way of its files, as mergekit makes it: loading adds special tokens again that
        # were cut off.
        first.save_pretrained(folder)
        united = read_tokenizer(folder, "the union's tokenizer")
    missing = []
    for token in plain:
        if token not in added and token not in present:
            missing.append(token)
    # In one call: token by token, each call would rebuild the matcher of the added ones.
    united.add_tokens(missing)
    united.add_tokens(list(added.values()))
    return united


def read_rules(
    tokens: Mapping[str, Any],
    vocab: Mapping[str, int],
    owned: Mapping[str, Mapping[str, int]],
    models: Iterable[str],
) -> dict[int, Rule]:
    """The checked form of `tokens`, {token: {source, force}}, by output row.

    A source is a model, {kind: zero} or {kind: model_token, …}. Raises RecipeError.
    """
    rules = {}
    for token, item in tokens.items():
        where = f"tokenizer.tokens[{token!r}]"
        if token not in vocab:
            raise RecipeError("cannot be a token", where=where, remedy="Write the token's text.")
        source, force = _source_and_force(item, where)
        if source is None:
            continue  # only makes sure that the token exists
        model, row = source, None
        if isinstance(source, Mapping):
            model, row = _from_kind(source, where, owned)
        if model is not None and model not in models:
            raise RecipeError(
                "`source` is not a model of the recipe",
                where=where,
                found=model,
                remedy="Name a model, or {kind: zero}.",
            )
        rules[vocab[token]] = Rule(token, model, row, force)
    return rules


def _source_and_force(item: Any, where: str) -> tuple[Any, bool]:
    """A rule's `source`, of any kind, and its `force`."""
    if (
        not isinstance(item, Mapping)
        or not item.keys() <= {"source", "force"}
        or not isinstance(item.get("force", False), bool)
    ):
        raise RecipeError(
            "is malformed", where=where, found=item, remedy="Write {source: MODEL, force: false}."
        )
    source, force = item.get("source"), item.get("force", False)
    if force and source is None:
        raise RecipeError(
            "`force` needs a `source`", where=where, remedy="Name a model, or {kind: zero}."
        )
    return source, force


def _cut(tokenizer: Any, size: int, ref: str) -> Any:
    """The tokenizer without the tokens that have no row in the embeddings.

    Raises RecipeError when it would have to be cut and is not a fast BPE.
    """
    unused = {token for token, number in tokenizer.get_vocab().items() if number >= size}
    if not unused:
        return tokenizer
    state = {}
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = state.get("model", {}).get("type", "no fast tokenizer")
    if kind != "BPE":
        raise RecipeError(
            f"the tokenizer has {len(unused)} tokens beyond the {size} rows of the embeddings, and "
            "only a BPE tokenizer can be cut",
            where=ref,
            found=kind,
            remedy="Remove the tokens, or add rows to the model.",
        )
    from tokenizers import Tokenizer

    bpe = state["model"]
    for token in unused:
        bpe["vocab"].pop(token, None)
    prefix = bpe.get("continuing_subword_prefix") or ""
    kept = []
    for merge in bpe["merges"]:
        a, b = merge.split(" ") if isinstance(merge, str) else merge
        # A merge into a token that is cut is removed too; mergekit fails there.
        if unused.isdisjoint((a, b, a + b.removeprefix(prefix))):
            kept.append((a, b))
    bpe["merges"] = kept
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < size]
    try:
        # what backend_tokenizer shows; it has no setter
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    except Exception as error:  # the library raises plain Exceptions
        raise ModelError(
            f"the tokenizer cannot be cut to {size} rows: {error}",
            where=ref,
            remedy="Remove the tokens beyond them.",
        ) from error
    return tokenizer


def _from_kind(
    source: Mapping[str, Any], where: str, owned: Mapping[str, Mapping[str, int]]
) -> tuple[Any, int | None]:
    """(model, row) of {kind: zero}, or of {kind: model_token, model, and token_id or token}."""
    if dict(source) == {"kind": "zero"}:
        return None, None
    model, token = source.get("model"), source.get("token")
    row = source.get("token_id", owned.get(str(model), {}).get(str(token), -1))
    if (
        source.get("kind") != "model_token"
        or len(source) != 3
        or ("token_id" in source) == ("token" in source)
        or type(row) is not int
    ):
        raise RecipeError(
            "`source` is malformed",
            where=where,
            found=dict(source),
            remedy="Write {kind: model_token, model: MODEL, token: TOKEN}.",
        )
    if row < 0:
        raise RecipeError(
            f"{model} has no such token",
            where=where,
            found=token if "token" in source else row,
            remedy="Name a token that it has.",
        )
    return model, row
