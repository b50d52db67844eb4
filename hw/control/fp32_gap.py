# SPDX-License-Identifier: Apache-2.0
"""How far one FP32 number is below another."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

FP32_INFINITY = 0x7F800000

_EXPONENT_BITS = 8
_SPECIAL = 2**_EXPONENT_BITS - 1  # exponent of infinities and NaNs
_EXTRA = 3  # guard, round and sticky bit behind the last fraction bit
#: One bit for the carry of a sum, the hidden bit, the fraction, and the extra bits.
_SUM_BITS = 1 + 24 + _EXTRA

_FP32 = data.StructLayout({"fraction": 23, "exponent": _EXPONENT_BITS, "negative": 1})


class Fp32Gap(wiring.Component):
    """Difference of two FP32 logits, the first of which is not the smaller one.

    Formula: ``gap = best - other``, rounded once to nearest even, as FP32. It is never negative,
    and never -0. An infinite or NaN operand gives +infinity, also where IEEE 754 has NaN (equal
    infinities): an alternate of unknown or endless distance. Subnormal numbers count in full. If
    `other` is larger than `best`, the result has no meaning.

    Latency `LATENCY` cycles, a pair per cycle, no flow control.

    Members
    -------
    best, other : In(32)
    gap : Out(32)
    """

    LATENCY = 4

    def __init__(self) -> None:
        super().__init__({"best": In(32), "other": In(32), "gap": Out(32)})

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        best, other = data.View(_FP32, self.best), data.View(_FP32, self.other)

        # Stage 1: the operand of larger magnitude, and how far its exponent is above the other's.
        swapped = Signal()
        m.d.comb += swapped.eq(self.best[:31] < self.other[:31])
        large_exponent = Mux(swapped, _effective_exponent(other), _effective_exponent(best))
        small_exponent = Mux(swapped, _effective_exponent(best), _effective_exponent(other))
        large = Signal(24, reset_less=True)
        small = Signal(24, reset_less=True)
        exponent = Signal(_EXPONENT_BITS, reset_less=True)
        distance = Signal(_EXPONENT_BITS, reset_less=True)
        add = Signal(reset_less=True)
        special = Signal(reset_less=True)
        m.d.sync += [
            large.eq(Mux(swapped, _significand(other), _significand(best))),
            small.eq(Mux(swapped, _significand(best), _significand(other))),
            exponent.eq(large_exponent),
            distance.eq(large_exponent - small_exponent),
            add.eq(best.negative != other.negative),
            special.eq((best.exponent == _SPECIAL) | (other.exponent == _SPECIAL)),
        ]

        # Stage 2: magnitudes added or subtracted. Three extra bits are enough to round a difference
        # once: if it loses more than its leading bit, the exponents were at most one apart and
        # nothing was shifted out.
        farthest = 24 + _EXTRA  # all bits of the smaller one are below the extra ones
        shifted = Signal(24 + farthest)
        total = Signal(_SUM_BITS, reset_less=True)
        exponent_2 = Signal(_EXPONENT_BITS, reset_less=True)
        special_2 = Signal(reset_less=True)
        shift = Mux(distance > farthest, farthest, distance)[: farthest.bit_length()]
        m.d.comb += shifted.eq(Cat(Const(0, farthest), small) >> shift)
        aligned = shifted[24:] | shifted[:24].any()
        extended = Cat(Const(0, _EXTRA), large)
        m.d.sync += [
            total.eq(Mux(add, extended + aligned, extended - aligned)),
            exponent_2.eq(exponent),
            special_2.eq(special),
        ]

        # Stage 3: the leading one to the hidden bit, as far as the exponent allows.
        normal, normal_exponent = _normalize(m, total, exponent_2)
        significand = Signal(24 + _EXTRA, reset_less=True)
        exponent_3 = Signal(_EXPONENT_BITS, reset_less=True)
        special_3 = Signal(reset_less=True)
        m.d.sync += [
            significand.eq(normal),
            exponent_3.eq(Mux(normal[-1], normal_exponent, 0)),
            special_3.eq(special_2),
        ]

        # Stage 4: round. A carry out of the fraction moves on into the exponent, up to infinity.
        kept = Cat(significand[_EXTRA:-1], exponent_3)
        guard, rest = significand[_EXTRA - 1], significand[: _EXTRA - 1]
        up = guard & (rest.any() | kept[0])
        gap = Signal(32, reset_less=True)
        infinite = special_3 | (exponent_3 == _SPECIAL)
        m.d.sync += gap.eq(Mux(infinite, FP32_INFINITY, kept + up))
        m.d.comb += self.gap.eq(gap)
        return m


def _effective_exponent(number: data.View) -> Value:
    """The exponent field; 1 for subnormal numbers, whose exponent it is."""
    return number.exponent | (number.exponent == 0)


def _significand(number: data.View) -> Value:
    """The 24 bits with the hidden one."""
    return Cat(number.fraction, number.exponent != 0)


def _normalize(m: Module, total: Value, exponent: Value) -> tuple[Value, Value]:
    """`total` without its carry bit, shifted until its top bit is set or the exponent is 1, and
    the exponent that belongs to it."""
    carry = total[-1]
    value = Mux(carry, Cat(total[1] | total[0], total[2:]), total[:-1])
    left = Signal(_EXPONENT_BITS)
    m.d.comb += left.eq(exponent + carry)
    for stage in reversed(range((_SUM_BITS - 2).bit_length())):
        amount = 1 << stage
        move = Signal(name=f"move_{amount}")
        shifted = Signal(_SUM_BITS - 1, name=f"shifted_{amount}")
        remaining = Signal(_EXPONENT_BITS, name=f"exponent_{amount}")
        m.d.comb += [
            move.eq(~value[-amount:].any() & (left > amount)),
            shifted.eq(Mux(move, value << amount, value)),
            remaining.eq(Mux(move, left - amount, left)),
        ]
        value, left = shifted, remaining
    return value, left
