"""The architectures whose tensors outside the layers mergekit knows."""

from __future__ import annotations

# The architectures that mergekit 0.1.5 describes. In others it takes everything outside the layers
# from the first slice.
FAMILIES = [
    "Apertus",
    "Arcee",
    "Baichuan",
    "Cohere",
    "Cohere2",
    "Gemma",
    "Gemma2",
    "Gemma3",
    "Glm4",
    "Granite",
    "LLaMa",
    "Llama",
    "Mistral",
    "Olmo2",
    "Phi3",
    "Phi3Small",
    "Qwen2",
    "Qwen3",
    "Solar",
    "StableLMEpoch",
    "StableLm",
    "Starcoder2",
]
KNOWN = frozenset(f"{family}ForCausalLM" for family in FAMILIES)
