"""The architectures that mergekit 0.1.5 describes, and what it merges with the last slice there.

This is not the list of what can be merged. In any other architecture mergekit takes everything
outside the layers from the first slice.
"""

from __future__ import annotations

from collections.abc import Iterable

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


# class -> the modules that mergekit sees in it, the text decoder first, and the beginnings of the
# names of all their tensors
_TEXT, _PROJECTOR, _VISION = "text_decoder", "multi_modal_projector", "vision_tower"
_THREE = (_TEXT, _PROJECTOR, _VISION)
_LLAVA = ("language_model.", "multi_modal_projector.")
_QWEN3_VL = ("model.language_model.", "lm_head.", "model.visual.")
MODULES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Gemma3ForConditionalGeneration": (_THREE, (*_LLAVA, "vision_tower.vision_model.")),
    "Mistral3ForConditionalGeneration": (_THREE, (*_LLAVA, "vision_tower.")),
    "Qwen2_5_VLForConditionalGeneration": (
        _THREE,
        ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.", "visual."),
    ),
    "Qwen3VLForConditionalGeneration": (_THREE, _QWEN3_VL),
    "Qwen3VLMoeForConditionalGeneration": (_THREE, _QWEN3_VL),
}


def modules_of(class_name: str, names: Iterable[str]) -> tuple[str, ...]:
    """The modules that mergekit merges in a model of several; none where it cannot.

    It looks for the names that its description has, which another version of transformers may have
    written otherwise.
    """
    modules, known = MODULES.get(class_name, ((), ()))
    return modules if all(name.startswith(known) for name in names) else ()
