"""LoRA adapters that peft saved, merged into the tensors of their base as these are read."""
