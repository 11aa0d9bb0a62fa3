"""The architectures that mergekit 0.1.5 describes, and what it merges with the last slice there.

This is not the list of what can be merged. In any other architecture mergekit takes everything
outside the layers from the first slice.
"""

from __future__ import annotations

NORM_AND_HEAD = ("model.norm.", "lm_head.")
_LIKE_LLAMA = (
    "Apertus",
    "Arcee",
    "Baichuan",
    "Cohere",
    "Cohere2",
    "Gemma",
    "Gemma2",
    "Gemma3",
    "Glm4",
    "Glm4Moe",
    "Granite",
    "GraniteMoeHybrid",
    "LLaMa",
    "Llama",
    "Mistral",
    "Mixtral",
    "Olmo2",
    "Phi3",
    "Phi3Small",
    "Qwen2",
    "Qwen3",
    "Qwen3Moe",
    "Solar",
    "StableLMEpoch",
    "StableLm",
    "Starcoder2",
)
# class -> the beginnings of the names that follow the last slice
LAST_SLICE: dict[str, tuple[str, ...]] = {
    **{f"{family}ForCausalLM": NORM_AND_HEAD for family in _LIKE_LLAMA},
    "AfmoeForCausalLM": NORM_AND_HEAD,
    "ExaoneForCausalLM": ("transformer.ln_f.", "lm_head."),
    "FalconForCausalLM": ("transformer.ln_f.", "lm_head."),
    "GPT2LMHeadModel": ("transformer.ln_f.", "lm_head."),
    "GPTBigCodeForCausalLM": ("transformer.ln_f.", "lm_head."),
    "GPTNeoXForCausalLM": ("gpt_neox.final_layer_norm.", "embed_out."),
    "InternLM2ForCausalLM": ("model.norm.", "output."),
    "JAISLMHeadModel": ("transformer.ln_f.",),
    "Lfm2ForCausalLM": ("lm_head.",),
    "MambaForCausalLM": ("backbone.norm_f.", "lm_head."),
    "PhiForCausalLM": ("model.final_layernorm.", "lm_head."),
    "QWenLMHeadModel": ("transformer.ln_f.", "lm_head."),
}
