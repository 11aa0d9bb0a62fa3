"""evomerge: find the best merge of a base model and its fine-tuned siblings."""

__version__ = "0.2.0"
