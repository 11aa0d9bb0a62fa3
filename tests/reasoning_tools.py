"""Tokenizers and chat templates of models that think."""

from conftest import make_tokenizer
from tokenizers import decoders

from evomerge.answering.thoughts import Marks

SWITCH = (
    "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}"
)
BEGUN = "{% for m in messages %}{{ m.content }}\n{% endfor %}<think>\n"
PLAIN = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
HARMONY = Marks("<|channel|>analysis<|message|>", "<|channel|>final<|message|>")


def thinker(template=SWITCH, more=("<think>", "</think>"), special=()):
    """The tests' tokenizer with these tokens as well."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens(list(more))
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer
