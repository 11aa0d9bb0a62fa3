"""Random mergekit configurations over a family of tiny models: all that a recipe may say, well
mixed.
"""

import random
from collections import Counter
from itertools import pairwise

import torch
from conftest import make_model, save
from merging_tools import moved

from evomerge.merging.open_recipe import open_recipe
from evomerge.merging.stream import MergePlan

SIBLINGS = ("one", "two", "three")
LAYERS = {"deep": 12, "tied": 4}  # with 12, sorted names are not in the layers' order
TINY = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
# on disk: deltas of models that differ in dtype
BOTH = (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16)
FILTERS = (
    "self_attn",
    "mlp",
    "norm",
    "embed",
    "lm_head",
    "q_proj",
    "layers.1.",
    "layers.1",
    "weight",
    "*",
)
WORDS = {
    True: [True, 1, 1.0, "yes", "TRUE", "on", "1"],
    False: [False, 0, 0.0, "no", "False", "off", "n"],
}


def make_families(folder):
    """deep/ and tied/, each with base, one, two and three; the bases hold negative zeros."""
    for name, layers in LAYERS.items():
        base = make_model(layers, layers=layers, tie_word_embeddings=name == "tied", **TINY)
        with torch.no_grad():
            for p in base.parameters():
                p.view(-1)[::7] = -0.0
        models = [base, *(moved(base, i + 1, 0.1) for i in range(len(SIBLINGS)))]
        for ref, model, dtype in zip(
            ("base", *SIBLINGS), models, BOTH if name == "tied" else BOTH[:1] * 4, strict=True
        ):
            save(model.to(dtype), folder / name / ref)


def label(plan, name):
    """By what mergekit orders its tensors: the last of the names under which they lie in the
    models.
    """
    return max(source for _, source in plan.tensors[name].inputs)


def drawn_elsewhere(recipe):
    """Tensors whose random numbers we may not draw where mergekit does.

    Where several tensors have one label, because a layer repeats, mergekit's order among them hangs
    on the slots of a hash table.
    """
    plan = MergePlan(recipe, open_recipe(recipe))
    drawn = [name for name in plan.names if plan.tensors[name].draws]
    times = Counter(label(plan, name) for name in drawn)
    return {name for name in drawn if times[label(plan, name)] > 1}


class Writer:
    """Writes one random configuration; the same seed writes the same."""

    def __init__(self, seed, folder):
        self.random = random.Random(seed)
        self.family = self.random.choice(["deep", "deep", "tied"])
        self.layers, self.folder = LAYERS[self.family], folder / self.family
        self.method = self.random.choice(
            ["task_arithmetic", "ties", "dare_ties", "dare_ties", "dare_linear", "linear", "slerp"]
        )

    def chance(self, share):
        return self.random.random() < share

    def path(self, ref):
        return str(self.folder / ref)

    def scalar(self, key):
        """A number as YAML may hold it: float, string, integer, boolean."""
        if key in ("normalize", "rescale", "int8_mask"):
            return self.random.choice(WORDS[self.chance(0.5)])
        low, high = {"density": (0.05, 1), "t": (-0.2, 1.2), "lambda": (-0.5, 2)}.get(
            key, (-1, 1.5)
        )
        number = self.random.uniform(low, high)
        if key == "density":
            return self.random.choice([number, number, round(number, 2), 1, 1.0, "0.5", True])
        return self.random.choice(
            [
                number,
                number,
                round(number, 1),
                str(number),
                f"{number:.3e}",
                round(number),
                True,
                0.0,
                1e-30,
            ]
        )

    def value(self, key):
        return (
            [self.scalar(key) for _ in range(self.random.randint(1, 5))]
            if self.chance(0.3)
            else self.scalar(key)
        )

    def setting(self, key, whole=True):
        """A value, or filters; with `whole` some filter always matches."""
        if not self.chance(0.35):
            return self.value(key)
        filters = [
            {"filter": self.random.choice(FILTERS), "value": self.value(key)}
            for _ in range(self.random.randint(0, 3))
        ]
        filters += (
            [{"value": self.value(key)} | ({"filter": None} if self.chance(0.2) else {})]
            if whole or not filters
            else []
        )
        return filters[0] if len(filters) == 1 and self.chance(0.5) else filters

    def parameters(self, keys, share, whole=False):
        return {key: self.setting(key, whole) for key in keys if self.chance(share)}

    def source(self, ref, **more):
        """The weight stands at the source, or is left to a level above."""
        parameters = (
            {}
            if ref == "base" and self.chance(0.5)
            else self.parameters(("weight", "density"), 0.6)
        )
        return {"model": self.path(ref), **more} | (
            {"parameters": parameters} if parameters or self.chance(0.1) else {}
        )

    def refs(self, most=3):
        """The base and siblings in any order."""
        siblings = self.random.sample(
            SIBLINGS, 1 if self.method == "slerp" else self.random.randint(1, most)
        )
        return self.random.sample([*siblings, "base"], len(siblings) + 1)

    def slice(self, start, length, refs, away):
        """Sources of equal length; `away`: each from layers of its own."""
        sources = []
        for ref in refs:
            first = self.random.randint(0, self.layers - length) if away else start
            sources.append(self.source(ref, layer_range=[first, first + length]))
        shared = self.parameters(("weight", "density", "t", "normalize", "lambda", "rescale"), 0.2)
        return {"sources": sources} | ({"parameters": shared} if shared else {})

    def slices(self):
        cuts = sorted(
            {0, self.layers, *self.random.choices(range(self.layers), k=self.random.randint(0, 3))}
        )
        ranges = [(a, b - a) for a, b in pairwise(cuts)]
        away = False
        if self.chance(0.5):  # restacked: layers repeat, are left out, change their order
            lengths = [
                self.random.randint(1, 5 if self.layers > 5 else 3)
                for _ in range(self.random.randint(1, 4))
            ]
            ranges, away = (
                [(self.random.randint(0, self.layers - n), n) for n in lengths],
                self.chance(0.5),
            )
        # mergekit cannot merge the final norm and the head where the last slice has more sources
        # than the first
        first, fresh = self.refs(), self.chance(0.3)
        chosen = [first] + [
            self.refs(most=len(first) - 1) if fresh else self.random.sample(first, len(first))
            for _ in ranges[1:]
        ]
        pieces = [
            self.slice(start, n, refs, away)
            for (start, n), refs in zip(ranges, chosen, strict=True)
        ]
        if self.chance(0.5 if self.method == "slerp" else 0.1):
            for piece in pieces:
                piece["base_model"] = self.random.choice(piece["sources"])["model"]
        return pieces

    def configuration(self):
        """A mergekit configuration as plain data."""
        keys = ("density", "normalize", "lambda", "rescale", "int8_mask")
        top = {
            "weight": self.setting("weight"),
            "t": self.setting("t"),
            **self.parameters(keys, 0.35, whole=True),
        }
        data = {"merge_method": self.method, "base_model": self.path("base"), "parameters": top}
        if self.chance(0.6):
            data["slices"] = self.slices()
            if all("base_model" in piece for piece in data["slices"]) and self.chance(0.5):
                del data["base_model"]
        else:
            refs = [
                ref
                for ref in self.refs()
                if ref != "base" or self.method == "linear" or self.chance(0.6)
            ]
            data["models"] = [self.source(ref) for ref in refs]
        if self.method == "linear" and self.chance(0.5):
            data.pop("base_model", None)
        for key, share in (("dtype", 0.8), ("out_dtype", 0.3)):
            if self.chance(share):
                data[key] = self.random.choice(["bfloat16", "bfloat16", "float32", "float16"])
        return dict(self.random.sample(sorted(data.items()), len(data)))
