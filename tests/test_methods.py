"""Every merge method, on tensors of every kind: against mergekit's own functions bit for bit, and
against float64 formulas.
"""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from mergekit_server import mergekit
from merging_tools import same_bits
from method_cases import UNIT, WEIGHTED, Case, cases, make_plan, make_tensors, seeded

from evomerge.errors import RecipeError
from evomerge.merging.methods import thinning
from evomerge.merging.methods.deltas import add_weighted_into, differences, task_arithmetic, ties

# below the smallest normal number: absolute
TINY = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-149}
SLOW = [HealthCheck.too_slow]  # on a busy machine
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
THOROUGH = settings(max_examples=250, deadline=None, suppress_health_check=SLOW)


@pytest.mark.parametrize("name", [*WEIGHTED, "slerp"])
def test_mergekit_s_bits(name):
    mergekit()

    @THOROUGH
    @given(cases([name]))
    def check(case):
        theirs = case.theirs()
        if case.method == "linear" and case.normalize and not torch.tensor(case.weights).sum():
            with pytest.raises(RecipeError, match="sum to 0"):  # mergekit divides by 0
                case.ours()
            return
        ours = case.ours()
        if case.theirs_is_nan():
            assert not theirs.isfinite().all() or not theirs.numel() or ours.equal(theirs)
        else:
            assert same_bits(*(x.masked_fill(x.isnan(), float("nan")) for x in (ours, theirs))), (
                (ours - theirs).abs().max()
            )

    check()


@pytest.mark.parametrize("size", [2**20, 2**20 + 7, 3 * 2**20 - 1])
@pytest.mark.parametrize("name", ["slerp", "dare_linear"])
def test_mergekit_s_bits_of_large_tensors(name, size):
    """slerp takes 2^20 elements at a time, and the order of its sums decides the last bit."""
    for dtype in UNIT:
        tensors = make_tensors("noise", (size,), dtype, 1, size)
        case = Case(name, tensors, dtype, [1.0, 0.7], [0.3], False, 1.0, True, 0.37, 5)
        assert same_bits(case.ours(), case.theirs())


def exact(tensors):
    """float64 arrays (count, size)."""
    return np.stack([tensor.double().reshape(-1).numpy() for tensor in tensors])


def combined(base, deltas, weights, elect, normalize, scale, unit):
    """The formula in float64, a bound on the rounding of the real steps, and where that bound
    holds.

    A step rounds by a relative `unit` at most. delta, weight, product, sum, quotient and scale are
    such steps, each on a term of A = sum |w d|; the divisor's rounding grows by sum |w| / |sum w|,
    its condition. Doubled for what is of second order, that is 12 unit (1 + condition) A |scale /
    divisor|; the last sum rounds by unit |out|. It does not hold where rounding may turn an elected
    sign or where the divisor is mostly rounding.
    """
    weights = np.asarray(weights)[:, None]
    products = weights * deltas
    size = np.abs(products).sum(0)
    counts, holds = np.ones_like(products, dtype=bool), np.ones(products.shape[1:], dtype=bool)
    if elect:
        total = products.sum(0)
        counts = np.sign(products) == np.where(total >= 0, 1, -1)
        holds = (np.abs(total) > 8 * len(weights) * unit * size) | (size == 0)
    divisor, condition = 1.0, 0.0
    if normalize:
        divisor = (weights * counts).sum(0)
        divisor = np.where(np.abs(divisor) < 1e-8, 1, divisor)
        condition = np.abs(weights * counts).sum(0) / np.abs(divisor)
        holds &= condition < 16
    out = base + scale * (products * counts).sum(0) / divisor
    return (
        out,
        12 * unit * (1 + condition) * size * np.abs(scale / divisor) + unit * np.abs(out),
        holds,
    )


def assert_close(case, out, bound, holds):
    """Within the bound, and 64 times the smallest number for what underflows on the way; numbers
    near fp16's end may overflow.
    """
    ours = exact([case.ours()])[0]
    if case.dtype == torch.float16:
        holds = holds & (bound < 6e4 * UNIT[case.dtype])
    wrong = holds & ~(np.abs(ours - out) <= bound + 64 * TINY[case.dtype])
    assert not wrong.any(), (ours[wrong][:3], out[wrong][:3], bound[wrong][:3])


ORDINARY = st.one_of(st.floats(0.05, 2), st.floats(-2, -0.05), st.just(0.0))


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "dare_ties", "dare_linear"])
def test_the_formula_in_float64(name):
    @QUICK
    @given(cases([name], weights=ORDINARY, scales=ORDINARY))
    def check(case):
        base, *siblings = exact(case.tensors)
        deltas = np.asarray(siblings) - base
        generator = seeded(case.seed)
        for i, density in enumerate(case.densities):
            # which numbers stay is test_trim's; the sign of 0 does not matter here
            if name == "ties":
                delta = case.tensors[i + 1] - case.tensors[0]
                kept = exact([thinning.trim(delta, density, case.rescale)])[0] != 0
            elif name == "task_arithmetic" or density == 1:
                continue
            else:
                dtype = case.dtype if case.dtype == torch.bfloat16 else torch.float32
                kept = (
                    exact(
                        [
                            torch.bernoulli(
                                torch.full(base.shape, density, dtype=dtype), generator=generator
                            )
                        ]
                    )[0]
                    != 0
                )
            before, after = np.abs(deltas[i]).sum(), np.abs(deltas[i] * kept).sum()
            deltas[i] *= kept * (
                before / after if case.rescale and min(before, after) > 1e-7 else 1
            )
        assume(case.dtype != torch.float16 or np.abs(deltas).sum(0).max(initial=0) < 3e4)
        # both sums and their quotient round too
        unit = UNIT[case.dtype] * (2 if case.rescale else 1)
        assert_close(
            case,
            *combined(
                base,
                deltas,
                case.weights[1:],
                name.endswith("ties"),
                case.normalize,
                case.scale,
                unit,
            ),
        )

    check()


@QUICK
@given(
    cases(
        ["ties"],
        kinds=["grid"],
        weights=st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0, 2.0]),
        scales=st.just(1.0),
    )
)
def test_a_sum_of_zero_elects_plus(case):
    """On a grid every step is exact, so equal votes against each other are equal, and only the last
    sum rounds.
    """
    base, *siblings = exact(case.tensors)
    kept = (
        exact(
            [
                thinning.trim(x - case.tensors[0], p)
                for x, p in zip(case.tensors[1:], case.densities, strict=True)
            ]
        )
        != 0
    )
    deltas = (np.asarray(siblings) - base) * kept
    out, _, _ = combined(base, deltas, case.weights[1:], True, False, 1.0, 0.0)
    all_deltas = differences(case.tensors[0], case.tensors[1:])
    plan = make_plan("ties", weights=tuple(case.weights[1:]), densities=tuple(case.densities))
    ours = ties(case.tensors[0], all_deltas, plan)
    assert torch.equal(ours.reshape(-1), torch.tensor(out).to(case.dtype))


@QUICK
@given(cases(["linear"], weights=ORDINARY))
def test_linear_in_float64(case):
    """fp32 inside: the bound is `combined`'s with fp32's unit, and one rounding to the dtype."""
    assume(not case.normalize or torch.tensor(case.weights).sum())  # which recipes refuse
    out, bound, holds = combined(
        0.0, exact(case.tensors), case.weights, False, case.normalize, 1.0, UNIT[torch.float32]
    )
    assert_close(case, out, bound + UNIT[case.dtype] * (np.abs(out) + bound), holds)


@QUICK
@given(cases(["slerp"]))
@example(
    Case(
        "slerp",
        make_tensors("far", (2**20 + 5,), torch.float32, 1, 0),
        torch.float32,
        [],
        [],
        *[False] * 3,
        0.3,
        0,
    )
)
@example(
    Case(
        "slerp",
        make_tensors("near", (100,), torch.float32, 1, 2),
        torch.float32,
        [],
        [],
        *[False] * 3,
        0.3,
        0,
    )
)
def test_slerp_in_float64(case):
    """fp32 inside. The cosine is off by 64 units at most (torch sums in a tree), the angle by that
    over its sine, and a share by that times its derivative in the angle; beside it, each of some 8
    roundings is of a share, of t, or of an angle below pi whose sine divides.
    """
    base, other = exact(case.tensors)
    norms = [np.linalg.norm(v) if np.linalg.norm(v) > 1e-8 else 1.0 for v in (base, other)]
    cosine = np.clip((base / norms[0]) @ (other / norms[1]), -1, 1)
    assume(abs(abs(cosine) - 0.9995) > 1e-5)
    sine, angle, unit = np.sqrt(1 - cosine**2), np.arccos(cosine), UNIT[torch.float32]
    out, bound = 0.0, 0.0
    for t, vector in ((1 - case.t, base), (case.t, other)):
        if abs(cosine) > 0.9995:
            share, error = t, 8 * (1 + abs(t))
        else:
            share, slope = (
                np.sin(t * angle) / sine,
                (t * np.cos(t * angle) * sine - np.sin(t * angle) * cosine) / sine**2,
            )
            error = 64 * abs(slope) / sine + 8 * (1 + abs(t) + abs(share)) * (1 + angle / sine)
        out, bound = out + share * vector, bound + unit * error * np.abs(vector)
    assert_close(
        case, out, bound + UNIT[case.dtype] * (np.abs(out) + bound), np.ones(out.shape, dtype=bool)
    )


@QUICK
@given(cases(["ties"]))
def test_trim_keeps_the_largest(case):
    """As many as asked for, and nothing that is smaller than what went."""
    delta = case.tensors[1] - case.tensors[0]
    density = case.densities[0]
    out, size = exact([thinning.trim(delta, density)])[0], np.abs(exact([delta])[0])
    if not size.size:
        return
    kept = size.size if density == 1 else max(1, int(density * size.size))
    limit = np.sort(size)[::-1][kept - 1]
    assert (out[size > limit] == exact([delta])[0][size > limit]).all()
    assert not out[size < limit].any()
    assert np.count_nonzero(out) == min(kept, np.count_nonzero(size))


@pytest.mark.parametrize("dtype", list(UNIT))
@pytest.mark.parametrize("density", [0.01, 0.3, 0.9])
def test_drop_keeps_a_share_and_the_size(dtype, density):
    """The share within 5 standard deviations (and a bf16 density's rounding); the sum of magnitudes
    within roundings.
    """
    delta = make_tensors("noise", (300, 333), dtype, 0, 1)[0]
    out = exact([thinning.drop(delta, density, seeded(0))])[0]
    size = np.abs(exact([delta])[0])
    share = np.count_nonzero(out) / np.count_nonzero(size)
    assert (
        abs(share - density)
        < 5 * np.sqrt(density * (1 - density) / size.size) + UNIT[dtype] * density
    )
    assert abs(np.abs(out).sum() / size.sum() - 1) < 4 * UNIT[dtype]


def test_fp16_neither_divides_by_zero_nor_overflows():
    """Where mergekit gives NaN: weights that sum to 0 are not normalised; a sum of magnitudes above
    65504 still rescales.
    """
    base, one, two = make_tensors("far", (70001,), torch.float16, 2, 0)
    plain, normal = (
        task_arithmetic(
            base,
            differences(base, [one, two]),
            make_plan("task_arithmetic", weights=(0.5, -0.5), normalize=normalize),
        )
        for normalize in (False, True)
    )
    assert normal.isfinite().all()
    assert same_bits(plain, normal)
    delta = one - base
    before, kept = (
        np.abs(exact([x])).sum() for x in (delta, thinning.trim(delta, 0.3, rescale=True))
    )
    assert before > 65504
    assert abs(kept / before - 1) < 4 * UNIT[torch.float16]


@QUICK
@given(cases(["task_arithmetic"], kinds=["opposite", "far"]))
def test_in_place_is_the_same(case):
    base, sibling = case.tensors[0] + 0.0, case.tensors[1]
    out = torch.full_like(base, 9.0)
    add_weighted_into(out, base, sibling - base, case.weights[0])
    plan = make_plan("task_arithmetic", weights=tuple(case.weights[:1]))
    assert same_bits(out, task_arithmetic(base, [sibling - base], plan))
