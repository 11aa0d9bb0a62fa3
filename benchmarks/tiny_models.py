"""Tiny random models of every type that transformers can make, as folders with tokenizers."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

LAYERS, HIDDEN, VOCABULARY = 4, 32, 128
LARGEST = 12_000_000  # parameters
# what a tiny model has, by the names that configurations give it
SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "layers"), LAYERS),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "depth"), LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "dim"), HIDDEN),
    **dict.fromkeys(("word_embed_proj_dim", "d_embed", "embedding_size"), HIDDEN),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "mlp_dim"), 64),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    **dict.fromkeys(("head_dim", "global_head_dim", "attention_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 16),
    **dict.fromkeys(("hidden_size_per_layer_input", "time_step_rank"), 8),
    **dict.fromkeys(("sliding_window", "attention_window_size"), 64),
    **dict.fromkeys(("image_size", "patch_size"), 16),
    "first_k_dense_replace": 1,
    "lru_width": HIDDEN,
    "out_hidden_size": HIDDEN,
    "output_proj_dims": HIDDEN,
    "spatial_merge_size": 2,
    "num_position_embeddings": 16,
    "mamba_d_ssm": 64,
    "mamba_expand": 2,
    "num_kv_shared_layers": 0,
    "index_topk": 8,
    "index_n_heads": 4,
    "index_head_dim": 8,
}


TOKENS = ("pad", "bos", "eos", "unk", "sep", "cls", "decoder_start")
# what some types need besides, tried one after the other until a model runs
ENDS = {"pad_token_id": 0, **{f"{token}_token_id": 1 for token in TOKENS[1:]}}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    ENDS,
    {**ENDS, "rope_parameters": MROPE},
    {"rope_parameters": MROPE},
    {"num_key_value_heads": 4, "rope_parameters": MROPE},
    {"num_key_value_heads": 4, "head_dim": 16},
    {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    {"attn_layer_indices": [1, 3]},
    {"layer_types": ["linear_attention", "full_attention"] * 2},
    {"layer_types": ["mamba", "attention"] * 2},
    {"layer_types": ["conv", "full_attention"] * 2},
    {"num_heads": 8, "head_dim": 8},
    {"rotary_dim": 4},
    {"attention_types": [[["global", "local"], 2]]},
    {**ENDS, "num_key_value_heads": 4},
    {"layer_types": ["mamba", "hybrid"] * 2},
    {"n_shared_experts": 1},
)


def tiny_config(model_type: str) -> Any:
    """The type's configuration with small numbers; raises what the type's model raised."""
    default = CONFIG_MAPPING[model_type]()
    failure: Exception | None = None
    for more in VARIANTS:
        try:
            config = _shrunk(type(default), default, more)
            with torch.device("meta"):
                empty = model_for(config)
            numbers = sum(parameter.numel() for parameter in empty.parameters())
            if numbers > LARGEST:
                raise ValueError(f"a tiny model still has {numbers / 1e6:.0f} M parameters")
            model = model_for(config).eval()
            model(input_ids=torch.tensor([[5, 6, 7, 8]]))
            return config
        except Exception as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _shrunk(cls: Any, default: Any, more: dict[str, Any]) -> Any:
    known = {**dict.fromkeys(inspect.signature(cls.__init__).parameters)}
    known.update(default.to_dict())
    settings: dict[str, Any] = {}
    for key, size in SIZES.items():
        if key in known and not isinstance(known[key], list | dict):
            settings[key] = size
    for key in known:
        if key.endswith("_token_id") or key in ("image_token_index", "video_token_index"):
            settings[key] = 3 if not key.startswith(TOKENS) else None
    for key, value in known.items():
        if isinstance(value, list) and len(value) >= LAYERS and key.endswith("layer_types"):
            settings[key] = _cut(value)
    for name in getattr(cls, "sub_configs", {}):
        inner = getattr(default, name, None)
        if inner is not None:
            settings[name] = _shrunk(type(inner), inner, more).to_dict()
    for key, value in more.items():
        if key in known:
            settings[key] = copy.deepcopy(value)  # configurations change what they are given
    return cls(**settings)


def _cut(kinds: list[Any]) -> list[Any]:
    """As many layers as a tiny model has, with every kind among them; the last one stays last."""
    rare = list(dict.fromkeys(kinds))[:LAYERS]
    filled = (kinds[: LAYERS - len(rare)] + rare)[-LAYERS:]
    return filled


def make_tiny(config: Any, folder: Path, seed: int) -> None:
    """A random model of the configuration, in bfloat16, saved as transformers saves it."""
    torch.manual_seed(seed)
    model = model_for(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05)
    for name, buffer in model.named_buffers():
        if name in model.state_dict() and buffer.is_floating_point() and not buffer.isinf().any():
            buffer.data.add_(torch.rand_like(buffer) * 0.01)
    model.to(torch.bfloat16)
    model.generation_config = transformers.GenerationConfig(eos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def model_for(config: Any) -> Any:
    """A model with random weights of the class that writes text."""
    from evomerge.merging.architecture.empty_model import model_class

    return model_class(config).from_config(config)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of the first characters of ASCII, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "<image>": 3}
    for code in range(32, 127):
        vocabulary[chr(code)] = len(vocabulary)
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    wrapped.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return wrapped
