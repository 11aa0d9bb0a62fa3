"""Families of tiny models to merge, and a comparison that sees every bit."""

import copy

import torch
from conftest import make_model, save
from safetensors.torch import load_file

from evomerge.recipe import task_arithmetic_recipe

SLICES = [(0, 1), (1, 3), (3, 4)]


def moved(model, seed, scale):
    """A sibling: the model plus noise; every 14th number falls to a negative one too small to
    matter.
    """
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator).to(p.dtype))
            p.view(-1)[::14] = -1e-38
    return other


def make_family(folder, tied=False, dtypes=(torch.bfloat16,) * 3, **config):
    """base/, one/ and two/ in `folder`; the base holds negative zeros, whose sign a careless sum
    loses or keeps.
    """
    base = make_model(0, tie_word_embeddings=tied, **config)
    with torch.no_grad():
        for p in base.parameters():
            p.view(-1)[::7] = -0.0
    models = [base, moved(base, 1, 0.1), moved(base, 2, 0.1)]
    for name, model, dtype in zip(("base", "one", "two"), models, dtypes, strict=True):
        save(model.to(dtype), folder / name)
    return folder


def random_recipe(family, siblings, generator, **settings):
    """Weights in 0 to 2 for SLICES."""
    rows = (
        2 * torch.rand(len(SLICES), len(siblings), generator=generator, dtype=torch.float64)
    ).tolist()
    return task_arithmetic_recipe(
        str(family / "base"), [str(family / s) for s in siblings], SLICES, rows, **settings
    )


def load_all(folder):
    """Every tensor of a folder, by name."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def same_bits(a, b):
    """True when dtype, shape and all bits are the same: a zero's sign counts."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def bits(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def differing(ours, theirs):
    """Names of tensors that differ in any bit, or that only one of the two has."""
    return sorted(
        n
        for n in ours.keys() | theirs.keys()
        if n not in ours or n not in theirs or not same_bits(ours[n], theirs[n])
    )
