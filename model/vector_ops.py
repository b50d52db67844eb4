# SPDX-License-Identifier: Apache-2.0
"""All that a pass computes outside the array, to the bit: norms, RoPE, softmax, activations.

This file is a specification that hardware can implement. Its rules:

- Every step is one FP32 addition, subtraction or multiplication, elementwise, rounded to nearest
  even, subnormals included; no step is fused with another. Comparisons, maxima, sign and exponent
  changes are exact. There is no division and no call of a mathematical library: `exp`, `reciprocal`
  and `rsqrt` are given below by range reduction, a table or polynomial, and Newton steps.
- Sums over a row have one fixed order (`tree_sum`) or are exact (`softmax_weights`). So the bits of
  a row depend on that row alone, never on which other rows share the pass, nor on the tensor's
  layout.
- The residual stream stays outside the array and is FP32. Values are rounded to FP16 exactly where
  they enter the array: normalised activations, rotated queries and keys, values, softmax weights,
  attention outputs and gated FFN activations.
- NaN stays NaN and becomes 0x7e00 where it enters the array; the payload of an FP32 NaN is
  undefined.

Maximum errors, measured against float64 by tests/model/test_vector_ops.py (1 ulp = spacing of FP32
at the exact result): exp 1.0, reciprocal 1.25, rsqrt 1.25, sigmoid 2.7, SiLU 4.0 ulp.

Elementary functions are of NumPy arrays, float32, as NumPy takes a third of PyTorch's time to start
an operation, and most have few elements; what a pass calls takes and gives tensors.

Constant tables (the seeds of the Newton steps, the rotary sines and cosines) are not computed by
the hardware but loaded into it; they are computed here by algorithms as explicit as the rest.
"""

import math
from decimal import Context, Decimal

import numpy as np
import torch

from speq.model.arith import to_float16

_LOG2_E = 1.44269504088896341
_LN2_HIGH = 0.693359375  # 9 significant bits: times an integer below 2^15 it is exact
_LN2_LOW = -2.12194440e-4
_EXP_POLYNOMIAL = (  # (e^r - 1 - r) / r^2 for |r| <= ln(2)/2, highest power first; Cephes expf
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_HALF_PI_PARTS = (  # 33 bits, the next 33 bits, the rest: pi/2 to 119 bits; fdlibm e_rem_pio2
    1.57079632673412561417,
    6.07710050630396597660e-11,
    2.02226624879595063154e-21,
)
_ROUND_FP32 = 1.5 * 2.0**23  # adding and subtracting it rounds to an integer, to nearest even
_ROUND_FP64 = 1.5 * 2.0**52


# Overflow and NaN are results like others.
_quiet = np.errstate(all="ignore")


def _seed_table(root: bool) -> np.ndarray:
    """Newton seeds, 8 fraction bits each: 1/c, or 1/sqrt(c), at the centres c of the intervals that
    the top six mantissa bits tell apart: [1, 2) in 64 intervals, for the root also [2, 4) in 64."""
    seeds = []
    for i in range(128 if root else 64):
        centre = (129 + 2 * (i % 64)) << (i // 64)  # in units of 1/128
        square = (1 << 25 if root else 1 << 32) // centre  # (256/sqrt(c))^2 * 4 or (256/c) * 2^17
        seeds.append((math.isqrt(square) + 1) // 2 if root else (square + (1 << 16)) >> 17)
    return np.array(seeds, np.float32) / 256


_RECIPROCAL_SEEDS = _seed_table(root=False)
_RSQRT_SEEDS = _seed_table(root=True)


def _power_of_two(exponent: np.ndarray) -> np.ndarray:
    """2^exponent as float32, for int32 exponents -126..127: the exponent field, no arithmetic."""
    return ((exponent + 127) << 23).view(np.float32)


def tree_sum(x: np.ndarray) -> np.ndarray:
    """Sum over the last dimension, float32 [..., N] -> [...]. The row is padded with +0 to a power
    of two and the upper half is added to the lower half until one element is left."""
    n = x.shape[-1]
    width = 1 << (n - 1).bit_length()
    padded = np.zeros((*x.shape[:-1], width), np.float32)
    padded[..., :n] = x
    while width > 1:
        width //= 2
        padded = padded[..., :width] + padded[..., width:]
    return padded[..., 0]


def exp(x: np.ndarray) -> np.ndarray:
    """e^x in float32, any shape. x = n ln 2 + r with n the integer nearest to x / ln 2 and ln 2 in
    two parts; a polynomial of degree 7 in r; then 2^n in two exact factors, so that only a
    subnormal or infinite result is rounded again. Exact at -inf (0), 0 (1) and +inf."""
    # Beyond these the result is 0 or infinite anyway.
    x = np.minimum(np.maximum(x, np.float32(-104.0)), np.float32(89.0))
    n = (x * _LOG2_E + _ROUND_FP32) - _ROUND_FP32
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = np.full_like(r, _EXP_POLYNOMIAL[0])
    for coefficient in _EXP_POLYNOMIAL[1:]:
        p = p * r + coefficient
    y = (p * (r * r) + r) + 1.0
    n = np.where(np.isnan(n), 0.0, n).astype(np.int32)
    half = n >> 1
    return (y * _power_of_two(half)) * _power_of_two(n - half)


def reciprocal(x: np.ndarray) -> np.ndarray:
    """1/x in float32 for x from 2^-125 to below 2^126; +inf gives 0, NaN NaN. With m in [1, 2) the
    mantissa of x: a seed of 8 bits from the top six mantissa bits, then twice y += y * (1 - m *
    y)."""
    bits = x.view(np.int32)
    m = ((bits & 0x007FFFFF) | 0x3F800000).view(np.float32)
    y = _RECIPROCAL_SEEDS[(bits >> 17) & 63]
    for _ in range(2):
        y = y + y * (1.0 - m * y)
    y = y * _power_of_two(127 - np.minimum(np.maximum(bits >> 23 & 255, 2), 252))
    return _limits(x, y)


def rsqrt(x: np.ndarray) -> np.ndarray:
    """1/sqrt(x) in float32 for normal x > 0; +inf gives 0, NaN NaN. With x = m * 4^n, m in [1, 4):
    a seed of 8 bits from n's parity and the top six mantissa bits, then twice y += (y / 2) * (1 -
    (m * y) * y)."""
    bits = x.view(np.int32)
    exponent = (bits >> 23 & 255) - 127
    odd = exponent & 1
    m = ((bits & 0x007FFFFF) | ((127 + odd) << 23)).view(np.float32)
    y = _RSQRT_SEEDS[(odd << 6) | (bits >> 17) & 63]
    for _ in range(2):
        y = y + (0.5 * y) * (1.0 - (m * y) * y)
    y = y * _power_of_two(-((exponent - odd) >> 1))
    return _limits(x, y)


def _limits(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """y, but 0 where x is infinite and NaN where it is NaN."""
    return np.where(np.isfinite(x), y, np.where(np.isinf(x), np.float32(0.0), x))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x) in float32: with t = e^-|x|, the reciprocal of 1 + t, times t if x < 0."""
    t = exp(-np.abs(x))
    return np.where(x < 0, t, np.float32(1.0)) * reciprocal(1.0 + t)


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x), float32."""
    return x * sigmoid(x)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """GELU in its tanh form, float32: 0.5 x (1 + tanh(u)) = x * sigmoid(2u) with
    2u = 2 sqrt(2/pi) * (x + 0.044715 x^3)."""
    cube = (x * x) * x
    return x * sigmoid((x + 0.044715 * cube) * (2.0 * math.sqrt(2.0 / math.pi)))


def _half(y: np.ndarray) -> torch.Tensor:
    """float32 values as the array takes them."""
    return to_float16(torch.from_numpy(y))


@_quiet
def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up, float32 [T, F] -> float16; activation is "silu" or "gelu_tanh"."""
    function = {"silu": silu, "gelu_tanh": gelu_tanh}[activation]
    return _half(function(gate.numpy()) * up.numpy())


@_quiet
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension in float32: (x * rsqrt(mean(x^2) + eps)) * weight, the mean
    being `tree_sum` times the FP32 nearest to 1/N. x float32 [..., N], weight float16 [N]."""
    values = x.numpy()
    mean = tree_sum(values * values) * (1.0 / values.shape[-1])
    scale = rsqrt(np.asarray(mean + eps))[..., None]
    return torch.from_numpy((values * scale) * weight.numpy().astype(np.float32))


def rotary_frequencies(
    base: float, head_dim: int, divisors: tuple[float, ...] | None = None
) -> torch.Tensor:
    """Angle per position of each rotary pair, float32 [head_dim / 2]: base^(-2i/head_dim), divided
    by divisors[i] if given; in 40-digit decimal arithmetic, then rounded to FP32 by way of FP64."""
    context = Context(prec=40)
    frequencies = []
    for i in range(head_dim // 2):
        exponent = context.divide(Decimal(-2 * i), Decimal(head_dim))
        frequency = context.power(Decimal(base), exponent)
        divisor = Decimal(divisors[i]) if divisors else Decimal(1)
        frequencies.append(float(context.divide(frequency, divisor)))
    return torch.tensor(frequencies, dtype=torch.float64).to(torch.float32)


def rotary_table(
    positions: torch.Tensor, frequencies: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of positions [T] * frequencies [D/2], float32 [T, D/2] each.

    A constant table. The angle is exact in FP64 (positions below 2^29); pi/2 is subtracted in three
    parts; Taylor polynomials on [-pi/4, pi/4] in FP64, one operation per step; rounded to FP32 (at
    most 0.501 ulp from the exact value).
    """
    angle = positions.numpy().astype(np.float64)[:, None] * frequencies.numpy().astype(np.float64)
    quarter = (angle * (2.0 / math.pi) + _ROUND_FP64) - _ROUND_FP64
    r = angle
    for part in _HALF_PI_PARTS:
        r = r - quarter * part
    square = r * r
    sine = np.zeros_like(r)
    cosine = np.zeros_like(r)
    for n in range(8, -1, -1):
        sign = -1.0 if n % 2 else 1.0
        sine = sine * square + sign / math.factorial(2 * n + 1)
        cosine = cosine * square + sign / math.factorial(2 * n)
    sine = sine * r
    turn = quarter.astype(np.int64) & 3
    swap = (turn & 1).astype(bool)
    cos = np.where(swap, sine, cosine) * np.where((turn == 1) | (turn == 2), -1.0, 1.0)
    sin = np.where(swap, cosine, sine) * np.where(turn >= 2, -1.0, 1.0)
    return torch.from_numpy(cos.astype(np.float32)), torch.from_numpy(sin.astype(np.float32))


@_quiet
def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding: float32 x [T, heads, D] with tables [T, D/2] -> float16. The pair (a, b) at
    (i, i + D/2) becomes (a cos - b sin, b cos + a sin), each product and each sum rounded."""
    values = x.numpy()
    half = values.shape[-1] // 2
    a, b = values[..., :half], values[..., half:]
    c, s = cos.numpy()[:, None], sin.numpy()[:, None]
    return _half(np.concatenate((a * c - b * s, b * c + a * s), axis=-1))


@_quiet
def softmax_weights(
    scores: torch.Tensor, allowed: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax in the form that the array wants: unnormalised weights and what to divide by.

    scores float32 [..., S] are the query-key products, allowed bool [..., S] the positions that a
    row attends to, at least one. weights[j] = FP16(exp(scale * scores[j] - max)), max over the
    allowed positions, 0 elsewhere; denominators [...] = their sum. The array multiplies the weights
    with the values and `normalize` divides the result. FP16 weights are integers times 2^-24, so
    their sum is exact (in FP64, for S below 2^29) and rounded once: it is the array's own product
    of the weights with ones, and like it independent of order and of positions that are not
    allowed.
    """
    seen = allowed.numpy()
    scaled = np.where(seen, scores.numpy() * scale, np.float32(-math.inf))
    largest = scaled.max(axis=-1, keepdims=True)
    weights = _half(np.where(seen, exp(scaled - largest), np.float32(0.0)))
    sums = weights.numpy().sum(axis=-1, dtype=np.float64).astype(np.float32)
    return weights, torch.from_numpy(np.asarray(sums))


@_quiet
def normalize(values: torch.Tensor, denominators: torch.Tensor) -> torch.Tensor:
    """Attention output: float32 [..., D] times the reciprocal of denominators [...] -> float16."""
    return _half(values.numpy() * reciprocal(denominators.numpy())[..., None])


def ranked(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Indices, int64, of the `count` largest of logits [V], the largest first.

    Of equal ones the lowest index comes first. A NaN counts as minus infinity.
    """
    logits = torch.where(logits.isnan(), -math.inf, logits)
    least = torch.topk(logits, min(count, len(logits))).values[-1]
    # topk promises nothing about ties; nonzero gives rising indices, which a stable sort keeps.
    indices = (logits >= least).nonzero()[:, 0]
    order = torch.sort(logits[indices], descending=True, stable=True).indices
    return indices[order[:count]]
