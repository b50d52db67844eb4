# SPDX-License-Identifier: Apache-2.0
"""How far one FP32 number is below another."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.ieee754 import FP32, FP32_INFINITY, effective_exponent, significand

_EXPONENT_BITS = 8
_SPECIAL = 2**_EXPONENT_BITS - 1  # exponent of infinities and NaNs
_EXTRA = 3  # guard, round and sticky bit behind the last fraction bit
#: One bit for the carry of a sum, the hidden bit, the fraction, and the extra bits.
_SUM_BITS = 1 + 24 + _EXTRA
#: By how many bits each stage may shift the leading one up.
_SHIFTS = (16, 8, 4, 2, 1)


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

    LATENCY = 7 + len(_SHIFTS)

    def __init__(self) -> None:
        super().__init__({"best": In(32), "other": In(32), "gap": Out(32)})

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()

        def register(value: Value, name: str) -> Signal:
            """A value in the next stage."""
            following = Signal(value.shape(), name=name, reset_less=True)
            m.d.sync += following.eq(value)
            return following

        # Stage 1: which operand has the larger magnitude.
        swapped = register(self.best[:31] < self.other[:31], "swapped")
        best = data.View(FP32, register(self.best, "best_1"))
        other = data.View(FP32, register(self.other, "other_1"))

        # Stage 2: its exponent, and how far this is above the other's.
        large_exponent = Mux(swapped, effective_exponent(other), effective_exponent(best))
        small_exponent = Mux(swapped, effective_exponent(best), effective_exponent(other))
        large = register(Mux(swapped, significand(other), significand(best)), "large_2")
        small = register(Mux(swapped, significand(best), significand(other)), "small_2")
        exponent = register(large_exponent, "exponent_2")
        distance = register((large_exponent - small_exponent)[:_EXPONENT_BITS], "distance")
        adds = register(best.negative != other.negative, "adds_2")
        special = register((best.exponent == _SPECIAL) | (other.exponent == _SPECIAL), "special_2")

        # Stage 3: by how far the smaller one is to be shifted.
        farthest = 24 + _EXTRA  # all its bits are below the extra ones
        shift = Mux(distance > farthest, farthest, distance)[: farthest.bit_length()]
        shift, small = register(shift, "shift"), register(small, "small_3")
        large, exponent = register(large, "large_3"), register(exponent, "exponent_3")
        adds, special = register(adds, "adds_3"), register(special, "special_3")

        # Stage 4: the smaller one aligned. Three extra bits are enough to round a difference once:
        # if it loses more than its leading bit, the exponents were at most one apart and nothing
        # was shifted out.
        shifted = (Cat(Const(0, farthest), small) >> shift)[: 24 + farthest]
        aligned = register(Cat(shifted[24] | shifted[:24].any(), shifted[25:]), "aligned")
        extended = register(Cat(Const(0, _EXTRA), large), "extended")
        exponent, adds = register(exponent, "exponent_4"), register(adds, "adds_4")
        special = register(special, "special_4")

        # Stage 5: magnitudes added or subtracted.
        total = Mux(adds, extended + aligned, extended - aligned)[:_SUM_BITS]
        total, exponent = register(total, "total"), register(exponent, "exponent_5")
        special = register(special, "special_5")

        # Stage 6: a carry of the sum.
        carry = total[-1]
        value = register(Mux(carry, Cat(total[1] | total[0], total[2:]), total[:-1]), "value_6")
        exponent = register((exponent + carry)[:_EXPONENT_BITS], "exponent_6")
        special = register(special, "special_6")

        # Stages 7 to 11: the leading one to the hidden bit, as far as the exponent allows.
        for stage, amount in enumerate(_SHIFTS, 7):
            value, exponent = _shifted(value, exponent, amount)
            value = register(value, f"value_{stage}")
            exponent = register(exponent, f"exponent_{stage}")
            special = register(special, f"special_{stage}")

        # Stage 12: round. A carry out of the fraction moves on into the exponent, up to infinity.
        exponent = Mux(value[-1], exponent, 0)
        kept = Cat(value[_EXTRA:-1], exponent)
        guard, rest = value[_EXTRA - 1], value[: _EXTRA - 1]
        up = guard & (rest.any() | kept[0])
        gap = Mux(special | (exponent == _SPECIAL), FP32_INFINITY, kept + up)
        m.d.comb += self.gap.eq(register(gap[:32], "gap_12"))
        return m


def _shifted(value: Value, exponent: Value, amount: int) -> tuple[Value, Value]:
    """A number shifted up if that many of its top bits are 0 and the exponent stays above 0, and
    the exponent that belongs to it."""
    moves = ~value[-amount:].any() & (exponent > amount)
    shifted = Cat(Const(0, amount), value)[: len(value)]
    return Mux(moves, shifted, value), Mux(moves, exponent - amount, exponent)[:_EXPONENT_BITS]
