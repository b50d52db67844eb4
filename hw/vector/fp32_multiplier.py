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
from speq.hw.common.logic import incremented, leading_zeros, pipeline_stage, shift_right_sticky

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

    LATENCY = 5

    def __init__(self) -> None:
        super().__init__({"a": In(32), "b": In(32), "product": Out(32)})

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        a, b = (data.View(FP32, operand) for operand in (self.a, self.b))

        # Stage 1: significands, and the zeros at the top of a subnormal one. If both are subnormal,
        # the product is next to nothing in any case.
        significands = significand(a), significand(b)
        a_exponent, b_exponent = effective_exponent(a), effective_exponent(b)
        a_zero, b_zero = ~self.a[:31].any(), ~self.b[:31].any()
        a_significand, b_significand, zeros, exponent, negative, nan, infinite = pipeline_stage(
            m,
            1,
            a_significand=significands[0],
            b_significand=significands[1],
            zeros=leading_zeros(Mux(a.exponent == 0, *significands)),
            # One more than the sum of both, by way of a carry.
            exponent=(Cat(Const(1, 1), a_exponent) + Cat(Const(1, 1), b_exponent))[1:],
            negative=a.negative ^ b.negative,
            nan=is_nan(a) | is_nan(b) | is_infinite(a) & b_zero | a_zero & is_infinite(b),
            infinite=a.exponent.all() | b.exponent.all(),
        )

        # Stage 2: partial products of halves, which the multipliers of FPGAs take. The product is
        # from 1 to below 4 if its exponent is right; how it is placed: without the zeros of a
        # subnormal operand, but with those of a subnormal result.
        a_low, a_high = a_significand[:_HALF], a_significand[_HALF:]
        b_low, b_high = b_significand[:_HALF], b_significand[_HALF:]
        field = exponent - Cat(zeros, Const(FP32_BIAS + 1 >> len(zeros), 8 - len(zeros)))
        below = field < 0
        down = Mux(below, _MOST_ZEROS + FP32_BIAS + 1 - exponent, _MOST_ZEROS - zeros)[:8]
        low, middle, other_middle, high, shift, exponent, negative, nan, infinite = pipeline_stage(
            m,
            2,
            low=a_low * b_low,
            middle=a_low * b_high,
            other_middle=a_high * b_low,
            high=a_high * b_high,
            shift=down[:6] | down[6:].any().replicate(6),
            exponent=Mux(below | (zeros > _MOST_ZEROS), 0, field)[: len(exponent)],
            negative=negative,
            nan=nan,
            infinite=infinite,
        )

        # Stage 3: the product.
        product, shift, exponent, negative, nan, infinite = pipeline_stage(
            m,
            3,
            product=(Cat(low, high) + ((middle + other_middle) << _HALF))[: 4 * _HALF],
            shift=shift,
            exponent=exponent,
            negative=negative,
            nan=nan,
            infinite=infinite | (exponent >= FP32_SPECIAL),
        )

        # Stage 4: place it.
        value, subnormal, largest, exponent, negative, nan, infinite = pipeline_stage(
            m,
            4,
            value=shift_right_sticky(Cat(Const(0, 2), product), shift)[:_WINDOW],
            subnormal=exponent == 0,
            largest=exponent == FP32_SPECIAL - 1,
            exponent=exponent[:8],
            negative=negative,
            nan=nan,
            infinite=infinite,
        )

        # Stage 5: round, with the significand one place lower if the product is below 2, unless the
        # result is subnormal. No product is so close to 4 that it becomes 4.
        upper, last, guard, rest = value[3:], value[2], value[1], value[0]
        high = value[-1] | subnormal
        last_up = guard & (rest | last)
        up = Mux(high, last & (guard | rest | upper[0]), last & last_up)
        rounded = incremented(upper, up)
        carry = rounded[-1]
        fraction = Mux(carry | subnormal, rounded[:-1], Cat(last ^ last_up, rounded[:-2]))
        exponent = Mux(carry, exponent + 1, exponent)[:8]
        infinite = infinite | carry & largest
        magnitude = Mux(infinite, FP32_INFINITY, Cat(fraction, exponent))
        (product,) = pipeline_stage(m, 5, product=Mux(nan, FP32_NAN, Cat(magnitude, negative)))
        m.d.comb += self.product.eq(product)
        return m
