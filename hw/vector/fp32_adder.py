# SPDX-License-Identifier: Apache-2.0
"""Sum and difference of two FP32 numbers."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.ieee754 import (
    FP32,
    FP32_FRACTION,
    FP32_INFINITY,
    FP32_NAN,
    effective_exponent,
    is_infinite,
    is_nan,
    significand,
)
from speq.hw.common.logic import leading_zeros, pipeline_stage, shift_right_sticky

_SIGNIFICAND = FP32_FRACTION + 1
_EXTRA = 3  # guard, round and sticky bit behind the last bit of a significand
_SUM = 1 + _SIGNIFICAND + _EXTRA  # with the carry of a sum
_SHIFT_BITS = (_SIGNIFICAND + _EXTRA).bit_length()


class Fp32Adder(wiring.Component):
    """FP32 addition and subtraction as IEEE 754 says, rounded to nearest even.

    Formula: ``sum = fp32(a + b)``, with `subtract` ``fp32(a - b)``. Subnormal numbers count in
    full, as operands and as results. An exact zero is +0 unless it is the sum of two -0. A NaN
    and infinity minus infinity give the quiet NaN 0x7fc00000.

    Latency `LATENCY` cycles, a pair per cycle, no flow control.

    Members
    -------
    a, b : In(32)
    subtract : In(1)
        With them.
    sum : Out(32)
    """

    LATENCY = 5

    def __init__(self) -> None:
        super().__init__({"a": In(32), "b": In(32), "subtract": In(1), "sum": Out(32)})

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        a, b = (data.View(FP32, operand) for operand in (self.a, self.b))

        # Stage 1: which operand has the larger magnitude. It gives the sum its sign.
        swapped = self.a[:31] < self.b[:31]
        b_negative = b.negative ^ self.subtract
        subtracts = a.negative ^ b_negative
        exponents = effective_exponent(a), effective_exponent(b)
        significands = significand(a), significand(b)
        distances = (exponents[0] - exponents[1])[:8], (exponents[1] - exponents[0])[:8]
        large, small, exponent, distance, negative, subtracts, nan, infinite = pipeline_stage(
            m,
            1,
            large=Mux(swapped, *reversed(significands)),
            small=Mux(swapped, *significands),
            exponent=Mux(swapped, *reversed(exponents)),
            distance=Mux(swapped, *reversed(distances)),
            negative=Mux(swapped, b_negative, a.negative),
            subtracts=subtracts,
            nan=is_nan(a) | is_nan(b) | is_infinite(a) & is_infinite(b) & subtracts,
            infinite=a.exponent.all() | b.exponent.all(),
        )

        # Stage 2: the smaller one aligned. Three extra bits are enough to round once: if a
        # difference loses more than its leading bit, the exponents were at most one apart and
        # nothing was shifted out.
        extended = Cat(Const(0, _EXTRA), small)
        near = shift_right_sticky(extended, distance[:_SHIFT_BITS])
        far = distance[_SHIFT_BITS:].any()
        aligned, large, exponent, negative, subtracts, nan, infinite = pipeline_stage(
            m,
            2,
            aligned=Mux(far, small.any(), near),
            large=large,
            exponent=exponent,
            negative=negative,
            subtracts=subtracts,
            nan=nan,
            infinite=infinite,
        )

        # Stage 3: magnitudes added or subtracted; the lowest bit is the subtraction's carry.
        addend = aligned ^ subtracts.replicate(len(aligned))
        extended = Cat(subtracts, Const(0, _EXTRA), large) + Cat(subtracts, addend)
        carry = extended[-1] & ~subtracts
        total = Cat(extended[1:-1], carry)
        total, zeros, exponent, negative, subtracts, nan, infinite = pipeline_stage(
            m,
            3,
            total=total,
            zeros=leading_zeros(total),
            exponent=exponent,
            negative=negative,
            subtracts=subtracts,
            nan=nan,
            infinite=infinite,
        )

        # Stage 4: the leading one to the top, where it is the carry's, as far as the exponent
        # allows.
        subnormal = exponent < zeros
        shift = Mux(subnormal, exponent, zeros)[: len(zeros)]
        empty = zeros == _SUM
        value, exponent, negative, nan, infinite = pipeline_stage(
            m,
            4,
            value=(total << shift)[:_SUM],
            exponent=Mux(subnormal | empty, 0, (exponent + 1 - zeros)[: len(exponent)]),
            negative=negative & ~(subtracts & empty),
            nan=nan,
            infinite=infinite,
        )

        # Stage 5: round. A carry out of the fraction moves on into the exponent, up to infinity.
        kept, guard, rest = value[_EXTRA + 1 :], value[_EXTRA], value[:_EXTRA]
        up = guard & (rest.any() | kept[0])
        rounded = (Cat(kept[:-1], exponent) + up)[:31]
        magnitude = Mux(infinite | exponent.all(), FP32_INFINITY, rounded)[:31]
        (total,) = pipeline_stage(m, 5, sum=Mux(nan, FP32_NAN, Cat(magnitude, negative)))
        m.d.comb += self.sum.eq(total)
        return m
