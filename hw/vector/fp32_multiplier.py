# SPDX-License-Identifier: Apache-2.0
"""Product of two FP32 numbers."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.ieee754 import (
    FP32,
    FP32_BIAS,
    FP32_FRACTION,
    FP32_INFINITY,
    FP32_NAN,
    FP32_SPECIAL,
    effective_exponent,
    is_infinite,
    is_nan,
    significand,
)
from speq.hw.common.logic import leading_zeros, pipeline_stage, shift_right_sticky

_HALF = (FP32_FRACTION + 1) // 2
#: Zeros above the highest one of a significand: at most these, or it is zero.
_MOST_ZEROS = FP32_FRACTION
#: What is left of an aligned product: a significand with one more bit above it, guard and sticky.
_WINDOW = 1 + (FP32_FRACTION + 1) + 2


class Fp32Multiplier(wiring.Component):
    """FP32 multiplication as IEEE 754 says, rounded to nearest even.

    Formula: ``product = fp32(a * b)``. Subnormal numbers count in full, as operands and as
    results. A NaN and zero times infinity give the quiet NaN 0x7fc00000.

    Latency `LATENCY` cycles, a pair per cycle, no flow control.

    Members
    -------
    a, b : In(32)
    product : Out(32)
    """

    LATENCY = 4

    def __init__(self) -> None:
        super().__init__({"a": In(32), "b": In(32), "product": Out(32)})

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        a, b = (data.View(FP32, operand) for operand in (self.a, self.b))

        # Stage 1: partial products of halves, which multipliers of FPGAs take. A subnormal operand
        # has zeros at its top; of two, the product is next to nothing in any case.
        significands = significand(a), significand(b)
        (a_low, a_high), (b_low, b_high) = ((s[:_HALF], s[_HALF:]) for s in significands)
        a_zero, b_zero = ~self.a[:31].any(), ~self.b[:31].any()
        low, middle, other_middle, high, zeros, exponent, negative, nan, infinite = pipeline_stage(
            m,
            1,
            low=a_low * b_low,
            middle=a_low * b_high,
            other_middle=a_high * b_low,
            high=a_high * b_high,
            zeros=leading_zeros(Mux(a.exponent == 0, *significands)),
            exponent=effective_exponent(a) + effective_exponent(b),
            negative=a.negative ^ b.negative,
            nan=is_nan(a) | is_nan(b) | is_infinite(a) & b_zero | a_zero & is_infinite(b),
            infinite=a.exponent.all() | b.exponent.all(),
        )

        # Stage 2: the product, from 1 to below 4 if its exponent is right, and how it is placed:
        # without the zeros of a subnormal operand, but with those of a subnormal result.
        true_exponent = exponent - FP32_BIAS - zeros
        small = (true_exponent < 0) | (zeros > _MOST_ZEROS)
        down = Mux(true_exponent < 0, _MOST_ZEROS + FP32_BIAS - exponent, _MOST_ZEROS - zeros)[:8]
        exponent = Mux(small, 0, true_exponent)[: len(exponent)]
        product, shift, exponent, negative, nan, infinite = pipeline_stage(
            m,
            2,
            product=(Cat(low, high) + ((middle + other_middle) << _HALF))[: 4 * _HALF],
            shift=down[:6] | down[6:].any().replicate(6),
            exponent=exponent,
            negative=negative,
            nan=nan,
            infinite=infinite,
        )

        # Stage 3: place it.
        value, exponent, negative, nan, infinite = pipeline_stage(
            m,
            3,
            value=shift_right_sticky(Cat(Const(0, 2), product), shift)[:_WINDOW],
            exponent=exponent,
            negative=negative,
            nan=nan,
            infinite=infinite | (exponent >= FP32_SPECIAL),
        )

        # Stage 4: normalise the last place, unless the result is subnormal, and round. A carry out
        # of the fraction moves on into the exponent, up to infinity.
        doubled = value[-1]  # from 2 to below 4
        kept = Mux(doubled | (exponent == 0), value, Cat(Const(0, 1), value[:-1]))
        fraction, guard, rest = kept[3:-1], kept[2], kept[:2]
        up = guard & (rest.any() | fraction[0])
        rounded = (Cat(fraction, exponent) + Cat(up, Const(0, FP32_FRACTION - 1), doubled))[:31]
        infinite = infinite | (exponent == FP32_SPECIAL - 1) & doubled
        magnitude = Mux(infinite, FP32_INFINITY, rounded)[:31]
        (product,) = pipeline_stage(m, 4, product=Mux(nan, FP32_NAN, Cat(magnitude, negative)))
        m.d.comb += self.product.eq(product)
        return m
