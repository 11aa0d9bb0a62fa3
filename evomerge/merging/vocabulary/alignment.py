"""Models with different tokens in one merge: the output's tokenizer, and each token's rows.

The rules are those of mergekit 0.1.5 (`tokenizer_source`, `tokenizer`). Row i of an output tensor
is a model's own row for token i where the model has that token. Where it does not, and for tokens
that `tokens:` forces, it is the default row: what `tokens:` says; else the row of the only model
that has the token, the base's row, the mean of the models that have it, or zeros. A head's bias
has an entry for each row and follows the same rules. mergekit numbers the tokens that a union adds
in an order that changes from run to run; here it is each model's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch

from evomerge.errors import ModelError, RecipeError
from evomerge.merging.checkpoints.model_folder import ModelFolder
from evomerge.merging.vocabulary.tokenizers import (
    Rule,
    load_tokenizers,
    move_ids,
    owner_of,
    read_rules,
    read_tokenizer,
    unite,
    vocab_size,
)
from evomerge.recipe import TokenizerSection

# instead of a row: the model lacks the token; it has the token, beyond the end of its embeddings
LACKING, BEYOND = -1, -2
ZEROS, MEAN = -1, -2  # instead of a donor


@dataclass(frozen=True)
class Defaults:
    """The rows that some model takes from elsewhere, (rows,) each unless said otherwise."""

    ids: torch.Tensor  # output rows, ascending
    donor: torch.Tensor  # position of the donor among the models, ZEROS or MEAN
    row: torch.Tensor  # the donor's row
    forced: torch.Tensor  # (output rows,) bool


@dataclass(frozen=True)
class Vocabulary:
    """The output's tokenizer, and per model the row of each of its tokens, (tokens,) int64."""

    tokenizer: Any
    tokens: tuple[str, ...]  # by output row
    size: int  # rows of the output's embeddings: the tokens, padded
    rows: Mapping[str, torch.Tensor]
    rules: Mapping[int, Rule]  # output row -> rule
    base: str | None
    owner: str | None = None  # the model whose tokenizer it is, unchanged

    def save(self, folder: Path) -> None:
        """The tokenizer's files, as transformers writes them. Raises OSError."""
        self.tokenizer.save_pretrained(str(folder))

    def move_ids(self, settings: Any, model: str) -> Any:
        """Settings in which `model`'s ids of special tokens are the output's; lost ones go."""
        return move_ids(settings, self.rows[model].tolist())

    def align(
        self, tensors: Mapping[str, torch.Tensor], base: str | None = None
    ) -> dict[str, torch.Tensor]:
        """One vocabulary tensor of each model, (model rows, ...) -> (size, ...).

        They come back in the dtype that holds them all; one that needs no new row is returned
        unchanged, or as a view. The models must come in the order of the slice's sources: a mean is
        summed in it. `base` is the slice's base where that is not the recipe's. Raises ModelError
        and RecipeError where a row that is needed does not exist.
        """
        self._check_tensors(tensors)
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
        defaults = self._defaults(tuple(tensors), base or self.base)
        table = self._table(tensors, defaults, dtype)
        aligned = {}
        for ref, tensor in tensors.items():
            aligned[ref] = self._moved(ref, tensor.to(dtype), defaults, table)
        return aligned

    def _check_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        widths = next(iter(tensors.values())).shape[1:]
        for ref, tensor in tensors.items():
            if tensor.shape[1:] != widths:
                raise ModelError(
                    "the embeddings' widths differ",
                    where=ref,
                    found=tuple(tensor.shape),
                    remedy="Merge models of the same width.",
                )
            if int(self.rows[ref].max()) >= len(tensor):
                raise ModelError(
                    f"config.json's `vocab_size` exceeds the {len(tensor)} rows of the embeddings",
                    where=ref,
                    remedy="Correct config.json.",
                )

    def keeps(self, model: str) -> bool:
        """Whether every token of the output has the row that it has in `model`."""
        return model in self._in_place

    def check_rules(self, models: Sequence[str], base: str | None = None) -> None:
        """Raise RecipeError where `align` of these models' tensors would, whatever the tensors."""
        self._defaults(tuple(models), base or self.base)

    def _defaults(self, refs: tuple[str, ...], base: str | None) -> Defaults:
        """The default row of each token that some model lacks or that is forced."""
        rows = torch.stack([self.rows[ref] for ref in refs])  # (models, tokens)
        if (rows == BEYOND).any():
            model, token = (rows == BEYOND).nonzero()[0].tolist()
            raise RecipeError(
                f"token {self.tokens[token]!r} has an id beyond the end of the model's embeddings",
                where=refs[model],
                remedy="Name another tokenizer source, or add the row to the model.",
            )
        present = rows >= 0
        count = present.sum(0)
        donor = present.to(torch.uint8).argmax(0)  # the first that has the token
        several = count > 1
        if base in refs:
            at = refs.index(base)
            donor[present[at]] = at
            several &= ~present[at]
        donor[several] = MEAN
        donor[count == 0] = ZEROS
        row = rows.gather(0, donor.clamp_min(0).unsqueeze(0)).squeeze(0)
        forced = torch.zeros_like(several)
        for token, rule in self.rules.items():
            forced[token] = rule.force
            if rule.force or not present[:, token].all():
                donor[token], row[token] = self._ruled(rule, refs, rows[:, token])
        ids = (forced | ~present.all(0)).nonzero().squeeze(1)
        return Defaults(ids, donor[ids], row[ids], forced)

    def _ruled(self, rule: Rule, refs: tuple[str, ...], rows: torch.Tensor) -> tuple[int, int]:
        """(donor, row) by a rule; `rows` has the token's row in each model."""
        if rule.model is None:
            return ZEROS, LACKING
        where = f"tokenizer.tokens[{rule.token!r}]"
        if rule.model not in refs:
            raise RecipeError(
                "the model does not contribute to this tensor",
                where=where,
                found=rule.model,
                remedy="Name one of the slice's models.",
            )
        at = refs.index(rule.model)
        row = rule.row
        if row is None:
            row = int(rows[at])
        if row < 0:
            raise RecipeError(
                "the model lacks this token",
                where=where,
                found=rule.model,
                remedy="Name a model that has it.",
            )
        return at, row

    def _table(
        self, tensors: Mapping[str, torch.Tensor], defaults: Defaults, dtype: torch.dtype
    ) -> torch.Tensor:
        """The default rows, (len(defaults.ids), ...)."""
        first = next(iter(tensors.values()))
        table = first.new_zeros((len(defaults.ids), *first.shape[1:]), dtype=dtype)
        mean = (defaults.donor == MEAN).nonzero().squeeze(1)
        count = torch.zeros(len(table), dtype=torch.int64)
        for at, (ref, tensor) in enumerate(tensors.items()):
            given = (defaults.donor == at).nonzero().squeeze(1)
            self._check_given(given, defaults, ref, len(tensor))
            _put(table, given, tensor, defaults.row[given])
            rows = self.rows[ref][defaults.ids[mean]]
            # From zero and model by model, for mergekit's rounding: a sum in the working dtype is
            # not associative.
            owned = mean[rows >= 0]
            count[owned] += 1
            _put(table, owned, tensor, rows[rows >= 0], add=True)
        for n in set(count.tolist()) - {0}:
            owned = (count == n).nonzero().squeeze(1).to(table.device)
            table[owned] = table[owned] / n
        return table

    def _check_given(self, given: torch.Tensor, defaults: Defaults, ref: str, size: int) -> None:
        """Raise RecipeError where a rule names a row past the end of the model's `size` rows."""
        if len(given) and int(defaults.row[given].max()) >= size:
            token = self.tokens[int(defaults.ids[given[defaults.row[given].argmax()]])]
            raise RecipeError(
                f"`token_id` exceeds the {size} rows of {ref}",
                where=f"tokenizer.tokens[{token!r}]",
                found=int(defaults.row[given].max()),
                remedy="Name a row that exists.",
            )

    def _moved(
        self, ref: str, tensor: torch.Tensor, defaults: Defaults, table: torch.Tensor
    ) -> torch.Tensor:
        """(size, ...): the model's own rows, default rows in their places, mean rows at the end."""
        rows, n = self.rows[ref], len(self.tokens)
        new = (defaults.forced[defaults.ids] | (rows[defaults.ids] < 0)).nonzero().squeeze(1)
        if not len(new) and self.size == n and self.keeps(ref):
            return tensor if len(tensor) == n else tensor[:n]
        out = tensor.new_empty((self.size, *tensor.shape[1:]))
        torch.index_select(tensor, 0, rows.clamp_min(0).to(tensor.device), out=out[:n])
        out.index_copy_(
            0, defaults.ids[new].to(out.device), table.index_select(0, new.to(out.device))
        )
        if self.size > n:
            # the mean row for new tokens: https://nlp.stanford.edu/~johnhew/vocab-expansion.html
            out[n:] = out[:n].mean(dim=0)
        return out

    @cached_property
    def _in_place(self) -> frozenset[str]:
        """The models whose rows already lie as in the output."""
        same = torch.arange(len(self.tokens))
        return frozenset(ref for ref, rows in self.rows.items() if torch.equal(rows, same))


def _put(
    table: torch.Tensor,
    places: torch.Tensor,
    tensor: torch.Tensor,
    rows: torch.Tensor,
    add: bool = False,
) -> None:
    """Copy (or add) rows of a tensor into places of the table; no place comes twice."""
    moved = tensor.index_select(0, rows.to(tensor.device)).to(table.dtype)
    places = places.to(table.device)
    if add:
        moved = table.index_select(0, places) + moved
    table.index_copy_(0, places, moved)


def make_vocabulary(
    section: TokenizerSection, base: str | None, models: Mapping[str, ModelFolder]
) -> Vocabulary:
    """The output's vocabulary; without a base the first model's tokenizer serves as the base's.

    Raises ModelError when a tokenizer cannot be loaded, RecipeError when `tokens` is wrong or the
    tokens cannot be numbered.
    """
    first = base if base is not None else next(iter(models))
    sizes = {ref: vocab_size(model) for ref, model in models.items()}
    tokenizers = load_tokenizers(first, models)
    if section.source == "base":
        tokenizer = tokenizers[first]
    elif section.source == "union":
        tokenizer = unite(tokenizers, sizes)
    elif section.source in models:
        tokenizer = read_tokenizer(models[section.source].path, section.source)
    else:
        tokenizer = read_tokenizer(section.source.partition("+")[0], section.source)
    # With `source: base` this changes the base's own tokenizer, so that the base's padding rows
    # become the tokens': as in mergekit.
    present = tokenizer.get_vocab()
    tokenizer.add_tokens([token for token in section.tokens if token not in present])
    vocab = tokenizer.get_vocab()
    owned = {ref: tok.get_vocab() for ref, tok in tokenizers.items()}
    multiple = section.pad_to_multiple_of or 1
    return Vocabulary(
        tokenizer=tokenizer,
        tokens=_by_row(vocab, section.source),
        size=-(-len(vocab) // multiple) * multiple,
        rows={ref: _rows(vocab, owned.get(ref, owned[first]), size) for ref, size in sizes.items()},
        rules=read_rules(section.tokens, vocab, owned, sizes),
        base=base,
        owner=owner_of(vocab, owned, section.source, first),
    )


def _by_row(vocab: Mapping[str, int], source: str) -> tuple[str, ...]:
    """The tokens by their numbers. Raises RecipeError when the numbers have gaps."""
    tokens = [""] * len(vocab)
    for token, number in vocab.items():
        if number >= len(vocab):
            raise RecipeError(
                f"the tokenizer's ids have gaps: token {token!r} of {len(vocab)} has id {number}",
                where=source,
                remedy="Name another tokenizer source.",
            )
        tokens[number] = token
    return tuple(tokens)


def _rows(vocab: Mapping[str, int], owned: Mapping[str, int], size: int) -> torch.Tensor:
    """(tokens,) int64: each output token's row in a model of `size` rows, LACKING or BEYOND."""
    rows = [LACKING] * len(vocab)
    for token, number in vocab.items():
        row = owned.get(token, LACKING)
        rows[number] = row if row < size else BEYOND
    return torch.tensor(rows)
