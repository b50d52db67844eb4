# SPDX-License-Identifier: Apache-2.0
"""All that a pass computes outside the array, to the bit: norms, RoPE, softmax, activations.

This file is a specification that hardware implements (`speq.hw.vector`). Its rules:

- Every step is one FP32 addition, subtraction or multiplication, elementwise, rounded to nearest
  even, subnormals included; no step is fused with another. Comparisons, maxima, sign and exponent
  changes are exact. There is no division and no call of a mathematical library: `exponential`,
  `sigmoid`, `reciprocal` and `rsqrt` are a few steps in integers, with the tables of
  `speq.model.function_tables`.
- Sums over a row have one fixed order (`row_sum`; of heads `head_norm`) or are exact
  (`softmax_weights`). So the bits of a row depend on that row alone, never on which other rows
  share the pass, nor on the tensor's layout, nor on how many elements the hardware takes at a time.
- The residual stream stays outside the array and is FP32. Values are rounded to FP16 exactly where
  they enter the array: normalised activations, rotated queries and keys, values, softmax weights,
  attention outputs and gated FFN activations.
- NaN stays NaN and becomes 0x7e00 where it enters the array; the payload of an FP32 NaN is
  undefined.

Maximum errors, measured against float64 by tests/model/test_vector_ops.py: reciprocal and rsqrt 1.4
ulp (spacings of FP32 at the exact result); exponential and sigmoid 2^-14 + |x| 2^-17 of the exact
value, as their results are rounded to FP16's 11 bits.

Elementary functions are of NumPy arrays, float32, as NumPy takes a third of PyTorch's time to start
an operation, and most have few elements; what a pass calls takes and gives tensors.

Constant tables (those of the functions, the rotary sines and cosines) are not computed by the
hardware but loaded into it; they are computed here by algorithms as explicit as the rest.
"""

import math
from decimal import Context, Decimal
from functools import cache

import numpy as np
import torch

from speq.model.arith import to_float16
from speq.model.function_tables import (
    INVERSE,
    LOG2_E,
    LOG2_E_BITS,
    LOGARITHM_BITS,
    LOGARITHM_SIGNIFICAND,
    POWER,
    ROOTS,
    SIGMOID,
    FunctionTable,
)

#: Partial sums of `row_sum`.
PARTIAL_SUMS = 64
_HALF_PI_PARTS = (  # 33 bits, the next 33 bits, the rest: pi/2 to 119 bits; fdlibm e_rem_pio2
    1.57079632673412561417,
    6.07710050630396597660e-11,
    2.02226624879595063154e-21,
)
_ROUND_FP64 = 1.5 * 2.0**52


# Overflow and NaN are results like others.
_quiet = np.errstate(all="ignore")


class _Table:
    """Tables of `speq.model.function_tables` as arrays, one behind the other."""

    def __init__(self, *parts: FunctionTable) -> None:
        self._shape = parts[0]
        rows = (sum((getattr(part, name) for part in parts), ()) for name in ("c0", "c1", "c2"))
        self._c0, self._c1, self._c2 = (np.array(row, np.int64) for row in rows)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Values of fractions int64."""
        shape = self._shape
        i, g = x >> shape.bits, x & (1 << shape.bits) - 1
        slope = self._c1[i]
        if shape.drop is not None:
            slope = slope - ((g >> shape.drop) * self._c2[i] >> shape.shift2)
        return self._c0[i] - (g * slope >> shape.shift1)


@cache
def _values(table: FunctionTable) -> np.ndarray:
    """All values of a table, int32: for many elements it is faster to look them up."""
    fractions = np.arange(1 << table.index_bits + table.bits, dtype=np.int64)
    return _Table(table)(fractions).astype(np.int32)


_inverse, _inverse_root = _Table(INVERSE), _Table(*ROOTS)
_FRACTION = 0x7FFFFF
_FIRST_24_BITS = ~((1 << 29) - 1)  # of a float64's significand
_LOGARITHM_MASK = 0x7FFFFFFF & ~((1 << 24 - LOGARITHM_SIGNIFICAND) - 1)  # no sign


def row_sum(x: np.ndarray) -> np.ndarray:
    """Sum over the last dimension, float32 [..., N] -> [...].

    Partial sum j, of 64, is 0 + x[j] + x[j + 64] + x[j + 128] + ..., in this order; then the upper
    half of the partial sums is added to the lower half until one is left.
    """
    n = x.shape[-1]
    padded = np.zeros((*x.shape[:-1], -(-n // PARTIAL_SUMS), PARTIAL_SUMS), np.float32)
    padded.reshape(*x.shape[:-1], -1)[..., :n] = x
    sums = padded[..., 0, :]
    for i in range(1, padded.shape[-2]):
        sums = sums + padded[..., i, :]
    width = PARTIAL_SUMS
    while width > 1:
        width //= 2
        sums = sums[..., :width] + sums[..., width:]
    return sums[..., 0]


def _halvings(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """e^-|x| as int32 p 2^-n, p in units of 2^-POWER.value_bits and in [1/2, 1].

    n + f is |x| log2(e) in fixed point: the product of the first 18 bits of |x| with LOG2_E, cut
    off behind 16 fraction bits. p is 2^-f. |x| from 128 on counts as 128 or more: the result is
    below 2^-126 anyway.
    """
    cut = (x.view(np.int32) & _LOGARITHM_MASK).view(np.float32)
    # The product is exact: it has at most 36 bits.
    product = cut.astype(np.float64) * (LOG2_E * 2.0 ** (LOGARITHM_BITS - LOG2_E_BITS))
    logarithm = np.where(product < 1 << 24, product, 1 << 24).astype(np.int32)
    p = _values(POWER).take(logarithm & (1 << LOGARITHM_BITS) - 1)
    return p, logarithm >> LOGARITHM_BITS


def _scaled(y: np.ndarray, n: np.ndarray) -> np.ndarray:
    """y 2^-n, float32 for float32 y > 0 and int32 n; +0 where it is below 2^-126."""
    bits = y.view(np.int32) - (n << 23)
    return np.where(bits >= 1 << 23, bits, 0).view(np.float32)


def exponential(x: np.ndarray) -> np.ndarray:
    """e^-|x| in float32, any shape, to POWER.value_bits bits; 0 where that is below 2^-126, and
    for NaN."""
    p, n = _halvings(x)
    return _scaled(p.astype(np.float32), n + POWER.value_bits)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x) in float32; 0 where that is below 2^-126, NaN for NaN.

    With e^-|x| = p 2^-n as in `exponential`: 1 + p 2^-n, cut off behind 16 fraction bits, and its
    reciprocal r from the table SIGMOID; for x < 0 (and -0) r p 2^-n, of whose product the first 24
    bits count.
    """
    p, n = _halvings(x)
    t = p >> np.minimum(n + (POWER.value_bits - LOGARITHM_BITS), 31)
    r = _values(SIGMOID).take(t & (1 << LOGARITHM_BITS) - 1)
    r = np.where(t >> LOGARITHM_BITS, 1 << SIGMOID.value_bits - 1, r)
    product = r.astype(np.float64) * p
    product = (product.view(np.int64) & _FIRST_24_BITS).view(np.float64).astype(np.float32)
    below = _scaled(product, n + (POWER.value_bits + SIGMOID.value_bits))
    y = np.where(np.signbit(x), below, r.astype(np.float32) * np.float32(0.5**SIGMOID.value_bits))
    return np.where(np.isnan(x), x, y)


def reciprocal(x: np.ndarray) -> np.ndarray:
    """1/x in float32 for x from 2^-125 to below 2^126; +inf gives 0, NaN NaN. With m in [1, 2) the
    mantissa of x: 1/m from the table INVERSE, rounded to 24 bits (halves up)."""
    bits = x.view(np.int32)
    y = _inverse((bits & _FRACTION).astype(np.int64)) + 2 >> 2
    return _limits(x, _scaled(y.astype(np.float32), (bits >> 23) - (127 - 24)))


def rsqrt(x: np.ndarray) -> np.ndarray:
    """1/sqrt(x) in float32 for normal x > 0; +inf gives 0, NaN NaN. With x = m * 4^n, m in [1, 4):
    1/sqrt(m) from the tables ROOTS, rounded to 24 bits (halves up)."""
    bits = x.view(np.int32)
    exponent = (bits >> 23) - 127
    y = _inverse_root(((bits & _FRACTION) + ((exponent & 1) << 23)).astype(np.int64)) + 2 >> 2
    return _limits(x, _scaled(y.astype(np.float32), (exponent >> 1) + 24))


def _limits(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """y, but 0 where x is infinite and NaN where it is NaN."""
    return np.where(np.isfinite(x), y, np.where(np.isinf(x), np.float32(0.0), x))


def _half(y: np.ndarray) -> torch.Tensor:
    """float32 values as the array takes them."""
    return to_float16(torch.from_numpy(y))


#: The tanh form of GELU is x sigmoid(2u) with 2u = 2 sqrt(2/pi) (x + 0.044715 x^3).
GELU_LINEAR = 2.0 * math.sqrt(2.0 / math.pi)
GELU_CUBIC = GELU_LINEAR * 0.044715


@_quiet
def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up, float32 [T, F] -> float16, as (gate * up) * sigmoid(z): z is the gate
    for "silu", (GELU_CUBIC * (gate * gate) + GELU_LINEAR) * gate for "gelu_tanh".

    Raises ValueError for any other activation.
    """
    x = z = gate.numpy()
    if activation == "gelu_tanh":
        z = (x * x * np.float32(GELU_CUBIC) + np.float32(GELU_LINEAR)) * x
    elif activation != "silu":
        raise ValueError(f"activation {activation!r} is neither silu nor gelu_tanh")
    return _half((x * up.numpy()) * sigmoid(z))


@_quiet
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension in float32: (x * rsqrt(mean(x^2) + eps)) * weight, the mean
    being `row_sum` times the FP32 nearest to 1/N. x float32 [..., N], weight float16 [N]."""
    return _rms_norm(x.numpy(), x.numpy(), weight, eps)


@_quiet
def head_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm` of heads of queries or keys, float32 [..., D]: `row_sum` takes their elements in
    rotary order, whether they are rotated or not."""
    return _rms_norm(x.numpy(), x.numpy()[..., rotary_order(x.shape[-1])], weight, eps)


def _rms_norm(x: np.ndarray, summed: np.ndarray, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of x; `summed` are its elements in the order of their sum."""
    mean = row_sum(summed * summed) * np.float32(1.0 / x.shape[-1])
    scale = rsqrt(np.asarray(mean + np.float32(eps)))[..., None]
    return torch.from_numpy((x * scale) * weight.numpy().astype(np.float32))


def rotary_order(head_dim: int) -> np.ndarray:
    """The elements of a head so that those of a rotary pair are neighbours, int64 [head_dim]: 0,
    D/2, 1, D/2 + 1, ... Hardware that keeps heads in this order rotates them as they come."""
    return np.arange(head_dim).reshape(2, -1).T.reshape(-1)


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
    row attends to, at least one. weights[j] = FP16(e^(scale * scores[j] - max)), max over the
    allowed positions, in which NaN counts as minus infinity, 0 elsewhere; denominators [...] =
    their sum. The array multiplies the weights with the values and `normalize` divides the result.
    FP16 weights are integers times 2^-24, so their sum is exact (in FP64, for S below 2^29) and
    rounded once: it is the array's own product of the weights with ones, and like it independent of
    order and of positions that are not allowed.
    """
    seen = allowed.numpy()
    scaled = np.where(seen, scores.numpy() * scale, np.float32(-math.inf))
    largest = np.fmax.reduce(scaled, axis=-1, keepdims=True, initial=-math.inf)
    weights = _half(np.where(seen, exponential(scaled - largest), np.float32(0.0)))
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
