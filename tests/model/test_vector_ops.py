# SPDX-License-Identifier: Apache-2.0
"""The vector operations: accuracy against float64, bits against Berkeley SoftFloat, independence of
batch and layout."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import wraps

import numpy as np
import pytest
import softfloatpy
import torch

from speq.model import vector_ops
from speq.model.arith import verify_gemm
from speq.model.vector_ops import (
    gated,
    normalize,
    rms_norm,
    rotary_frequencies,
    rotary_table,
    rotate,
    softmax_weights,
)

SEED = int(os.environ.get("SPEQ_SEED", "0"))
MANTISSAS = torch.arange(0x3F800000, 0x40800000, 3, dtype=torch.int32).view(torch.float32)  # [1, 4)


def _of_tensors(function: Callable[[np.ndarray], np.ndarray]) -> Callable:
    """A function of arrays as one of tensors."""

    @wraps(function)
    def call(x: torch.Tensor) -> torch.Tensor:
        with np.errstate(all="ignore"):
            return torch.from_numpy(np.asarray(function(x.numpy())))

    return call


exp, reciprocal, rsqrt = map(_of_tensors, (vector_ops.exp, vector_ops.reciprocal, vector_ops.rsqrt))
sigmoid, silu = map(_of_tensors, (vector_ops.sigmoid, vector_ops.silu))
gelu_tanh, tree_sum = map(_of_tensors, (vector_ops.gelu_tanh, vector_ops.tree_sum))


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


def bits(tensor: torch.Tensor) -> torch.Tensor:
    size = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return tensor.contiguous().view(size)


def uniform(generator: torch.Generator, low: float, high: float, count: int = 500_000):
    return torch.rand(count, generator=generator) * (high - low) + low


# The errors that the module's docstring states.


@pytest.mark.parametrize("low", [-87.3, -1.0, -1e-3])
def test_exp_error(generator, low):
    x = uniform(generator, low, -low)
    assert largest_error(exp(x), x.to(torch.float64).exp()) <= 1.0


def test_exp_error_of_subnormal_results(generator):
    x = uniform(generator, -103.9, -87.3)
    assert largest_error(exp(x), x.to(torch.float64).exp()) <= 1.0


def test_reciprocal_error():
    for scale in (2.0**-125, 1.0, 2.0**124):
        x = MANTISSAS * scale
        assert largest_error(reciprocal(x), 1 / x.to(torch.float64)) <= 1.25


def test_rsqrt_error():
    for scale in (2.0**-126, 1.0, 2.0**126):
        x = MANTISSAS[MANTISSAS * scale < torch.inf] * scale
        assert largest_error(rsqrt(x), x.to(torch.float64) ** -0.5) <= 1.25


def test_sigmoid_error(generator):
    x = uniform(generator, -87.0, 87.0)
    assert largest_error(sigmoid(x), torch.sigmoid(x.to(torch.float64))) <= 2.7


def test_activations_error(generator):
    x = uniform(generator, -20.0, 20.0)
    exact = torch.nn.functional.silu(x.to(torch.float64))
    assert largest_error(silu(x), exact) <= 4.0
    exact = torch.nn.functional.gelu(x.to(torch.float64), approximate="tanh")
    assert (gelu_tanh(x) - exact).abs().max() <= 2e-6


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
    x = torch.tensor([0.0, -0.0, -inf, -104.0, inf, 88.8])
    assert exp(x).tolist() == [1.0, 1.0, 0.0, 0.0, inf, inf]
    assert reciprocal(torch.tensor([1.0, 2.0, 0.25, inf])).tolist() == [1.0, 0.5, 4.0, 0.0]
    assert rsqrt(torch.tensor([1.0, 4.0, 0.0625, inf])).tolist() == [1.0, 0.5, 4.0, 0.0]
    assert sigmoid(torch.tensor([0.0, inf, -inf])).tolist() == [0.5, 1.0, 0.0]
    for function in (exp, reciprocal, rsqrt, sigmoid, silu, gelu_tanh):
        assert function(torch.tensor([nan])).isnan().all()
    one = torch.ones(1, 2)
    assert bits(gated(torch.tensor([[nan, 1e30]]), one, "silu")).tolist() == [[0x7E00, 0x7C00]]


# Bits: the same algorithms once more, a step at a time, on Berkeley SoftFloat.


def soft(value: float) -> softfloatpy.Float32:
    """The FP32 number nearest to `value`; its operators +, -, * are SoftFloat's."""
    return softfloatpy.Float32.from_float(float(np.float32(value)))


def soft_tree_sum(row: list) -> softfloatpy.Float32:
    if len(row) == 1:
        return row[0]
    half = (1 << (len(row) - 1).bit_length()) // 2
    upper = row[half:] + [soft(0.0)] * (2 * half - len(row))
    return soft_tree_sum([a + b for a, b in zip(row[:half], upper, strict=True)])


def soft_exp(value: float) -> softfloatpy.Float32:
    x, magic = soft(min(max(value, -104.0), 89.0)), soft(1.5 * 2**23)
    n = (x * soft(1 / math.log(2)) + magic) - magic
    r = (x - n * soft(0.693359375)) - n * soft(-2.12194440e-4)
    p = soft(vector_ops._EXP_POLYNOMIAL[0])
    for coefficient in vector_ops._EXP_POLYNOMIAL[1:]:
        p = p * r + soft(coefficient)
    y = (p * (r * r) + r) + soft(1.0)
    half = int(n.to_float()) // 2
    return (y * soft(2.0**half)) * soft(2.0 ** (int(n.to_float()) - half))


def soft_reciprocal(x: float) -> softfloatpy.Float32:
    exponent = math.frexp(x)[1] - 1
    m = x / 2.0**exponent
    centre = (math.floor(m * 64) + 0.5) / 64
    y = soft(math.floor(256 / centre + 0.5) / 256)
    for _ in range(2):
        y = y + y * (soft(1.0) - soft(m) * y)
    return y * soft(2.0**-exponent)


def soft_rsqrt(x: float) -> softfloatpy.Float32:
    n = (math.frexp(x)[1] - 1) // 2
    m = x / 4.0**n
    step = 64 if m < 2 else 32
    centre = (math.floor(m * step) + 0.5) / step
    y = soft(math.floor(256 / math.sqrt(centre) + 0.5) / 256)
    for _ in range(2):
        y = y + (soft(0.5) * y) * (soft(1.0) - (soft(m) * y) * y)
    return y * soft(2.0**-n)


def soft_silu(x: float) -> softfloatpy.Float32:
    t = soft_exp(-abs(x))
    inverse = soft_reciprocal((soft(1.0) + t).to_float())
    return soft(x) * ((t if x < 0 else soft(1.0)) * inverse)


def assert_soft_bits(function, soft_function, x: torch.Tensor) -> None:
    got = bits(function(x)).tolist()
    for value, pattern in zip(x.tolist(), got, strict=True):
        expected = int.from_bytes(soft_function(value).to_bytes(), "big", signed=True)
        assert pattern == expected, f"{function.__name__}({value!r}): {pattern:08x} {expected:08x}"


def test_bits_are_those_of_softfloat(generator):
    assert_soft_bits(exp, soft_exp, uniform(generator, -110.0, 95.0, 2000))
    assert_soft_bits(exp, soft_exp, uniform(generator, -1.0, 1.0, 2000))
    powers = torch.exp2(torch.randint(-100, 100, (4000,), generator=generator).float())
    numbers = uniform(generator, 1.0, 2.0, 4000) * powers
    assert_soft_bits(reciprocal, soft_reciprocal, numbers)
    assert_soft_bits(rsqrt, soft_rsqrt, numbers)
    assert_soft_bits(silu, soft_silu, uniform(generator, -90.0, 90.0, 2000))
    starts = torch.arange(1.0, 4.0, 1 / 64)  # both ends of every interval of the seed tables
    ends = torch.nextafter(starts, torch.zeros(()))[1:]
    assert_soft_bits(reciprocal, soft_reciprocal, torch.cat((starts, ends)))
    assert_soft_bits(rsqrt, soft_rsqrt, torch.cat((starts, ends)))


@pytest.mark.parametrize("n", [1, 2, 3, 44, 172, 576])
def test_rms_norm_bits_are_those_of_softfloat(generator, n):
    x = torch.randn(3, n, generator=generator) * 10
    weight = torch.randn(n, generator=generator).half()
    for row, got in zip(x.tolist(), bits(rms_norm(x, weight, 1e-5)).tolist(), strict=True):
        total = soft_tree_sum([soft(v) * soft(v) for v in row])
        scale = soft_rsqrt((total * soft(1 / n) + soft(1e-5)).to_float())
        expected = [(soft(v) * scale) * soft(w) for v, w in zip(row, weight.tolist(), strict=True)]
        assert got == [int.from_bytes(e.to_bytes(), "big", signed=True) for e in expected]


# Independence of the batch and of the layout.


def test_rows_do_not_depend_on_the_batch_or_the_layout(generator):
    x = torch.randn(8, 3, 172, generator=generator) * 5
    weight = torch.randn(172, generator=generator).half()
    cos, sin = rotary_table(torch.arange(8), rotary_frequencies(1e4, 172))
    allowed = torch.rand(8, 3, 172, generator=generator) < 0.8
    allowed[..., 0] = True
    functions = {
        "tree_sum": lambda x, rows: tree_sum(x),
        "exp": lambda x, rows: exp(x),
        "sigmoid": lambda x, rows: sigmoid(x),
        "gelu_tanh": lambda x, rows: gelu_tanh(x),
        "rms_norm": lambda x, rows: rms_norm(x, weight, 1e-5),
        "rotate": lambda x, rows: rotate(x, cos[rows], sin[rows]),
        "gated": lambda x, rows: gated(x, x, "silu"),
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


def test_tree_sum_is_a_fixed_tree():
    """Sums whose value depends on the order: (1 + 2^-24) + ... rounds the small terms away."""
    small = 2.0**-24
    assert tree_sum(torch.tensor([1.0, small, 0.0, small])).item() == 1.0 + 2 * small
    assert tree_sum(torch.tensor([1.0, 0.0, small, small])).item() == 1.0
    assert tree_sum(torch.tensor([1.0, small, small])).item() == 1.0
    assert tree_sum(torch.full((7,), 3.0)).item() == 21.0


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


def test_seed_tables_bound_the_newton_error():
    """Eight-bit seeds: two Newton steps square the relative error twice, to below FP32's."""
    points = MANTISSAS[MANTISSAS < 2]
    seeds = torch.from_numpy(vector_ops._RECIPROCAL_SEEDS)[(bits(points) >> 17) & 63]
    assert ((seeds * points - 1).abs().max().item()) ** 4 < 2.0**-25
    odd = (MANTISSAS >= 2).to(torch.int64)
    seeds = torch.from_numpy(vector_ops._RSQRT_SEEDS)[(odd << 6) | ((bits(MANTISSAS) >> 17) & 63)]
    error = (seeds * MANTISSAS.sqrt() - 1).abs().max().item()
    assert 1.5 * (1.5 * error**2) ** 2 < 2.0**-24
