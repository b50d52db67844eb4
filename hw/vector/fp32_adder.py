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
from speq.hw.common.logic import incremented, leading_zeros, pipeline_stage, shift_right_sticky

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
        aligned = Mux(far, small.any(), near)
        addend, large, exponent, negative, subtracts, nan, infinite = pipeline_stage(
            m,
            2,
            addend=aligned ^ subtracts.replicate(len(aligned)),
            large=large,
            exponent=exponent,
            negative=negative,
            subtracts=subtracts,
            nan=nan,
            infinite=infinite,
        )

        # Stage 3: magnitudes added or subtracted; the lowest bit is the subtraction's carry.
        extended = Cat(subtracts, Const(0, _EXTRA), large) + Cat(subtracts, addend)
        carry = extended[-1] & ~subtracts
        total = Cat(extended[1:-1], carry)
        # The leading one is to move to the top, in two steps, but not farther than the exponent
        # allows. The first step is by whole bytes: those at the top without a one, before that in
        # which the exponent ends it.
        tops = (total[_SUM - 8 * (byte + 1) :][:8] for byte in range(3))
        ends = [top.any() | (exponent[3:] == byte) for byte, top in enumerate(tops)]
        total, empty_bytes, end_byte, end, highest, negative, subtracts, nan, infinite = (
            pipeline_stage(
                m,
                3,
                total=total,
                empty_bytes=leading_zeros(Cat(*reversed(ends))),
                end_byte=exponent[3:5],
                end=Mux(exponent[5:].any(), 0, Const(0x80, 8) >> exponent[:3]),
                highest=(exponent + 1)[: len(exponent)],
                negative=negative,
                subtracts=subtracts,
                nan=nan,
                infinite=infinite,
            )
        )

        # Stage 4: the second step, by single bits, but for the last. At the top, the carry's place,
        # the exponent is one higher.
        moved = (total << Cat(Const(0, 3), empty_bytes))[:_SUM]
        end = end & (end_byte == empty_bytes).replicate(len(end))
        zeros = leading_zeros(moved[-8:] | end)[:3]
        value, zeros, exponent, negative, nan, infinite = pipeline_stage(
            m,
            4,
            value=(moved << Cat(Const(0, 1), zeros[1:]))[:_SUM],
            zeros=zeros,
            exponent=Cat(highest[:3], (highest[3:] - empty_bytes)[:5]),
            negative=negative & ~(subtracts & ~total.any()),
            nan=nan,
            infinite=infinite,
        )

        # Stage 5: the last bit, and round. Without a one at the top, the number is zero or
        # subnormal. A carry out of the fraction moves on into the exponent, up to infinity.
        value = Mux(zeros[0], Cat(Const(0, 1), value[:-1]), value)
        normal = value[-1]
        fraction, guard, rest = value[_EXTRA + 1 : -1], value[_EXTRA], value[:_EXTRA]
        up = guard & (rest.any() | fraction[0])
        carry = up & fraction.all()
        largest = exponent.all() & ~zeros.any()
        above, exponent = (exponent + 1 - zeros)[:8], (exponent - zeros)[:8]
        magnitude = Cat(
            incremented(fraction, up), Mux(normal, Mux(carry, above, exponent), carry)[:8]
        )
        # The exponent minus zeros would be known late; with zeros it is no longer the largest one.
        overflow = infinite | normal & largest
        magnitude = Mux(overflow, FP32_INFINITY, magnitude)[:31]
        (total,) = pipeline_stage(m, 5, sum=Mux(nan, FP32_NAN, Cat(magnitude, negative)))
        m.d.comb += self.sum.eq(total)
        return m
