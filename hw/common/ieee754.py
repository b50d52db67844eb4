# SPDX-License-Identifier: Apache-2.0
"""IEEE 754 binary32 and binary16 as the units see them: fields, special values, pieces of logic."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data

FP32_FRACTION = 23
FP32_BIAS = 127
#: Exponent field of infinities and NaNs.
FP32_SPECIAL = 255
FP32_INFINITY = 0x7F800000
#: The one NaN that is ever a result: quiet, positive, without payload.
FP32_NAN = 0x7FC00000

FP16_FRACTION = 10
FP16_BIAS = 15
FP16_INFINITY = 0x7C00
FP16_NAN = 0x7E00

#: FP32 exponent field of FP16's smallest normal exponent (field 1), less one.
_EXPONENT_REBIAS = FP32_BIAS - FP16_BIAS
_DROPPED = FP32_FRACTION - FP16_FRACTION
#: By how far a significand is shifted down at most: all of it is behind the rounding bit.
_FARTHEST = FP16_FRACTION + 2
#: What an order key of an FP32 number is for minus infinity.
_LEAST_KEY = 0x007F_FFFF

FP32 = data.StructLayout({"fraction": FP32_FRACTION, "exponent": 8, "negative": 1})
FP16 = data.StructLayout({"fraction": FP16_FRACTION, "exponent": 5, "negative": 1})


def effective_exponent(number: data.View) -> Value:
    """The exponent field; 1 for zero and subnormal numbers, whose exponent it is."""
    return number.exponent | (number.exponent == 0)


def significand(number: data.View) -> Value:
    """The fraction with the hidden bit above it."""
    return Cat(number.fraction, number.exponent != 0)


def is_nan(number: data.View) -> Value:
    """Whether it is a NaN."""
    return number.exponent.all() & number.fraction.any()


def is_infinite(number: data.View) -> Value:
    """Whether it is an infinity."""
    return number.exponent.all() & ~number.fraction.any()


def order_key(number: Value) -> Value:
    """32 bits that, as unsigned numbers, are ordered as the FP32 numbers `number` are.

    NaN counts as minus infinity, and both zeros are equal.
    """
    magnitude, negative = number[:31], number[31]
    is_nan = magnitude[23:].all() & magnitude[:23].any()
    below = Cat(~magnitude, Const(0, 1))
    above = Cat(magnitude, Const(1, 1))
    return Mux(is_nan, _LEAST_KEY, Mux(negative & magnitude.any(), below, above))


def fp16_significand(m: Module, fp32: Value) -> tuple[Value, Value]:
    """First half of rounding an FP32 number that is not NaN to FP16: FP16's exponent field less
    one, 0 for subnormal numbers, and the significand with all bits behind it."""
    exponent, fraction = fp32[23:31], fp32[:23]
    # Below FP16's normal range the significand is shifted right until its exponent fits.
    subnormal = exponent <= _EXPONENT_REBIAS
    distance = Signal(range(_FARTHEST + 1))
    excess = _EXPONENT_REBIAS + 1 - exponent
    m.d.comb += distance.eq(Mux(subnormal, Mux(excess > _FARTHEST, _FARTHEST, excess), 0))
    significand = Cat(Const(0, _FARTHEST), fraction, exponent != 0)
    shifted = Signal(len(significand))
    m.d.comb += shifted.eq(significand >> distance)
    return Mux(subnormal, 0, exponent - _EXPONENT_REBIAS - 1)[:8], shifted


def fp16_rounded(m: Module, negative: Value, field: Value, shifted: Value) -> Value:
    """Second half: FP16, by one rounding to nearest even, and infinity if that is too large."""
    kept = shifted[_FARTHEST + _DROPPED :]
    guard = shifted[_FARTHEST + _DROPPED - 1]
    sticky = shifted[: _FARTHEST + _DROPPED - 1].any()
    up = guard & (sticky | kept[0])
    # Normal: the hidden bit in `kept` adds the last 1 to the exponent.
    rounded = Signal(FP16_FRACTION + 8)
    m.d.comb += rounded.eq((field << FP16_FRACTION) + kept + up)
    overflow = rounded >= FP16_INFINITY
    return Cat(Mux(overflow, FP16_INFINITY, rounded)[:15], negative)
