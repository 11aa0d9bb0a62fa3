"""DARE's random numbers: from any place in the stream they are what one pass over all tensors
draws.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging_tools import same_bits

from evomerge.merging.methods import dare_draws as draws
from evomerge.merging.methods.dare_draws import Draws

NAMES = st.text("abl.0129", min_size=1, max_size=6)
DTYPES = [torch.bfloat16, torch.float32]


def draw(generator, count, density, dtype):
    """As mergekit draws a mask."""
    return torch.bernoulli(torch.full((count,), density, dtype=dtype), generator=generator)


def in_one_pass(seed, counts, dtypes, density):
    """Every tensor's numbers from one stream, in the order of `counts`; as many draws of each dtype
    as the tensor asks for.
    """
    generator = torch.Generator().manual_seed(seed)
    return {name: draw(generator, counts[name], density, dtypes[name]) for name in counts}


@st.composite
def streams(draw):
    """(seed, counts by name, dtypes by name, names to ask for in any order, some of them twice)."""
    counts = draw(
        st.dictionaries(
            NAMES, st.one_of(st.integers(0, 40), st.integers(600, 700)), min_size=1, max_size=8
        )
    )
    dtypes = {name: draw(st.sampled_from(DTYPES)) for name in counts}
    return (
        draw(st.integers(0, 2**63)),
        counts,
        dtypes,
        draw(st.lists(st.sampled_from(sorted(counts)), max_size=12)),
    )


@settings(max_examples=200, deadline=None)
@given(streams(), st.floats(0.01, 0.99), st.integers(1, 100))
def test_any_tensors_in_any_order(stream, density, burn):
    """Whatever dtype draws, a number advances the stream alike: burning in fp32 what bf16 would
    have drawn lands at the same place.
    """
    seed, counts, dtypes, asked = stream
    wanted = in_one_pass(seed, counts, dtypes, density)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draws, "BURN", burn)  # chunks of the numbers that are thrown away
        ours = Draws(seed, counts)
        for name in asked:
            assert same_bits(
                draw(ours.generator(name), counts[name], density, dtypes[name]), wanted[name]
            )


@settings(max_examples=100, deadline=None)
@given(streams(), streams(), st.floats(0.01, 0.99))
def test_recipes_of_one_seed_share_states(one, other, density):
    """What one recipe kept helps the next, whose tensors take other counts, and changes nothing."""
    states: dict[int, torch.Tensor] = {}
    for _, counts, dtypes, asked in (one, other, one):
        wanted, ours = in_one_pass(one[0], counts, dtypes, density), Draws(one[0], counts, states)
        for name in asked:
            assert same_bits(
                draw(ours.generator(name), counts[name], density, dtypes[name]), wanted[name]
            )


def test_several_siblings_draw_from_one_place():
    """A tensor's siblings draw one after the other; a jump over them counts every one."""
    shapes = {"b": (3, 5), "a": (7,), "c": (2, 2, 2)}
    generator = torch.Generator().manual_seed(9)
    wanted = {
        name: [
            torch.bernoulli(torch.full(shapes[name], p), generator=generator) for p in (0.3, 0.6)
        ]
        for name in shapes
    }
    ours = Draws(9, {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()})
    for name in ("c", "a", "b", "c"):
        at = ours.generator(name)
        for p, mask in zip((0.3, 0.6), wanted[name], strict=True):
            assert torch.equal(torch.bernoulli(torch.full(shapes[name], p), generator=at), mask)


def test_a_jump_over_many_numbers():
    """More than are burned at once."""
    counts = {"a": 2 * draws.BURN + 12345, "b": 1000}
    wanted = in_one_pass(3, counts, dict.fromkeys(counts, torch.bfloat16), 0.4)["b"]
    assert same_bits(draw(Draws(3, counts).generator("b"), 1000, 0.4, torch.bfloat16), wanted)
