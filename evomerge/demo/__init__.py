"""The demo pair: a tiny Llama and its fine-tuned sibling, trained on the spot, with tasks.

Six skills on short strings of kana or digits. The base knows all six in a plain format and follows
instructions for three of them. The sibling is an ordinary fine-tune with an ordinary side effect:
its lower half learned to follow instructions for the other three, then its upper half was tuned for
brevity and now cuts two of the base's skills down to one character. Each parent therefore lacks
something, and what is worth keeping is in different slices: no single weight for all layers gets
everything. How this setup was found: docs/LOG.md.
"""

from evomerge.demo.pair import STUDY, build_demo
from evomerge.demo.skills import SKILLS, make_tasks

__all__ = ["SKILLS", "STUDY", "build_demo", "make_tasks"]
