"""A tiny real model that grades: any server that loads a Llama folder can serve it, and what it
says hangs on what it read.

Written by hand, not trained. One layer attends to all bytes alike; how many of each of SEEN there
are decides which digit 1 to 5 comes next, and after a digit comes the end. A server that forces
JSON gets a digit as the reason and as the grade, for a quote comes second.
"""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>"]
POSITIONS = 8192
WIDTH = 64
# hardly any of them stands in the rubric, and the number of an answer's fence is made of them
SEEN = "bcf06789"
CONSTANT, DIGIT = 0, 1  # two places of the hidden state: 1 in every token, 1 in the digits alone


def byte_tokenizer():
    """One token for each byte of UTF-8."""
    vocab = {
        token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    return tokenizer


@torch.no_grad()
def save_judge(folder, seed=0):
    """Save model and tokenizer to `folder`."""
    tokenizer = byte_tokenizer()
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    layer, embed, head = (
        model.model.layers[0],
        model.model.embed_tokens.weight,
        model.lm_head.weight,
    )
    for matrix in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.down_proj):
        matrix.weight.zero_()  # equal attention to all that was read; no MLP
    digits = [tokenizer.convert_tokens_to_ids(str(d)) for d in range(1, 6)]
    embed.zero_()
    embed[tokenizer.convert_tokens_to_ids(list(SEEN)), 2:] = torch.randn(len(SEEN), WIDTH - 2)
    embed[:, CONSTANT], embed[:, DIGIT] = 1.0, 0.0
    embed[digits, DIGIT] = 8.0
    layer.self_attn.v_proj.weight.normal_()
    layer.self_attn.v_proj.weight[:, [CONSTANT, DIGIT]] = 0.0
    layer.self_attn.o_proj.weight.normal_()
    layer.self_attn.o_proj.weight[[CONSTANT, DIGIT]] = 0.0
    head.zero_()
    head[:, CONSTANT] = -50.0
    head[digits, CONSTANT], head[digits, DIGIT] = 50.0, -200.0
    head[digits, 2:] = torch.randn(5, WIDTH - 2)
    head[2, DIGIT] = 50.0
    head[tokenizer.convert_tokens_to_ids('"'), CONSTANT] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
