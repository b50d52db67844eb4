# SPDX-License-Identifier: Apache-2.0
"""IEEE 754 binary32 and binary16 as the units see them: fields, special values, pieces of logic."""

from __future__ import annotations

from amaranth.hdl import Cat, Value
from amaranth.lib import data

FP32_FRACTION = 23
FP32_BIAS = 127
#: Exponent field of infinities and NaNs.
FP32_SPECIAL = 255
FP32_INFINITY = 0x7F800000
#: The one NaN that is ever a result: quiet, positive, without payload.
FP32_NAN = 0x7FC00000

FP32 = data.StructLayout({"fraction": FP32_FRACTION, "exponent": 8, "negative": 1})


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
