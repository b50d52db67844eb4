# SPDX-License-Identifier: Apache-2.0
"""Golden arithmetic against exact integer oracles and Berkeley SoftFloat."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import softfloatpy
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from speq.model import arith
from speq.model.arith import (
    MAX_K,
    BlockActivations,
    draft_gemm,
    nonfinite,
    prepare_draft,
    prepare_verify,
    quantize_activations,
    to_float16,
    verify_gemm,
)
from speq.model.format import EncodedTensor, encode
from speq.model.number_format import FormatConfig
from speq.sim import runner
from tests.model import oracle

SEED = runner.seed()

ONE, LARGEST, SMALLEST, INFINITY, NAN = 0x3C00, 0x7BFF, 0x0001, 0x7C00, 0x7E01
NEGATIVE = 0x8000
CORNERS = [0, 1, 2, 0x3FF, 0x400, 0x401, 0x7FF, 0x3BFF, ONE, 0x3C01, 0x3FFF, 0x7800, LARGEST]
CORNERS += [NEGATIVE | bits for bits in CORNERS]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(SEED)


def half(patterns) -> torch.Tensor:
    """FP16 tensor of bit patterns."""
    return torch.from_numpy(np.array(patterns, np.uint16).view(np.float16))


def bits(tensor: torch.Tensor) -> np.ndarray:
    """Bit patterns of an FP16 or FP32 tensor."""
    kinds = {torch.float16: np.uint16, torch.float32: np.uint32}
    return tensor.contiguous().numpy().view(kinds[tensor.dtype])


def finite_patterns(rng, *shape) -> np.ndarray:
    """Random finite FP16 bit patterns: every exponent and sign equally likely, some corners."""
    exponent, rest = rng.integers(0, 31, shape), rng.integers(0, 1 << 11, shape)
    patterns = (rest >> 10) << 15 | exponent << 10 | rest & 1023
    corner = rng.choice(CORNERS, shape)
    return np.where(rng.random(shape) < 0.1, corner, patterns).astype(np.uint16)


def gaussian_patterns(rng, *shape, scale: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * scale).astype(np.float16).view(np.uint16)


def check_bits(got, expected, x=None, w=None) -> None:
    """Compare FP32 bits; a failure shows the first output and, in hex, its operands."""
    got, expected = bits(got), np.array(expected, np.uint32)
    assert got.shape == expected.shape
    wrong = np.argwhere(got != expected)
    if len(wrong):
        t, o = wrong[0]
        rows = [] if x is None else [f"x = {[f'{v:04x}' for v in np.array(x)[t][:64]]}"]
        rows += [] if w is None else [f"w = {[f'{v:04x}' for v in np.array(w)[o][:64]]}"]
        message = f"{len(wrong)} outputs differ, first [{t}, {o}]: expected "
        message += f"{expected[t, o]:08x}, got {got[t, o]:08x}"
        pytest.fail("\n".join([message, *rows]))


def check_verify(x, w) -> None:
    """Compare verify_gemm on bit patterns [T, K] and [O, K] with the integer oracle."""
    columns = [[int(v) for v in row] for row in np.array(w)]
    rows = [[int(v) for v in row] for row in np.array(x)]
    expected = [[oracle.verify_dot(row, column) for column in columns] for row in rows]
    check_bits(verify_gemm(half(x), half(w)), expected, x, w)


# The oracle itself: what it says about single numbers is compared with SoftFloat.


def soft32(pattern: int) -> softfloatpy.Float32:
    return softfloatpy.Float32.from_bytes(int(pattern).to_bytes(4, "big"))


def soft_bits(value) -> int:
    return int.from_bytes(value.to_bytes(), "big")


def soft_product(x: int, w: int) -> int:
    """FP32 bits of the product of two FP16 bit patterns, by SoftFloat."""
    a, b = (softfloatpy.Float16.from_bytes(int(v).to_bytes(2, "big")) for v in (x, w))
    return soft_bits(softfloatpy.f32_mul(softfloatpy.f16_to_f32(a), softfloatpy.f16_to_f32(b)))


def test_oracle_rounding_is_softfloats(rng):
    exponents = rng.integers(1023 - 160, 1023 + 140, 4000)
    mantissas = rng.integers(0, 1 << 52, 4000) & rng.choice([-1, -(1 << 28), 1 << 51], 4000)
    for exponent, mantissa in zip(exponents, mantissas, strict=True):
        pattern = int(exponent) << 52 | int(mantissa)
        value = Fraction(float(np.uint64(pattern).view(np.float64)))
        soft = softfloatpy.f64_to_f32(softfloatpy.Float64.from_bytes(pattern.to_bytes(8, "big")))
        assert oracle.round_f32(value) == soft_bits(soft), f"{pattern:016x}"
        assert oracle.round_f32(-value) == soft_bits(soft) | 1 << 31, f"{pattern:016x}"


# Verify mode.


def test_single_products_are_softfloats(rng):
    x = np.concatenate([CORNERS, finite_patterns(rng, 120)])
    w = np.concatenate([CORNERS, finite_patterns(rng, 120)])
    expected = np.array([[soft_product(a, b) for b in w] for a in x], np.uint32)
    expected[expected == 0x80000000] = 0  # a sum that is zero is +0, SoftFloat's product is not
    check_bits(verify_gemm(half(x[:, None]), half(w[:, None])), expected, x[:, None], w[:, None])


def test_every_pattern_times_one():
    """K = 1, all 65,536 weights: the exact FP32 value, +0, or the canonical NaN."""
    every = np.arange(1 << 16, dtype=np.uint16)
    expected = every.view(np.float16).astype(np.float32).view(np.uint32)
    expected[(every & 0x7FFF) == 0] = 0
    expected[(every & 0x7C00) == 0x7C00] = oracle.NAN32
    check_bits(verify_gemm(half([[ONE]]), half(every[:, None])), expected[None])
    check_bits(verify_gemm(half(every[:, None]), half([[ONE]])), expected[:, None])


def test_sums_that_fit_float64_round_like_softfloat(rng):
    checked = 0
    x, w = (gaussian_patterns(rng, 60, 3) for _ in range(2))
    y = bits(verify_gemm(half(x), half(w)))
    for t in range(60):
        for o in range(60):
            pairs = zip(x[t].tolist(), w[o].tolist(), strict=True)
            total = sum(oracle.f16_integer(a) * oracle.f16_integer(b) for a, b in pairs)
            if abs(total) < 1 << 53:
                pattern = np.float64(total * 2.0**-48).view(np.uint64)
                soft = softfloatpy.Float64.from_bytes(int(pattern).to_bytes(8, "big"))
                assert y[t, o] == soft_bits(softfloatpy.f64_to_f32(soft))
                checked += 1
    assert checked > 1000


@pytest.mark.parametrize(
    ("t", "k", "o"), [(1, 1, 1), (1, 2, 3), (3, 7, 5), (8, 44, 9), (2, 172, 17), (4, 300, 3)]
)
@pytest.mark.parametrize("kind", ["gaussian", "wide", "wide x", "wide w", "subnormal"])
def test_random_operands(rng, t, k, o, kind):
    x = gaussian_patterns(rng, t, k)
    w = gaussian_patterns(rng, o, k, scale=0.05)
    if kind in ("wide", "wide x"):
        x = finite_patterns(rng, t, k)
    if kind in ("wide", "wide w"):
        w = finite_patterns(rng, o, k)
    if kind == "subnormal":
        x, w = x & 0x83FF, w & 0x83FF
    check_verify(x, w)


@st.composite
def operands(draw):
    """x [T, K] and w [O, K] of FP16 bit patterns, infinities and NaNs among them."""
    t, k, o = draw(st.integers(1, 5)), draw(st.integers(1, 20)), draw(st.integers(1, 5))
    pattern = st.one_of(st.sampled_from([*CORNERS, INFINITY, NAN]), st.integers(0, 0xFFFF))
    rows = st.lists(pattern, min_size=k, max_size=k)
    x, w = (st.lists(rows, min_size=n, max_size=n) for n in (t, o))
    return draw(x), draw(w)


@seed(SEED)
@settings(max_examples=300, deadline=None, database=None)
@given(operands())
def test_any_operands(case):
    check_verify(*case)


def test_cancellation_leaves_the_smallest_product(rng):
    """Huge products cancel; one product of 2^-48 is left, wherever it stands."""
    for k in (3, 65, 4097):
        big = np.full(k - 1, LARGEST)
        big_w = np.where(np.arange(k - 1) % 2, LARGEST | NEGATIVE, LARGEST)
        for place in {0, 1, k // 2, k - 1}:
            x = np.insert(big, place, SMALLEST)
            w = np.insert(big_w, place, SMALLEST)
            check_bits(
                verify_gemm(half([x]), half([w])), [[oracle.round_f32(Fraction(1, 1 << 48))]]
            )
            check_verify([x], [w, w ^ NEGATIVE])


@pytest.mark.parametrize("k", [20, 200, 2000])
def test_cancellation_of_random_products(rng, k):
    """Every product is there with both signs, shuffled, beside a few small ones."""
    small_x, small_w = rng.integers(1, 0x400, (4, 5)), rng.integers(1, 0x400, (4, 5))
    for make in (finite_patterns, gaussian_patterns):
        x, w = finite_patterns(rng, 4, k), make(rng, 4, k)
        x[3, 0] = w[2, 1] = INFINITY  # must not disturb the other rows
        x = np.concatenate([x, x, small_x], axis=1)
        w = np.concatenate([w, w ^ NEGATIVE, small_w], axis=1)
        order = rng.permutation(x.shape[1])
        check_verify(x[:, order], w[:, order])


def test_exact_zero_is_positive():
    rows = [[0, 0], [NEGATIVE, NEGATIVE], [NEGATIVE, 0], [ONE, ONE], [SMALLEST, SMALLEST]]
    w = [[0, 0], [NEGATIVE, NEGATIVE], [ONE, ONE | NEGATIVE], [LARGEST | NEGATIVE, LARGEST]]
    check_bits(verify_gemm(half(rows), half(w)), np.zeros((5, 4)))
    check_bits(verify_gemm(half([[NEGATIVE]]), half([[ONE], [0]])), np.zeros((1, 2)))


def test_long_dot_products(rng):
    k = 16384
    alternating = np.where(np.arange(k) % 2, SMALLEST, LARGEST)
    signs = np.where(rng.random(k) < 0.5, NEGATIVE, 0)
    x = [np.full(k, LARGEST), alternating, alternating ^ signs, rng.integers(1, 0x400, k)]
    w = [np.full(k, LARGEST), alternating, alternating[::-1], finite_patterns(rng, k)]
    w += [rng.integers(1, 0x400, k) | signs]
    check_verify(x, w)


def test_longest_dot_product(rng):
    """At MAX_K the bounds that make the sum exact are at their tightest."""
    x, w = finite_patterns(rng, MAX_K), finite_patterns(rng, MAX_K)
    x[:1000], w[:1000] = LARGEST, LARGEST
    for peak in (LARGEST, 0x67FF, 0x53FF):  # the last is the widest that is not cut in two
        check_verify([x], [np.minimum(w & 0x7FFF, peak) | w & NEGATIVE])
    largest = np.full((1, MAX_K), LARGEST)
    expected = oracle.round_f32(Fraction(65504**2 * MAX_K))
    check_bits(verify_gemm(half(largest), half(largest)), [[expected]])


def test_halfway_cases(rng):
    """25-bit sums between two FP32 numbers, alone and with a tail of any size on either side."""
    tails = [(0, 0)]
    for j in range(49):
        # 3 * 2^-j: where float64 has one bit left for the tail it rounds up, past the exact sum.
        pair = np.array([3 * 2.0 ** -(j // 2), 2.0 ** -(j - j // 2)], np.float16).view(np.uint16)
        tails += [(pair[0], pair[1]), (pair[1], pair[1])]
    for n in [*rng.integers(1 << 24, 1 << 25, 10), (1 << 25) - 1, (1 << 24) + 1, (1 << 24) + 3]:
        # The sum is n = high * 2^14 + middle * 2^3 + low, in FP16 integers, and the tail.
        parts = np.float16([n >> 14, n >> 3 & 0x7FF, n & 7]).view(np.uint16)
        scales = np.float16([1 << 14, 1 << 3, 1]).view(np.uint16)
        for tail_x, tail_w in tails:
            x = [np.append(parts, tail_x)]
            w = [np.append(scales ^ flip, tail_w) for flip in (0, NEGATIVE)]
            check_verify(x, w)


def test_rounding_of_two_terms(rng):
    """The final rounding on its own: any two float64 terms, of any sizes and signs."""
    n = 20000
    gap = rng.integers(-60, 61, n)
    a = rng.integers(-(1 << 53), 1 << 53, n) >> rng.integers(0, 53, n)
    b = rng.integers(-(1 << 53), 1 << 53, n) >> rng.integers(0, 53, n)
    # every other pair is halfway between two FP32 numbers, but for its second term
    a[::2] = a[::2] >> 53 - 25 << 28 | 1 << 28
    a, b = a.astype(np.float64), np.ldexp(b.astype(np.float64), gap)
    expected = [oracle.round_f32(Fraction(u) + Fraction(v)) for u, v in zip(a, b, strict=True)]
    for terms in ((a, b), (b, a)):
        first, second = (term[None].copy() for term in terms)
        check_bits(torch.from_numpy(arith._round(first, second, 0)), [expected])


def test_pieces_add_up_and_are_short_enough(rng):
    """Each piece's magnitudes times the weight bound sum to at most 2^53, tightly."""
    for k in (1, 50, 3000):
        x = [[oracle.f16_integer(int(v)) for v in row] for row in finite_patterns(rng, 3, k)]
        total = max(sum(abs(v) for v in row) for row in x)
        for weight_bits in range(1, 30, 4):
            # as close under a power of two as the margin for rounding in the sum allows
            bound = 2.0 ** (total.bit_length() + weight_bits) / total * (1 - 2.0**-29)
            rest = [list(row) for row in x]
            for piece, shift in arith._pieces(np.array(x, np.float64), bound):
                parts = [[int(v) for v in row] for row in piece.tolist()]
                longest = max(sum(abs(v) for v in row) for row in parts)
                assert longest * Fraction(bound) <= 1 << 53
                rest = [
                    [v - (part << shift) for v, part in zip(*rows, strict=True)]
                    for rows in zip(rest, parts, strict=True)
                ]
            assert not any(v for row in rest for v in row)


def unit_of(values: np.ndarray) -> float:
    """Largest power of two that all values are multiples of."""
    mantissa, exponent = np.frexp(values[values != 0])
    integer = np.ldexp(mantissa, 53).astype(np.int64)
    return float(np.ldexp((integer & -integer).astype(np.float64), exponent - 53).min(initial=1e9))


@pytest.fixture
def exact_products(monkeypatch) -> list[float]:
    """Watch each float64 product; collects the bits that its longest partial sum may need."""
    seen = []
    product = arith._matmul

    def watched(x, w, out):
        magnitude = (x.abs() @ w.abs().T).max().item()
        seen.append(np.log2(max(1, magnitude / unit_of(x.numpy()) / unit_of(w.numpy()))))
        product(x, w, out)

    monkeypatch.setattr(arith, "_matmul", watched)
    return seen


@pytest.mark.parametrize("k", [64, 576, 16384])
def test_no_partial_sum_needs_more_than_53_bits(rng, exact_products, k):
    wide, ordinary = finite_patterns(rng, 4, k), gaussian_patterns(rng, 4, k)
    uneven = np.where(np.arange(4)[:, None] == 1, wide, wide & 0x3FFF)  # one row is far larger
    broken = wide.copy()
    broken[2, 5] = INFINITY
    # dense: as large as a bound on the sum of all magnitudes allows
    dense = np.where(rng.random((4, k)) < 0.01, wide, LARGEST)
    below_one = dense & 0xBBFF
    for x in (ordinary, wide, uneven, broken, dense):
        for w in (ordinary, wide, wide | NEGATIVE, dense, dense | NEGATIVE, below_one, broken):
            verify_gemm(half(x), half(w))
    for x in (ordinary, wide, broken):
        for w in (ordinary, wide, wide | NEGATIVE, dense | NEGATIVE):
            draft_gemm(quantize_activations(half(x)), encode(half(w), FormatConfig()))
    assert len(exact_products) >= 35 + 12
    assert 50 < max(exact_products) <= 53 + 1e-6


def test_nonfinite_operands_give_the_canonical_nan(rng):
    x, w = gaussian_patterns(rng, 5, 40), gaussian_patterns(rng, 6, 40)
    clean = bits(verify_gemm(half(x), half(w))).copy()
    x[1, 39], x[3, 0], w[0, 7], w[4, 7] = INFINITY, 0xFFFF, INFINITY | NEGATIVE, NAN
    w[2, 39] = 0  # an infinity times zero is no exception
    check_verify(x, w)
    y = bits(verify_gemm(half(x), half(w)))
    assert (y[[1, 3]] == oracle.NAN32).all() and (y[:, [0, 4]] == oracle.NAN32).all()
    kept = np.ix_([0, 2, 4], [1, 3, 5])
    assert (y[kept] == clean[kept]).all()
    assert nonfinite(half(x)).tolist() == [False, True, False, True, False]
    assert nonfinite(half(w)).nonzero().flatten().tolist() == [0, 4]
    check_bits(verify_gemm(half([[NAN]]), half([[NAN]])), [[oracle.NAN32]])


@pytest.mark.parametrize("kind", ["gaussian", "wide"])
def test_bits_do_not_depend_on_order_batch_or_threads(rng, kind):
    """Permutations of K, slices of T and O, layouts, preparation, thread count: the same bits."""
    make = gaussian_patterns if kind == "gaussian" else finite_patterns
    t, k, o = 70, 576, 500  # more rows and weights than are processed at a time
    x, w = half(make(rng, t, k)), half(make(rng, o, k))
    y = verify_gemm(x, w)
    expected = bits(y)
    for _ in range(3):
        order = torch.from_numpy(rng.permutation(k))
        check_bits(verify_gemm(x[:, order], w[:, order]), expected)
    for rows in (slice(0, 1), slice(1, 3), slice(5, 13), slice(69, 70)):
        check_bits(verify_gemm(x[rows], w), expected[rows])
    check_bits(verify_gemm(x, w[123:124]), expected[:, 123:124])
    check_bits(verify_gemm(x, w[::7]), expected[:, ::7])
    check_bits(verify_gemm(x.T.contiguous().T, w.T.contiguous().T), expected)
    prepared = prepare_verify(w)
    for _ in range(2):
        check_bits(verify_gemm(x, prepared), expected)
    # Zeros change nothing, although they change how K is blocked.
    padding = (0, 1111)
    pad = torch.nn.functional.pad
    check_bits(verify_gemm(pad(x[:4], padding), pad(w, padding)), expected[:4])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            check_bits(verify_gemm(x, w), expected)
    finally:
        torch.set_num_threads(threads)


def test_operands_are_not_changed(rng):
    x, w = finite_patterns(rng, 3, 50), finite_patterns(rng, 4, 50)
    x[1, 1], w[2, 2] = NAN, INFINITY
    x_tensor, w_tensor = half(x), half(w)
    verify_gemm(x_tensor, w_tensor)
    assert (bits(x_tensor) == x).all() and (bits(w_tensor) == w).all()


def test_flushing_denormals_does_not_matter(rng):
    x, w = rng.integers(1, 0x400, (2, 33)), finite_patterns(rng, 5, 33) & 0x83FF
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        check_verify(x, w)
        check_draft(half(x), encode(half(w), FormatConfig()))
    finally:
        torch.set_flush_denormal(False)


# Block activations.


def check_quantized(x, block: int) -> None:
    """Compare quantize_activations on bit patterns [T, K] with the fraction oracle."""
    got = quantize_activations(half(x), block)
    mantissas, exponents = [], []
    for row in np.array(x):
        parts = (row[i : i + block].tolist() for i in range(0, len(row), block))
        results = [oracle.quantize_block([0, *part]) for part in parts]
        mantissas.append([m for part, _ in results for m in part[1:]])
        exponents.append([e for _, e in results])
    assert got.block == block
    assert got.mantissa.tolist() == mantissas
    assert got.exponent.tolist() == exponents


def test_quantize_every_pattern_on_its_own():
    every = np.arange(1 << 16, dtype=np.uint16)
    check_quantized(every[:, None], 1)


@pytest.mark.parametrize("peak", [0, 5, 13, 14, 15, 22, 30])
def test_quantize_every_pattern_beside_a_peak(peak):
    every = np.arange(0, (peak + 1) << 10, 3, dtype=np.uint16)
    check_quantized(np.stack([every, np.full_like(every, peak << 10)], axis=1), 2)


@pytest.mark.parametrize("block", [1, 2, 32, 64, 100])
@pytest.mark.parametrize("k", [1, 44, 64, 172])
def test_quantize_shapes(rng, k, block):
    x = np.concatenate([gaussian_patterns(rng, 3, k), finite_patterns(rng, 3, k)])
    x[1, k // 2], x[4, 0] = INFINITY, NAN
    check_quantized(x, block)


def test_quantize_corner_cases():
    ties = np.float16(np.arange(-127, 128) / 128).view(np.uint16)  # beside 1: halves of a step
    x = np.concatenate([ties, [ONE]])[None]
    check_quantized(x, 256)
    assert quantize_activations(half(x), 256).mantissa[0, 128:132].tolist() == [0, 1, 2, 2]
    # 127.94 steps would round to 128
    clamped = quantize_activations(half([[0x3FFF, 0xBFFF]]))
    assert clamped.mantissa.tolist() == [[127, -127]] and clamped.exponent.tolist() == [[15]]
    zeros = quantize_activations(half([[0, NEGATIVE]]))
    assert zeros.mantissa.tolist() == [[0, 0]] and zeros.exponent.tolist() == [[1]]
    subnormal = quantize_activations(half([[0x3FF, 8, 24]]))
    assert subnormal.exponent.tolist() == [[1]]
    assert subnormal.mantissa.tolist() == [[64, 0, 2]]  # 63.94, and two ties


@st.composite
def any_activations(draw):
    """x [T, K] of FP16 bit patterns and a block size."""
    t, k = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    pattern = st.one_of(st.sampled_from([*CORNERS, INFINITY, NAN]), st.integers(0, 0xFFFF))
    row = st.lists(pattern, min_size=k, max_size=k)
    return draw(st.lists(row, min_size=t, max_size=t)), draw(st.integers(1, 30))


@seed(SEED)
@settings(max_examples=200, deadline=None, database=None)
@given(any_activations())
def test_quantize_any_activations(case):
    check_quantized(*case)


# Draft mode.

#: Draft magnitudes of 4-bit codes for q = 0..7, relative to 2^(b - 15), by split.
LEVELS = {
    0: (0.75 / 128, 1.5 / 64, 1.5 / 32, 1.5 / 16, 1.5 / 8, 1.5 / 4, 1.5 / 2, 1.5),
    1: (0.75 / 64, 1.5 / 32, 1.5 / 16, 1.5 / 8, 1.5 / 4, 1.5 / 2, 1.25, 1.75),
    2: (0.75 / 32, 1.5 / 16, 1.5 / 8, 1.5 / 4, 1.25 / 2, 1.75 / 2, 1.25, 1.75),
    3: (0.75 / 16, 1.5 / 8, 1.25 / 4, 1.75 / 4, 1.25 / 2, 1.75 / 2, 1.25, 1.75),
}
SCALES = [Fraction(n, 16) for n in (12, 13, 14, 15, 16, 18, 20, 22)]


def draft_code(tensor: EncodedTensor, o: int, k: int) -> int:
    """The draft code of weight [o, k], read from the draft plane."""
    column = tensor.draft_plane[o // tensor.columns, :, o % tensor.columns]
    return int(column[k // 4]) >> 4 * (k % 4) & 15


def draft_value(tensor: EncodedTensor, o: int, k: int) -> Fraction | None:
    """Value that draft mode multiplies with; None in a group with an infinity or a NaN."""
    config = tensor.config
    byte = int(tensor.group_bytes[o // tensor.columns, k // config.group, o % tensor.columns])
    base, scale = byte & 31, SCALES[byte >> 5]
    if base == 31:
        return None
    sign, code = divmod(draft_code(tensor, o, k), 8)
    level = Fraction(LEVELS[config.split][code])  # exact: a short binary fraction
    return (-1) ** sign * level * scale * Fraction(2) ** (base - 15)


def check_draft(x: torch.Tensor, tensor: EncodedTensor, block: int = 64) -> None:
    """Compare draft_gemm with a fraction oracle on the patterns of x and the raw planes."""
    activations = quantize_activations(x, block)
    o, k = tensor.drafted_outputs or tensor.shape[0], tensor.shape[1]
    columns = [[draft_value(tensor, i, j) for j in range(k)] for i in range(o)]
    rows = []
    for row in bits(x):
        values = []
        for i in range(0, k, block):
            mantissas, exponent = oracle.quantize_block([0, *row[i : i + block].tolist()])
            values += [oracle.activation_value(m, exponent) for m in mantissas[1:]]
        rows.append(values)
    expected = [[oracle.fraction_dot(row, column) for column in columns] for row in rows]
    check_bits(draft_gemm(activations, tensor), expected)
    check_bits(draft_gemm(activations, prepare_draft(tensor)), expected)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("split", [0, 1, 2, 3])
def test_draft_of_every_format(rng, split, group):
    """From FP16 patterns to FP32 bits, with blocks that are aligned to groups and that are not."""
    config = FormatConfig(group=group, split=split)
    for k, columns in ((1, 1), (44, 16), (172, 3)):
        codes = rng.integers(0, 8, (5, -(-k // group)))
        x = np.concatenate([gaussian_patterns(rng, 1, k), finite_patterns(rng, 1, k)])
        w = np.concatenate([gaussian_patterns(rng, 3, k, scale=0.05), finite_patterns(rng, 2, k)])
        check_draft(half(x), encode(half(w), config, codes, columns=columns))
        part = encode(half(w), config, codes, columns=columns, drafted_outputs=3)
        check_draft(half(x), part, group)


def test_draft_over_the_whole_range(rng, exact_products):
    """Groups and blocks from all subnormal to the largest numbers in one dot product."""
    exponents = np.repeat(rng.permutation(31), 64)
    x = np.stack([exponents, exponents[::-1], rng.permutation(exponents)]) << 10
    x |= rng.integers(0, 1 << 10, x.shape) | rng.integers(0, 2, x.shape) << 15
    w = np.stack([exponents, exponents[::-1]]) << 10
    w |= rng.integers(0, 1 << 10, w.shape)
    codes = rng.integers(0, 8, (2, 31))
    signs = rng.integers(0, 2, w.shape) << 15
    for patterns in (w, w | NEGATIVE, w | signs):
        check_draft(half(x), encode(half(patterns), FormatConfig(split=0), codes))
    assert max(exact_products) <= 53 + 1e-6


@pytest.mark.parametrize("split", [0, 3])
def test_draft_cancellation_leaves_the_smallest_products(rng, split):
    """Large groups cancel exactly; a group of the smallest drafts and activations is left."""
    groups = 6
    x, w = finite_patterns(rng, 3, 64 * groups), finite_patterns(rng, 4, 64 * groups)
    tiny_x, tiny_w = rng.integers(0, 0x40, (3, 64)), rng.integers(0, 0x400, (4, 64))
    x = np.concatenate([x, x, tiny_x], axis=1)
    w = np.concatenate([w, w ^ NEGATIVE, tiny_w], axis=1)
    codes = rng.integers(0, 8, (4, groups))
    codes = np.concatenate([codes, codes, rng.integers(0, 8, (4, 1))], axis=1)
    check_draft(half(x), encode(half(w), FormatConfig(split=split), codes))


def test_draft_with_nonfinite_operands(rng):
    x, w = gaussian_patterns(rng, 4, 172), gaussian_patterns(rng, 5, 172)
    x[2, 171], w[1, 0], w[3, 100] = INFINITY, NAN, INFINITY | NEGATIVE
    with pytest.warns(RuntimeWarning, match="infinities or NaNs"):
        tensor = encode(half(w), FormatConfig())
    check_draft(half(x), tensor)
    y = bits(draft_gemm(quantize_activations(half(x)), tensor))
    is_nan = y == oracle.NAN32
    assert is_nan[2].all() and is_nan[:, [1, 3]].all() and is_nan.sum() == 5 + 3 * 2


def test_draft_bits_do_not_depend_on_batch(rng):
    x, w = half(finite_patterns(rng, 70, 320)), half(gaussian_patterns(rng, 900, 320))
    operand = prepare_draft(encode(w, FormatConfig()))
    expected = bits(draft_gemm(quantize_activations(x), operand))
    for rows in (slice(0, 1), slice(3, 11), slice(60, 70)):
        check_bits(draft_gemm(quantize_activations(x[rows]), operand), expected[rows])
    part = encode(w[300:317], FormatConfig())
    check_bits(draft_gemm(quantize_activations(x), part), expected[:, 300:317])


# Conversion to FP16.


def test_to_float16_is_softfloats(rng):
    """Every FP16 number, all halfway points and their neighbours, random patterns."""
    every = np.arange(0x7C00, dtype=np.uint16)
    exact = every.view(np.float16).astype(np.float32)
    above = np.append(exact[1:], np.float32(65536))
    ties = ((exact.astype(np.float64) + above) / 2).astype(np.float32)
    near = [np.nextafter(ties, np.float32(side)) for side in (-np.inf, np.inf)]
    values = np.concatenate([exact, ties, *near]).view(np.uint32)
    patterns = np.concatenate([values, values | 1 << 31, rng.integers(0, 1 << 32, 50000)])
    patterns = patterns[(patterns & 0x7FFFFFFF) <= 0x7F800000].astype(np.uint32)
    expected = [soft_bits(softfloatpy.f32_to_f16(soft32(p))) for p in patterns]
    got = bits(to_float16(torch.from_numpy(patterns.view(np.float32))))
    wrong = np.flatnonzero(got != np.array(expected, np.uint16))
    assert not len(wrong), [f"{patterns[i]:08x}: got {got[i]:04x}" for i in wrong[:5]]


def test_to_float16_makes_nans_canonical():
    patterns = [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x477FF000]
    y = torch.from_numpy(np.array(patterns, np.uint32).view(np.float32))
    expected = [0x7E00] * 4 + [0x7C00, 0xFC00, 0x7C00]
    for shape in ((7,), (1, 7), (7, 1, 1)):
        assert bits(to_float16(y.reshape(shape))).flatten().tolist() == expected
    assert bits(y).tolist() == patterns
    # a scattered view: more than one vector register's width of NaNs
    assert (bits(to_float16(torch.full((3, 50), torch.nan).T)) == 0x7E00).all()


# Errors.


def test_wrong_operands_are_refused():
    x, w = torch.ones(2, 8, dtype=torch.float16), torch.ones(3, 8, dtype=torch.float16)
    tensor = encode(w, FormatConfig())
    with pytest.raises(TypeError, match=r"x is torch\.float32; expected a torch\.float16"):
        verify_gemm(x.float(), w)
    with pytest.raises(TypeError, match="w is ndarray"):
        verify_gemm(x, w.numpy())
    with pytest.raises(ValueError, match=r"x has shape \(8,\)"):
        verify_gemm(x[0], w)
    for shape in ((0, 8), (2, 0)):
        with pytest.raises(ValueError, match="non-empty"):
            verify_gemm(torch.empty(shape, dtype=torch.float16), w)
    with pytest.raises(ValueError, match=r"w has shape \(0, 8\)"):
        verify_gemm(x, w[:0])
    with pytest.raises(ValueError, match="K is 8 for x and 7 for w"):
        verify_gemm(x, w[:, :7])
    with pytest.raises(ValueError, match=f"at most {MAX_K}"):
        verify_gemm(*torch.ones(2, 1, MAX_K + 1, dtype=torch.float16))
    with pytest.raises(ValueError, match="expected the CPU"):
        verify_gemm(x.to("meta"), w)
    with pytest.raises(TypeError, match="prepare_verify"):
        verify_gemm(x, prepare_draft(tensor))
    with pytest.raises(TypeError, match="quantize_activations"):
        draft_gemm(x, tensor)
    with pytest.raises(TypeError, match="expected an EncodedTensor"):
        draft_gemm(quantize_activations(x), w)
    with pytest.raises(TypeError, match="prepare_draft"):
        draft_gemm(quantize_activations(x), prepare_verify(w))
    with pytest.raises(ValueError, match="K is 7 for x and 8 for w"):
        draft_gemm(quantize_activations(x[:, :7]), tensor)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        quantize_activations(x.double())
    with pytest.raises(ValueError, match="block is 0"):
        quantize_activations(x, block=0)
    with pytest.raises(ValueError, match="exponent is"):
        BlockActivations(torch.zeros(2, 65, dtype=torch.int8), torch.zeros(2, 1).byte(), 64)
    with pytest.raises(TypeError, match=r"y is torch\.float16"):
        to_float16(x)


def test_operands_that_require_gradients_are_taken_as_values():
    x = torch.ones(1, 4, dtype=torch.float16, requires_grad=True)
    w = torch.ones(1, 4, dtype=torch.float16, requires_grad=True)
    assert verify_gemm(x, w).tolist() == [[4.0]]
    assert quantize_activations(x).values().tolist() == [[1.0] * 4]
