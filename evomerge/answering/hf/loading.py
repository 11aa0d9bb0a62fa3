"""Loading a model and its tokenizer with transformers: devices, 4 bits, errors."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from evomerge.errors import EngineError, ModelError
from evomerge.merging.architecture.empty_model import empty_model, model_class
from evomerge.merging.checkpoints.hub_kernels import refuse_hub_kernels
from evomerge.merging.checkpoints.model_folder import ModelFolder
from evomerge.merging.checkpoints.model_kind import blame_config
from evomerge.merging.checkpoints.open_model import INDEX, SINGLE
from evomerge.merging.checkpoints.stored_forms import check_shapes
from evomerge.merging.device_memory import is_out_of_memory
from evomerge.merging.vocabulary.tokenizer_files import open_tokenizer
from evomerge.study import EngineSection

FILES = (SINGLE, INDEX)  # by which transformers finds weights


class LazyTensor:
    """A tensor of a folder that transformers' loader reads when it comes to it.

    It does as a slice of a safetensors file, which it has in this place otherwise.
    """

    def __init__(self, folder: ModelFolder, name: str) -> None:
        self.folder, self.name = folder, name

    def __getitem__(self, which: object) -> torch.Tensor:
        """The part that is asked for, mostly `...`."""
        part: torch.Tensor = self.folder.get_tensor(self.name)[which]  # type: ignore[index]
        return part


def context_of(config: Any) -> int | None:
    """How many tokens the model has positions for."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def load_tokenizer(folder: ModelFolder, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, padding on the left; a missing pad token becomes the end token.

    Raises ModelError.
    """
    tokenizer: PreTrainedTokenizerBase = open_tokenizer(
        str(folder.path),
        folder.path,
        "Add the tokenizer's files.",
        trust_remote_code=trust_remote_code,
    )
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = 10**9  # prompts that are too long get our own error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has neither a pad nor an end token",
                where=folder.path,
                remedy="Set one in tokenizer_config.json.",
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    folder: ModelFolder, engine: EngineSection, dtype: torch.dtype, merged: bool = False
) -> Any:
    """The folder's model in `dtype`, ready to answer.

    It is on the section's device, spread by its device_map, or in 4 bits. Files in fp8 or mxfp4 are
    dequantised where the model will be `merged`; else transformers decides by the device. It is a
    PreTrainedModel, whose own annotations hide `generate`. Raises EngineError: it does not fit the
    device, or bitsandbytes is missing. ModelError: transformers cannot load it, or would run code
    of the hub.
    """
    trusted = engine.trust_remote_code
    if not trusted:
        refuse_hub_kernels(folder.config, folder.path)
    transformers_logging.disable_progress_bar()  # our own progress lines show what takes time
    device = engine.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device_map: Any = engine.device_map
    quantization = _quantization(engine)
    if device_map is None and (quantization is not None or device != "cpu"):
        # tensor by tensor: the model is never held as a whole unquantised, nor by the host
        device_map = {"": device}
    _choose_attention()
    try:
        settings = {
            "dtype": dtype,
            "device_map": device_map,
            "allow_all_kernels": trusted,
            "quantization_config": quantization,
        }
        model = _load(folder, trusted, merged, settings)
    except ModelError:
        raise
    except Exception as error:  # many kinds of errors, none of them ours
        if is_out_of_memory(error):
            raise EngineError(
                "the model does not fit the device",
                where=folder.path,
                found=device,
                remedy="Use engine.device_map: auto.",
            ) from error
        blame_config(folder.config, folder.path)
        check_shapes(folder)
        raise ModelError(
            f"transformers cannot load the model: {' '.join(str(error).split())[:400]}",
            where=folder.path,
            remedy="Check config.json.",
        ) from error
    model.eval()
    return model


def _choose_attention() -> None:
    """Have torch choose among its own kernels of scaled dot-product attention, not cuDNN's.

    On Hopper it would take cuDNN's wherever there is a mask, which plans anew for every length of
    the keys: 23 to 37 ms at each step of an answer.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.backends.cuda.enable_math_sdp(True)


def _load(folder: ModelFolder, trusted: bool, merged: bool, settings: dict[str, Any]) -> Any:
    config: Any = AutoConfig.from_pretrained(str(folder.path), trust_remote_code=trusted)
    is_found = any((folder.path / file).is_file() for file in FILES)
    requantized = settings["quantization_config"] is not None
    if not is_found or (folder.is_dequantized and (merged or requantized)):
        return _from_tensors(folder, config, settings)
    return model_class(config).from_pretrained(
        str(folder.path),
        config=config,
        trust_remote_code=trusted,
        use_safetensors=True,
        **settings,
    )


def _from_tensors(folder: ModelFolder, config: Any, settings: dict[str, Any]) -> Any:
    """The model with the folder's tensors as we read them, one at a time.

    transformers would dequantise too, but not blocks that are cut off at a weight's edge, as
    DeepSeek-V3 has them. Raises ModelError for a type that transformers does not know.
    """
    made = empty_model(folder.config)
    if made is None:
        raise ModelError(
            "transformers has no such model that could be filled with these weights",
            where=folder.path,
            found=folder.config.get("model_type"),
            remedy="Write a plain folder first: `evomerge merge` with this model alone and "
            "`merge_method: passthrough`.",
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    tensors = {name: LazyTensor(folder, name) for name in folder.keys}
    model = type(made).from_pretrained(None, config=config, state_dict=tensors, **settings)
    if (folder.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder.path))
    return model


def _quantization(engine: EngineSection) -> BitsAndBytesConfig | None:
    """How the live model is quantised: NF4, computed in bfloat16.

    Raises EngineError without bitsandbytes.
    """
    if engine.quantization is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise EngineError(
            "a 4-bit model needs bitsandbytes",
            where="engine.quantization",
            found=engine.quantization,
            remedy="Run pip install 'evomerge[4bit]'.",
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=engine.quantization == "4bit-double",
    )
