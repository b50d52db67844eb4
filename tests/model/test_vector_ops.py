# SPDX-License-Identifier: Apache-2.0
"""The vector operations: accuracy against float64, bits against Berkeley SoftFloat, independence of
batch and layout."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from fractions import Fraction
from functools import wraps

import numpy as np
import pytest
import softfloatpy
import torch

from speq.model import vector_ops
from speq.model.arith import to_float16, verify_gemm
from speq.model.function_tables import INVERSE, POWER, ROOTS, SIGMOID, FunctionTable
from speq.model.vector_ops import (
    gated,
    head_norm,
    normalize,
    rms_norm,
    rotary_frequencies,
    rotary_order,
    rotary_table,
    rotate,
    softmax_weights,
)

SEED = int(os.environ.get("SPEQ_SEED", "0"))
MANTISSAS = torch.arange(0x3F800000, 0x40800000, 5, dtype=torch.int32).view(torch.float32)  # [1, 4)


def _of_tensors(function: Callable[[np.ndarray], np.ndarray]) -> Callable:
    """A function of arrays as one of tensors."""

    @wraps(function)
    def call(x: torch.Tensor) -> torch.Tensor:
        with np.errstate(all="ignore"):
            return torch.from_numpy(np.asarray(function(x.numpy())))

    return call


exponential, sigmoid = map(_of_tensors, (vector_ops.exponential, vector_ops.sigmoid))
reciprocal, rsqrt = map(_of_tensors, (vector_ops.reciprocal, vector_ops.rsqrt))
row_sum = _of_tensors(vector_ops.row_sum)


@pytest.fixture
def generator() -> torch.Generator:
    print(f"SPEQ_SEED={SEED}")
    return torch.Generator().manual_seed(SEED)


def largest_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error in units of the spacing of FP32 at the exact float64 values."""
    exponent = torch.floor(torch.log2(exact.abs())).clamp(min=-126)
    error = ((result.to(torch.float64) - exact).abs() / torch.exp2(exponent - 23)).max().item()
    print(f"largest error {error:.3f} ulp")
    return error


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest relative error."""
    error = (result / exact - 1).abs().max().item()
    print(f"largest error 2^{math.log2(error):.2f}")
    return error


def bits(tensor: torch.Tensor) -> torch.Tensor:
    size = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return tensor.contiguous().view(size)


def uniform(generator: torch.Generator, low: float, high: float, count: int = 500_000):
    return torch.rand(count, generator=generator) * (high - low) + low


# The errors that the module's docstring states.


@pytest.mark.parametrize("limit", [87.3, 17.0, 8.0, 1.0, 1e-3])
def test_exponential_error(generator, limit):
    """The error grows with |x|, of which only 18 bits count."""
    x = uniform(generator, -limit, limit)
    bound = 2.0**-14 + limit * 2.0**-17
    assert relative_error(exponential(x), (-x.to(torch.float64).abs()).exp()) <= bound


def test_reciprocal_error():
    for scale in (2.0**-125, 1.0, 2.0**124):
        x = MANTISSAS * scale
        assert largest_error(reciprocal(x), 1 / x.to(torch.float64)) <= 1.4


def test_rsqrt_error():
    for scale in (2.0**-126, 1.0, 2.0**126):
        x = MANTISSAS[MANTISSAS * scale < torch.inf] * scale
        assert largest_error(rsqrt(x), x.to(torch.float64) ** -0.5) <= 1.4


@pytest.mark.parametrize("limit", [87.0, 17.0, 8.0, 1.0])
def test_sigmoid_error(generator, limit):
    x = uniform(generator, -limit, limit)
    bound = 2.0**-14 + limit * 2.0**-17
    assert relative_error(sigmoid(x), torch.sigmoid(x.to(torch.float64))) <= bound


def test_activations_error(generator):
    """Half an ulp of FP16 is 2^-11 at most; the sigmoid may add 2^-13."""
    x, up = uniform(generator, -8.0, 20.0), uniform(generator, 0.5, 2.0)
    exact = torch.nn.functional.silu(x.to(torch.float64)) * up
    error = (gated(x, up, "silu") - exact).abs()
    assert (error <= exact.abs() * (2.0**-11 + 2.0**-13) + 2.0**-25).all()
    exact = torch.nn.functional.gelu(x.to(torch.float64), approximate="tanh") * up
    error = (gated(x, up, "gelu_tanh") - exact).abs()
    assert (error <= exact.abs() * (2.0**-11 + 2.0**-11) + 2.0**-20).all()


@pytest.mark.parametrize(
    ("table", "function", "bound"),
    [
        (POWER, lambda x: 2.0**-x, 2.0**-15),
        (SIGMOID, lambda x: 1 / (1 + x), 2.0**-15),
        (INVERSE, lambda x: 1 / (1 + x), 2.0**-24),
        (ROOTS[0], lambda x: (1 + x) ** -0.5, 2.0**-24),
        (ROOTS[1], lambda x: (2 + 2 * x) ** -0.5, 2.0**-24),
    ],
    ids=["power", "sigmoid", "inverse", "root", "root of double"],
)
def test_tables_error(table: FunctionTable, function, bound):
    """Every value of a table, and that all intermediate numbers have the bits that they should."""
    fraction_bits = table.index_bits + table.bits
    values = vector_ops._values(table)
    exact = function(np.arange(len(values)) / 2.0**fraction_bits)
    error = np.abs(values / 2.0**table.value_bits / exact - 1).max()
    print(f"largest error 2^{math.log2(error):.2f}")
    assert len(values) == 1 << fraction_bits and error <= bound
    assert values[0] == round(exact[0] * 2**table.value_bits) or function(0.0) != 1
    assert values.min() >= (1 << table.value_bits - 1) - (table is ROOTS[1])
    for x in (0, 1, len(values) // 3, len(values) - 1):
        assert table.value(x) == values[x]


@pytest.mark.parametrize("base", [10_000.0, 100_000.0, 1e6])
def test_rotary_table_error(generator, base):
    frequencies = rotary_frequencies(base, 64)
    exact = base ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert largest_error(frequencies, exact) <= 0.501
    positions = torch.randint(0, 1 << 20, (3000,), generator=generator)
    cos, sin = rotary_table(positions, frequencies)
    angles = positions.to(torch.float64)[:, None] * frequencies.to(torch.float64)
    assert largest_error(cos, angles.cos()) <= 0.501
    assert largest_error(sin, angles.sin()) <= 0.501


def test_rotary_divisors():
    plain = rotary_frequencies(10_000.0, 8)
    divided = rotary_frequencies(10_000.0, 8, (1.0, 2.0, 4.0, 8.0))
    assert torch.equal(divided * torch.tensor([1.0, 2.0, 4.0, 8.0]), plain)


def test_special_values():
    inf, nan = math.inf, math.nan
    x = torch.tensor([0.0, -0.0, -inf, inf, -104.0, 87.5, 1e-40])
    assert exponential(x).tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert exponential(torch.tensor([87.3])).item() > 2.0**-126  # hardly: nothing is subnormal
    assert reciprocal(torch.tensor([1.0, 2.0, 0.25, inf])).tolist() == [1.0, 0.5, 4.0, 0.0]
    assert rsqrt(torch.tensor([1.0, 4.0, 0.0625, inf])).tolist() == [1.0, 0.5, 4.0, 0.0]
    x = torch.tensor([0.0, -0.0, inf, -inf, -88.0, 40.0])
    assert sigmoid(x).tolist() == [0.5, 0.5, 1.0, 0.0, 0.0, 1.0]
    for function in (reciprocal, rsqrt, sigmoid):
        assert function(torch.tensor([nan])).isnan().all()
    one = torch.ones(1, 2)
    for activation in ("silu", "gelu_tanh"):
        got = bits(gated(torch.tensor([[nan, 1e9]]), one, activation))
        assert got.tolist() == [[0x7E00, 0x7C00]]
    with pytest.raises(ValueError, match="'relu' is neither silu nor gelu_tanh"):
        gated(one, one, "relu")


# Bits: FP32 steps once more on Berkeley SoftFloat, those in integers on Python's.


def soft(value: float) -> softfloatpy.Float32:
    """The FP32 number nearest to `value`; its operators +, -, * are SoftFloat's."""
    return softfloatpy.Float32.from_float(float(np.float32(value)))


def pattern(value: softfloatpy.Float32) -> int:
    return int.from_bytes(value.to_bytes(), "big", signed=True)


def slow_power(x: float) -> tuple[int, int]:
    """e^-|x| as p and n with p 2^-n in units of 2^-17."""
    log2_e = 189097  # log2(e) 2^17
    assert abs(log2_e / 2**17 - math.log2(math.e)) < 2.0**-18
    exponent = math.frexp(x)[1] - 18
    cut = math.floor(Fraction(abs(x)) / Fraction(2) ** exponent) * Fraction(2) ** exponent
    logarithm = math.floor(cut * log2_e / 2)  # exact until here
    n, f = divmod(logarithm, 2**16)
    i, g = divmod(f, 2**10)
    return POWER.c0[i] - g * POWER.c1[i] // 2**10, n


def slow_float32(significand: int, exponent: int) -> float:
    """significand 2^exponent, 0 where it is below 2^-126."""
    assert significand == np.float32(significand)
    value = Fraction(significand) * Fraction(2) ** exponent
    return float(value) if value >= Fraction(2) ** -126 else 0.0


def slow_exponential(x: float) -> float:
    p, n = slow_power(x)
    return slow_float32(p, -17 - n)


def slow_sigmoid(x: float) -> float:
    p, n = slow_power(x)
    t = p // 2 ** (n + 1)  # in units of 2^-16
    i, g = divmod(t, 2**9)
    r = 2**16 if i == 128 else SIGMOID.c0[i] - g * SIGMOID.c1[i] // 2**10
    if math.copysign(1.0, x) > 0:
        return r / 2**17
    product = r * p
    cut = product.bit_length() - 24
    return slow_float32(product >> cut, cut - 34 - n)


def slow_reciprocal(x: float) -> float:
    exponent = math.frexp(x)[1] - 1
    i, g = divmod(int((x / 2.0**exponent - 1) * 2**23), 2**16)
    y = INVERSE.c0[i] - g * (INVERSE.c1[i] - (g // 16) * INVERSE.c2[i] // 2**12) // 2**16
    return slow_float32((y + 2) // 4, -24 - exponent)


def slow_rsqrt(x: float) -> float:
    exponent = math.frexp(x)[1] - 1
    table = ROOTS[exponent % 2]
    i, g = divmod(int((x / 2.0**exponent - 1) * 2**23), 2**16)
    y = table.c0[i] - g * (table.c1[i] - (g // 16) * table.c2[i] // 2**12) // 2**16
    return slow_float32((y + 2) // 4, -24 - exponent // 2)


def assert_slow_bits(function, slow_function, x: torch.Tensor) -> None:
    expected = torch.tensor([slow_function(value) for value in x.tolist()])
    for value, e, g in zip(
        x.tolist(), bits(expected).tolist(), bits(function(x)).tolist(), strict=True
    ):
        assert e == g, f"{function.__name__}({value!r}): expected {e:08x}, got {g:08x}"


def test_functions_bits_are_those_of_integers(generator):
    for limit in (1e-7, 1.0, 20.0, 130.0):
        x = uniform(generator, -limit, limit, 2000)
        assert_slow_bits(exponential, slow_exponential, x)
        assert_slow_bits(sigmoid, slow_sigmoid, x)
    powers = torch.exp2(torch.randint(-100, 100, (4000,), generator=generator).float())
    numbers = uniform(generator, 1.0, 2.0, 4000) * powers
    starts = torch.arange(1.0, 4.0, 1 / 128)  # both ends of every interval of the tables
    ends = torch.nextafter(starts, torch.zeros(()))[1:]
    for x in (numbers, starts, ends):
        assert_slow_bits(reciprocal, slow_reciprocal, x)
        assert_slow_bits(rsqrt, slow_rsqrt, x)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_bits_are_those_of_softfloat(generator, activation):
    gate, up = uniform(generator, -12.0, 12.0, 2000), uniform(generator, -9.0, 9.0, 2000)
    linear = 2 * math.sqrt(2 / math.pi)
    got = gated(gate, up, activation)
    for i, (x, y) in enumerate(zip(gate.tolist(), up.tolist(), strict=True)):
        z = soft(x)
        if activation == "gelu_tanh":
            z = ((z * z) * soft(0.044715 * linear) + soft(linear)) * z
        result = (soft(x) * soft(y)) * soft(slow_sigmoid(z.to_float()))
        expected = to_float16(torch.tensor(result.to_float()))
        assert bits(expected) == bits(got[i]), f"{x!r}, {y!r}"


def soft_row_sum(row: list) -> softfloatpy.Float32:
    sums = [soft(0.0)] * 64
    for i, x in enumerate(row):
        sums[i % 64] = sums[i % 64] + x
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [a + b for a, b in zip(sums[:half], sums[half:], strict=True)]
    return sums[0]


@pytest.mark.parametrize("n", [1, 2, 3, 44, 64, 172, 576])
def test_rms_norm_bits_are_those_of_softfloat(generator, n):
    x = torch.randn(3, n, generator=generator) * 10
    weight = torch.randn(n, generator=generator).half()
    for row, got in zip(x.tolist(), bits(rms_norm(x, weight, 1e-5)).tolist(), strict=True):
        total = soft_row_sum([soft(v) * soft(v) for v in row])
        scale = soft(slow_rsqrt((total * soft(1 / n) + soft(1e-5)).to_float()))
        expected = [(soft(v) * scale) * soft(w) for v, w in zip(row, weight.tolist(), strict=True)]
        assert got == [pattern(e) for e in expected]


@pytest.mark.parametrize("n", [2, 20, 64, 96, 256])
def test_head_norm_takes_the_sum_over_neighbouring_pairs(generator, n):
    x = torch.randn(30, 2, n, generator=generator) * 10
    weight = torch.randn(n, generator=generator).half()
    order = [element for i in range(n // 2) for element in (i, i + n // 2)]
    assert rotary_order(n).tolist() == order
    # The scale is that of the heads as they lie in hardware; there the whole norm is the same.
    expected = torch.empty_like(x)
    expected[..., order] = rms_norm(x[..., order].contiguous(), weight[order], 1e-5)
    got = head_norm(x, weight, 1e-5)
    assert torch.equal(bits(got), bits(expected))
    if n > 2:
        assert not torch.equal(bits(got), bits(rms_norm(x, weight, 1e-5)))


# Independence of the batch and of the layout.


def test_rows_do_not_depend_on_the_batch_or_the_layout(generator):
    x = torch.randn(8, 3, 172, generator=generator) * 5
    weight = torch.randn(172, generator=generator).half()
    cos, sin = rotary_table(torch.arange(8), rotary_frequencies(1e4, 172))
    allowed = torch.rand(8, 3, 172, generator=generator) < 0.8
    allowed[..., 0] = True
    functions = {
        "row_sum": lambda x, rows: row_sum(x),
        "exponential": lambda x, rows: exponential(x),
        "sigmoid": lambda x, rows: sigmoid(x),
        "rms_norm": lambda x, rows: rms_norm(x, weight, 1e-5),
        "head_norm": lambda x, rows: head_norm(x, weight, 1e-5),
        "rotate": lambda x, rows: rotate(x, cos[rows], sin[rows]),
        "silu": lambda x, rows: gated(x, x, "silu"),
        "gelu_tanh": lambda x, rows: gated(x, x, "gelu_tanh"),
        "softmax weights": lambda x, rows: softmax_weights(x, allowed[rows], 0.3)[0],
        "denominators": lambda x, rows: softmax_weights(x, allowed[rows], 0.3)[1],
    }
    strided = x.transpose(0, 2).contiguous().transpose(0, 2)
    wide = torch.zeros(8, 3, 400)[..., 1:345:2].copy_(x)
    for name, function in functions.items():
        together = bits(function(x, slice(None)))
        for other in (strided, wide):
            assert torch.equal(bits(function(other, slice(None))), together), name
        for row in range(8):
            alone = bits(function(x[row : row + 1], slice(row, row + 1)))
            assert torch.equal(alone, together[row : row + 1]), name


def test_row_sum_has_a_fixed_order():
    """Sums whose value depends on the order: 1 + 2^-24 rounds the small term away."""
    small = 2.0**-24
    x = torch.zeros(130)
    x[[0, 64]] = torch.tensor([1.0, small])
    x[128] = small
    assert row_sum(x).item() == 1.0  # one after the other, in the same partial sum
    x = torch.zeros(130)
    x[[0, 1, 65]] = torch.tensor([1.0, small, small])
    assert row_sum(x).item() == 1.0 + 2 * small  # in two partial sums
    x = torch.zeros(64)
    x[[0, 16, 48]] = torch.tensor([1.0, small, small])  # the halves meet first
    assert row_sum(x).item() == 1.0 + 2 * small
    x = torch.zeros(64)
    x[[0, 16, 32]] = torch.tensor([1.0, small, small])
    assert row_sum(x).item() == 1.0
    assert row_sum(torch.full((7,), 3.0)).item() == 21.0


# Softmax.


def test_softmax_denominator_is_the_arrays_product_with_ones(generator):
    scores = torch.randn(6, 1000, generator=generator) * 30
    weights, sums = softmax_weights(scores, torch.ones(6, 1000, dtype=torch.bool), 0.125)
    product = verify_gemm(weights, torch.ones(1, 1000, dtype=torch.float16))
    assert torch.equal(bits(sums), bits(product[:, 0]))


def test_softmax_ignores_order_and_masked_positions(generator):
    scores = torch.randn(5, 40, generator=generator) * 20
    allowed = torch.rand(5, 40, generator=generator) < 0.7
    allowed[:, 7] = True
    weights, sums = softmax_weights(scores, allowed, 0.125)
    order = torch.randperm(40, generator=generator)
    shuffled, shuffled_sums = softmax_weights(scores[:, order], allowed[:, order], 0.125)
    assert torch.equal(bits(shuffled), bits(weights[:, order]))
    assert torch.equal(bits(shuffled_sums), bits(sums))
    disturbed = torch.where(allowed, scores, torch.nan)
    disturbed[:, :20] = torch.where(allowed[:, :20], scores[:, :20], torch.inf)
    weights_again, sums_again = softmax_weights(disturbed, allowed, 0.125)
    assert torch.equal(bits(weights_again), bits(weights))
    assert torch.equal(bits(sums_again), bits(sums))
    assert (weights[~allowed] == 0).all()


def test_a_score_that_is_nan_counts_as_minus_infinity():
    """Wherever it is: it is never the largest, and its weight is 0."""
    scores = torch.tensor([0.5, -3.0, 2.0, 1.0])
    expected, denominator = softmax_weights(scores, torch.ones(4, dtype=torch.bool), 0.25)
    for place in range(5):
        values = [*scores[:place].tolist(), math.nan, *scores[place:].tolist()]
        weights, total = softmax_weights(
            torch.tensor(values), torch.ones(5, dtype=torch.bool), 0.25
        )
        assert weights[place] == 0 and total == denominator
        assert torch.equal(torch.cat([weights[:place], weights[place + 1 :]]), expected)


def test_softmax_error(generator):
    scores = torch.randn(20, 300, generator=generator) * 16
    values = torch.randn(32, 300, generator=generator).half()
    weights, sums = softmax_weights(scores, torch.ones(20, 300, dtype=torch.bool), 0.125)
    result = normalize(verify_gemm(weights, values), sums)
    exact = (scores.to(torch.float64) * 0.125).softmax(-1) @ values.to(torch.float64).T
    error = (result.to(torch.float64) - exact).abs().max().item()
    print(f"largest error of the attention output {error:.2e}")
    assert error < 2e-3


def test_rms_norm_and_rotation_error(generator):
    x = torch.randn(16, 4, 64, generator=generator) * 3
    weight = torch.randn(64, generator=generator).half()
    wide = x.to(torch.float64)
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    assert ((rms_norm(x, weight, 1e-6) - exact).abs() <= 4e-7 * exact.abs()).all()
    cos, sin = rotary_table(torch.arange(100, 116), rotary_frequencies(1e4, 64))
    rotated = rotate(x, cos, sin).to(torch.float64)
    pairs = torch.complex(wide[..., :32], wide[..., 32:])
    turned = pairs * torch.complex(cos, sin).to(torch.complex128)[:, None]
    exact = torch.cat((turned.real, turned.imag), dim=-1)
    assert ((rotated - exact).abs() <= 2.0**-11 * exact.abs() + 1e-5).all()
