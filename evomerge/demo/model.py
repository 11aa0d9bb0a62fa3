"""The demo pair's architecture: a character tokenizer and a Llama of 0.9 million parameters."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evomerge.demo.skills import EOS, SKILLS

PAD, UNK = "<pad>", "<unk>"
CHARACTERS = {
    *map(chr, range(ord("ぁ"), ord("ん") + 1)),
    *"0123456789",
    *"".join(SKILLS),
    *"指示回答:=、。\n「」 ",
}
VOCABULARY = [PAD, EOS, UNK, *sorted(CHARACTERS)]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}回答:{{ message['content'] }}{{ eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] }}\n"
    "{% else %}指示:{{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}回答:{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, with the pair's chat template."""
    ids = {symbol: i for i, symbol in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    # Any: its constructor has no annotations
    make: Any = PreTrainedTokenizerFast
    fast: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=256,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(seed: int) -> LlamaForCausalLM:
    """An untrained model; the global random state is left as it was."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=VOCABULARY.index(PAD),
        eos_token_id=VOCABULARY.index(EOS),
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
