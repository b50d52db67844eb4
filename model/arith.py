# SPDX-License-Identifier: Apache-2.0
"""Golden arithmetic: exact dot products of verify and draft mode, to the bit.

Every operand is an integer times a known power of two, so a dot product is an exact integer,
which is rounded once, to nearest even, into FP32. The sum is found with ordinary float64 matrix
products in the manner of error-free splitting (Ozaki, Ogita, Oishi, Rump, "Error-free
transformations of matrix multiplication by using fast routines of matrix multiplication and its
applications", Numerical Algorithms 59, 2012): the activations are cut into pieces so short that
no partial sum of a piece's products needs more than 53 bits. Each of these matrix products is
exact in whatever order the library adds, so no output bit depends on that order, on the batch, on
the blocking or on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from speq.model.format import EncodedTensor

#: Longest dot product: what `_WEIGHT_BITS` and `_LIMB_BITS` are sufficient for.
MAX_K = 1 << 20

_DOUBLE_BITS = 53  # float64 holds every integer up to 2^53
_LIMB_BITS = 52
_WEIGHT_BITS = 30  # weights that span more are cut in two: 23 bits are left for x and log2(K)
_BLOCK_WEIGHTS = 1 << 18  # converted to float64 at a time, 2 MiB: they stay in the L2 caches
_BLOCK_ROWS = 64  # rows of x multiplied at a time, which bounds the memory for their sums
_FEW_COLUMNS = 3  # up to here x @ w.T is the faster orientation, above it w @ x.T (measured)

_EXPONENT_BIAS = 15
_NONFINITE_EXPONENT = 31
_FP16_UNIT = -24  # every finite FP16 value is an integer times 2^-24
_MANTISSA_POINT = 6  # a block activation is mantissa * 2^(E - 6)
_MANTISSA_MAX = 127
_ACTIVATION_UNIT = 1 - _EXPONENT_BIAS - _MANTISSA_POINT
_NAN32 = 0x7FC00000
_NAN16 = 0x7E00


@dataclass(frozen=True, eq=False)
class WeightOperand:
    """Weights inspected once, for many products: see `prepare_verify` and `prepare_draft`.

    Attributes
    ----------
    values : torch.float16 (verify) or torch.float32 (draft) [O, K]
        Finite and contiguous. The caller's memory where nothing had to be replaced, which must
        not change while this is in use.
    unit : int
        Every value is an integer times 2^unit.
    peak : float
        Largest magnitude of all values.
    nonfinite : torch.bool [O]
        Rows that hold an infinity or a NaN; zeros stand for them in `values`.
    """

    values: torch.Tensor
    unit: int
    peak: float
    nonfinite: torch.Tensor


@dataclass(frozen=True, eq=False)
class BlockActivations:
    """Activations in 8-bit block floating point: mantissa * 2^(exponent - 15 - 6).

    Attributes
    ----------
    mantissa : torch.int8 [T, K]
        -127 to 127.
    exponent : torch.uint8 [T, ceil(K / block)]
        Biased exponent of each block, 1 to 30; 31 marks a block that held an infinity or a NaN
        (its mantissas are 0).
    block : int
        Consecutive activations along K that share an exponent.

    Raises
    ------
    ValueError
        If dtypes or shapes are not these.
    """

    mantissa: torch.Tensor
    exponent: torch.Tensor
    block: int

    def __post_init__(self) -> None:
        t, k = self.mantissa.shape
        expected = {
            "mantissa": (torch.int8, (t, k)),
            "exponent": (torch.uint8, (t, -(-k // self.block))),
        }
        for name, (dtype, shape) in expected.items():
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tensor.shape != shape:
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected {dtype} {shape}"
                )

    def values(self) -> torch.Tensor:
        """The values, torch.float32 [T, K], each exact; NaN in blocks of exponent 31."""
        exponent = self.exponent.numpy()
        scale = _power_of_two(exponent.astype(np.int32) - _EXPONENT_BIAS - _MANTISSA_POINT)
        scale[exponent == _NONFINITE_EXPONENT] = math.nan
        k = self.mantissa.shape[1]
        return torch.from_numpy(self.mantissa.numpy() * scale.repeat(self.block, axis=1)[:, :k])


def verify_gemm(x: torch.Tensor, w: torch.Tensor | WeightOperand) -> torch.Tensor:
    """Verify-mode product y[t, o] = round(sum over k of x[t, k] * w[o, k]), the sum exact.

    The one rounding is to nearest even. It meets neither overflow nor subnormal results: no sum
    is outside FP32's normal range. An exact zero gives +0. An infinity or a NaN in x[t] or w[o]
    gives the quiet NaN 0x7fc00000 (`nonfinite` says which rows have one).

    Parameters
    ----------
    x : torch.float16 [T, K]
    w : torch.float16 [O, K] or `prepare_verify` of it

    Returns
    -------
    torch.float32 [T, O]

    Raises
    ------
    TypeError
        If an operand has another type.
    ValueError
        If an operand is empty, no matrix or not on the CPU, or if the two K differ or exceed
        `MAX_K`.
    """
    _check_matrix("x", x, torch.float16)
    operand = w if isinstance(w, WeightOperand) else prepare_verify(w)
    if operand.values.dtype != torch.float16:
        raise TypeError("w was prepared for draft_gemm; verify_gemm needs prepare_verify(w)")
    return _gemm(x.detach(), _FP16_UNIT, operand)


def draft_gemm(x: BlockActivations, w: EncodedTensor | WeightOperand) -> torch.Tensor:
    """Draft-mode product: the exact sum of block activations times draft weights, rounded once.

    Rounding and zeros are as in `verify_gemm`. A block of activations or a group of weights that
    holds an infinity or a NaN makes every output that uses it 0x7fc00000.

    Parameters
    ----------
    x : BlockActivations [T, K]
        From `quantize_activations`.
    w : EncodedTensor [O, K] or `prepare_draft` of it
        Prepare it once if it is used again: unpacking costs more than multiplying.

    Returns
    -------
    torch.float32 [T, O]

    Raises
    ------
    TypeError, ValueError
        As `verify_gemm`.
    """
    if not isinstance(x, BlockActivations):
        raise TypeError(f"x is {_kind(x)}; expected BlockActivations, from quantize_activations")
    operand = w if isinstance(w, WeightOperand) else prepare_draft(w)
    if operand.values.dtype != torch.float32:
        raise TypeError("w was prepared for verify_gemm; draft_gemm needs prepare_draft(w)")
    return _gemm(x.values(), _ACTIVATION_UNIT, operand)


def quantize_activations(
    x: torch.Tensor,
    block: int = 64,
) -> BlockActivations:
    """Quantise FP16 activations to 8-bit block floating point.

    A block's exponent field E is the largest of its activations', but at least 1, which is also
    the exponent of subnormals. Mantissas are x / 2^(E - 15 - 6), rounded to nearest even and
    clamped to -127..127. A block with an infinity or a NaN gets E = 31 and mantissas 0.

    Parameters
    ----------
    x : torch.float16 [T, K]
    block : int
        Activations along K that share an exponent; the last block of a row may be shorter.

    Raises
    ------
    TypeError, ValueError
        If x is not a non-empty float16 matrix on the CPU or block is not a positive integer.
    """
    _check_matrix("x", x, torch.float16)
    if not isinstance(block, int) or block < 1:
        raise ValueError(f"block is {block!r}; expected an integer >= 1")
    t, k = x.shape
    whole = -k % block + k
    values = np.zeros((t, whole), np.float16)
    values[:, :k] = x.detach().numpy()
    blocks = values.reshape(t, -1, block)
    fields = (blocks.view(np.uint16) >> 10 & 31).astype(np.int32)
    exponent = np.maximum(fields.max(axis=2), 1)
    blocks[exponent == _NONFINITE_EXPONENT] = 0
    # Exact: a magnitude has 11 significant bits, and scaled it is below 2^7.
    scaled = blocks.astype(np.float32) * _power_of_two(
        _EXPONENT_BIAS + _MANTISSA_POINT - exponent[:, :, None]
    )
    mantissa = np.minimum(np.maximum(np.rint(scaled), -_MANTISSA_MAX), _MANTISSA_MAX)
    return BlockActivations(
        torch.from_numpy(mantissa.reshape(t, whole)[:, :k].astype(np.int8)),
        torch.from_numpy(exponent.astype(np.uint8)),
        block,
    )


def to_float16(y: torch.Tensor) -> torch.Tensor:
    """Round float32 to float16, to nearest even; overflow to infinity, every NaN to 0x7e00.

    Parameters
    ----------
    y : torch.float32, any shape

    Raises
    ------
    TypeError
        If y has another type.
    """
    if not isinstance(y, torch.Tensor) or y.dtype != torch.float32:
        raise TypeError(f"y is {_kind(y)}; expected a torch.float32 tensor")
    half = y.detach().to(torch.float16).numpy()
    half.view(np.uint16)[np.isnan(half)] = _NAN16
    return torch.from_numpy(half)


def nonfinite(x: torch.Tensor) -> torch.Tensor:
    """Rows of x, float16 or float32 [N, K], that hold an infinity or a NaN, as torch.bool [N].

    The hardware's sticky flag is `any()` of it over the operands of a product.
    """
    return ~torch.isfinite(x).all(dim=1)


def prepare_verify(w: torch.Tensor) -> WeightOperand:
    """Prepare FP16 weights [O, K] for repeated use in `verify_gemm`, which raises what this does.

    It saves one pass over the weights per product, a quarter of the time for a single token.
    """
    _check_matrix("w", w, torch.float16)
    return _prepare(w.detach().contiguous(), _FP16_UNIT)


def prepare_draft(w: EncodedTensor) -> WeightOperand:
    """Prepare an encoded tensor for repeated use in `draft_gemm`: unpacked, 4 bytes per weight."""
    if not isinstance(w, EncodedTensor):
        raise TypeError(f"w is {_kind(w)}; expected an EncodedTensor or prepare_draft of one")
    return _prepare(w.draft(), w.config.draft_unit_exponent)


def _kind(value: object) -> str:
    return f"{value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__


def _check_matrix(name: str, x: torch.Tensor, dtype: torch.dtype) -> None:
    if not isinstance(x, torch.Tensor) or x.dtype != dtype:
        raise TypeError(f"{name} is {_kind(x)}; expected a {dtype} tensor")
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected a non-empty matrix")
    if x.device.type != "cpu":
        raise ValueError(f"{name} is on device {x.device}; expected the CPU (use .cpu())")


def _power_of_two(exponent: np.ndarray) -> np.ndarray:
    """2^exponent as float32, exact by construction, for int32 exponents in -126..127."""
    return ((exponent + 127) << 23).view(np.float32)


def _peak(w: torch.Tensor) -> float:
    """Largest magnitude in w; an infinity or a NaN if w holds one."""
    if w.dtype == torch.float16:
        # The largest bit pattern is the largest positive value among signed integers, and the
        # largest negative one among unsigned: two passes, much faster than abs().max() of FP16.
        bits = w.numpy().view(np.int16)
        pattern = max(int(bits.max()), int(bits.view(np.uint16).max()) - 0x8000)
        return float(np.int16(pattern).view(np.float16))
    low, high = torch.aminmax(w)
    return torch.maximum(-low, high).item()


def _prepare(w: torch.Tensor, unit: int) -> WeightOperand:
    peak = _peak(w)
    bad = torch.zeros(len(w), dtype=torch.bool)
    if not math.isfinite(peak):
        bad = nonfinite(w)
        w = w.masked_fill(bad[:, None], 0)
        peak = _peak(w)
    return WeightOperand(w, unit, peak, bad)


def _gemm(x: torch.Tensor, x_unit: int, w: WeightOperand) -> torch.Tensor:
    """Exact x [T, K] times w [O, K], rounded once, with the NaN rule: float32 [T, O].

    All but the matrix products is NumPy's, which starts an operation in a third of PyTorch's time:
    most operands are small.
    """
    k, w_k = x.shape[1], w.values.shape[1]
    if k != w_k:
        raise ValueError(f"K is {k} for x and {w_k} for w; expected the same")
    if k > MAX_K:
        raise ValueError(f"K is {k}; expected at most {MAX_K}")
    integers = x.to(torch.float64).numpy() * 2.0**-x_unit
    bad = np.logical_not(np.isfinite(integers).all(axis=1))
    integers[bad] = 0.0
    blocks = [
        _exact_gemm(integers[start : start + _BLOCK_ROWS], x_unit, w)
        for start in range(0, len(integers), _BLOCK_ROWS)
    ]
    y = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
    y.view(np.uint32)[bad[:, None] | w.nonfinite.numpy()] = _NAN32
    return torch.from_numpy(y)


def _exact_gemm(x: np.ndarray, x_unit: int, w: WeightOperand) -> np.ndarray:
    """Integers x [T, K] (float64), in units of 2^x_unit, times w, rounded: float32 [T, O]."""
    span = w.peak * 2.0**-w.unit
    bits = math.frexp(span)[1]
    cut = 0 if bits <= _WEIGHT_BITS else (bits + 1) // 2
    pieces = list(_pieces(x, 2.0**cut if cut else span))
    columns = pieces[0][0] if len(pieces) == 1 else np.concatenate([piece for piece, _ in pieces])
    terms = []
    for product, w_shift in _products(torch.from_numpy(columns), w, cut):
        for i, (_, shift) in enumerate(pieces):
            terms.append((product[i * len(x) : (i + 1) * len(x)], shift + w_shift))
    return _round(*_two_term_sum(terms), x_unit + w.unit)


def _pieces(x: np.ndarray, weight_bound: float) -> Iterator[tuple[np.ndarray, int]]:
    """Cut integers x [T, K] into pieces whose products with weights add up exactly in float64.

    Yields (integers, shift), x being the sum of integers * 2^shift. In each row the magnitudes
    times weight_bound sum to at most 2^53, which no partial sum in any order can then exceed.
    """
    while True:
        # Float64 sums 2^20 magnitudes with a relative error below 2^-32.
        total = float(np.abs(x).sum(axis=1).max()) * (1 + 2.0**-30)
        shift = max(0, math.frexp(total * weight_bound)[1] - _DOUBLE_BITS)
        if shift == 0:
            yield x, 0
            return
        piece = np.trunc(x * 2.0**-shift)  # towards zero: the magnitudes' sum cannot grow
        yield piece, shift
        x = x - piece * 2.0**shift


def _products(columns: torch.Tensor, w: WeightOperand, cut: int) -> list[tuple[np.ndarray, int]]:
    """Products of integers, columns [C, K], with the weights in units of 2^w.unit.

    Weights are taken whole if cut is 0, and else in two parts, of which the lower has `cut` bits.
    Returns (integers, float64 [C, O], shift) for each part.
    """
    o, k = w.values.shape
    rows = min(o, max(1, _BLOCK_WEIGHTS // k))
    block = torch.empty(rows, k, dtype=torch.float64)
    low = torch.empty(len(columns), o, dtype=torch.float64)
    above = (torch.empty_like(block), torch.empty_like(low)) if cut else None
    scaled = columns * 2.0**-w.unit  # cheaper than scaling the weights
    cut_unit = 2.0 ** (w.unit + cut)
    for start in range(0, o, rows):
        stop = min(start + rows, o)
        # By way of float32: both of these conversions are vectorised, the direct one is not.
        part = block[: stop - start].copy_(w.values[start:stop].to(torch.float32))
        if above:
            upper_block, high = above
            upper = torch.mul(part, 1 / cut_unit, out=upper_block[: stop - start]).trunc_()
            _matmul(columns, upper, high[:, start:stop])
            part.sub_(upper, alpha=cut_unit)
        _matmul(scaled, part, low[:, start:stop])
    return [(above[1].numpy(), cut), (low.numpy(), 0)] if above else [(low.numpy(), 0)]


def _matmul(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> None:
    """out[:] = x @ w.T in the faster orientation."""
    if len(x) <= _FEW_COLUMNS:
        torch.mm(x, w.T, out=out)
    else:
        out.copy_(torch.mm(w, x.T.contiguous()).T)


def _two_term_sum(terms: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray | None]:
    """Two float64 arrays whose exact sum is that of integers * 2^shift over the terms; one, if
    there is one term.

    Up to `MAX_K`, shift is below 52 (60 bits of x and log2(K), twice 24 bits of weight, less 53)
    and the sum below 2^104, which is what the two limbs hold.
    """
    if len(terms) == 1:
        integers, shift = terms[0]
        return integers * 2.0**shift, None
    if len(terms) == 2:
        (upper, upper_shift), (lower, lower_shift) = terms
        return upper * 2.0**upper_shift, lower * 2.0**lower_shift
    low = np.zeros(terms[0][0].shape, np.int64)
    high = np.zeros_like(low)
    for integers, shift in terms:
        value = integers.astype(np.int64)
        high += value >> (_LIMB_BITS - shift)
        low += (value & ((1 << (_LIMB_BITS - shift)) - 1)) << shift
    high += low >> _LIMB_BITS
    low &= (1 << _LIMB_BITS) - 1
    return high * 2.0**_LIMB_BITS, low.astype(np.float64)


def _round(a: np.ndarray, b: np.ndarray | None, unit: int) -> np.ndarray:
    """(a + b) * 2^unit rounded once to float32, to nearest even; zero is +0. No b counts as zeros.

    The sum is first rounded to odd in float64. That keeps at least two bits more than float32
    has, so the second rounding gives what a single one would (Boldo, Melquiond, "Emulation of
    FMA and correctly rounded sums: proved algorithms using rounding to odd", IEEE Transactions
    on Computers 57, 2008).
    """
    if b is None:
        return (a * 2.0**unit + 0.0).astype(np.float32)
    total = a + b
    b_part = total - a
    error = (a - (total - b_part)) + (b - b_part)  # exact (Knuth's TwoSum)
    bits = total.view(np.int64)
    # An inexact result that came out even gives way to its odd neighbour on the error's side.
    step = np.where((error > 0) == (total > 0), 1, -1)
    bits += np.where((error != 0) & (bits & 1 == 0), step, 0)
    return (total * 2.0**unit + 0.0).astype(np.float32)
