"""Adapters that peft makes and merges, to compare with."""

from importlib import import_module

import pytest
import torch
from merging_tools import load_all
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from evomerge.merging.architecture.empty_model import model_class

# settings that are objects while peft trains, and mappings in the file
OBJECTS = {
    "use_bdlora": ("BdLoraConfig", {"match_strict": False}),
    "velora_config": ("VeloraConfig", {}),
    "monteclora_config": ("MontecloraConfig", {}),
}


def class_of(base):
    """AutoModelForCausalLM, as in mergekit, where the type has a class for it."""
    return model_class(AutoConfig.from_pretrained(str(base)))


def peft_adapter(base, out, dtype=torch.float32, **config):
    """An adapter that peft made and saved for `base`, filled with noise."""
    peft = pytest.importorskip(
        "peft", reason="peft cannot be imported: pip install peft", exc_type=ImportError
    )
    torch.manual_seed(0)
    saving = config.pop("save", {})
    for key in config.keys() & OBJECTS.keys():
        kind, more = OBJECTS[key]
        made = getattr(import_module("peft.tuners.lora.config"), kind)
        config[key] = made(**(config[key] | more))
    settings = {
        "r": 4,
        "lora_alpha": 6,
        "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "down_proj"],
    }
    loaded = class_of(base).from_pretrained(str(base))
    model = peft.get_peft_model(loaded, peft.LoraConfig(**(settings | config)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad or "magnitude" in name:
                p.add_(0.3 * torch.randn(p.shape).to(p.dtype))
    model.save_pretrained(out, **saving)
    file = out / "adapter_model.safetensors"
    save_file({name: t.to(dtype) for name, t in load_file(file).items()}, file)
    return str(out)


def merge_with_peft(base, adapter, out):
    """The folder that mergekit makes of base+adapter before it merges."""
    peft = pytest.importorskip(
        "peft", reason="peft cannot be imported: pip install peft", exc_type=ImportError
    )
    model = class_of(base).from_pretrained(str(base), torch_dtype=None, low_cpu_mem_usage=True)
    peft.PeftModel.from_pretrained(
        model, adapter, is_trainable=False
    ).merge_and_unload().save_pretrained(out)
    return load_all(out)


def tensors_of(model):
    tensors = {name: model.get_tensor(name) for name in model.keys}
    for name, tensor in tensors.items():
        assert (model.shape(name), model.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
    return tensors
