"""Tiny models with tokenizers of their own, and rows of the embeddings by a plain loop."""

from types import SimpleNamespace

import torch
from conftest import make_model
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
ROWS = (*EMBEDDINGS, "lm_head.bias")  # the tensors with a row for each token
LETTERS = "abcdefgh"


def word_level(words):
    """A tokenizer whose tokens are `words`, after <unk>."""
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<unk>", *words])}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def byte_pairs(pairs):
    """A BPE over LETTERS with the merges `pairs`."""
    vocab = {token: i for i, token in enumerate(["<unk>", *LETTERS, *(a + b for a, b in pairs)])}
    backend = Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def adding(tokenizer, plain=(), special=()):
    """The tokenizer with added tokens; special ones are stripped on their left."""
    tokenizer.add_tokens(list(plain))
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False, lstrip=True) for token in special]
    )
    return tokenizer


def save_with(tokenizer, folder, seed, rows=None, dtype=torch.bfloat16, tied=False):
    """A model of one layer with random embeddings, negative zeros among them; `rows` of them, or
    one per token.
    """
    model = make_model(
        seed,
        layers=1,
        vocab_size=rows or len(tokenizer),
        tie_word_embeddings=tied,
        initializer_range=0.5,
    )
    with torch.no_grad():
        for p in model.parameters():
            p.view(-1)[::7] = -0.0
    model.to(dtype).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def save_biased(tokenizer, folder, seed, model_type="phi"):
    """A model whose head has a bias, one row per token: Phi, GPT-J or CodeGen."""
    sizes = dict.fromkeys(("hidden_size", "n_embd"), 32) | {"rotary_dim": 8, "n_head": 4}
    sizes |= dict.fromkeys(("num_hidden_layers", "n_layer"), 1) | {"num_attention_heads": 4}
    config = CONFIG_MAPPING[model_type](
        vocab_size=len(tokenizer), intermediate_size=64, n_positions=64, **sizes
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        p.data.normal_(0, 0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_with_layers_embeddings(tokenizer, folder, seed, model_type, table):
    """Gemma 3n or 4, whose layers get embeddings of the tokens beside the usual ones."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[model_type](
        vocab_size=len(tokenizer),
        vocab_size_per_layer_input=table,
        hidden_size=32,
        hidden_size_per_layer_input=4,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_kv_shared_layers=0,
        **({"laurel_rank": 4} if model_type == "gemma3n_text" else {}),
    )
    model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        p.data.normal_(0, 0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def task_arithmetic(base, siblings, weights):
    """base + sum of w (x - base), every step rounded to the tensors' dtype, the weights too."""
    rounded = torch.tensor(weights, dtype=base.dtype)
    products = [(x - base) * w for x, w in zip(siblings, rounded, strict=True)]
    return base + torch.stack(products).sum(dim=0)


def linear(tensors, weights):
    """The weighted mean in fp32, each product added without being rounded, as mergekit has it."""
    rounded = torch.tensor(weights, dtype=torch.float32)
    total = torch.zeros_like(tensors[0], dtype=torch.float32)
    for tensor, weight in zip(tensors, rounded, strict=True):
        total = torch.addcmul(total, tensor.float(), weight)
    return (total / rounded.sum()).to(tensors[0].dtype)


def section(source="union", tokens=None, pad=None):
    """A recipe's `tokenizer`."""
    return SimpleNamespace(source=source, tokens=tokens or {}, pad_to_multiple_of=pad)


def aligned_by_loop(tensors, rows, rules, base, size):
    """What Vocabulary.align gives, a row and a model at a time; `rules` are (model, row, force) by
    output row.
    """
    dtype = (
        torch.float32 if torch.float32 in {t.dtype for t in tensors.values()} else torch.bfloat16
    )
    n = len(next(iter(rows.values())))
    out = {ref: torch.zeros(size, tensor.shape[1], dtype=dtype) for ref, tensor in tensors.items()}
    for i in range(n):
        owners = [ref for ref in tensors if rows[ref][i] >= 0]
        model, row, force = rules.get(i, (None, None, False))
        if i in rules:
            row = rows[model][i] if model is not None and row is None else row
            default = torch.zeros(1) if model is None else tensors[model][row]
        elif base in owners:
            default = tensors[base][rows[base][i]]
        elif len(owners) == 1:
            default = tensors[owners[0]][rows[owners[0]][i]]
        else:
            default = torch.zeros(1, dtype=dtype)
            for ref in owners:
                default = default + tensors[ref][rows[ref][i]]
            default = default / max(len(owners), 1)
        for ref in tensors:
            out[ref][i] = tensors[ref][rows[ref][i]] if ref in owners and not force else default
    for tensor in out.values():
        tensor[n:] = tensor[:n].mean(dim=0)
    return out
