# SPDX-License-Identifier: Apache-2.0
"""Exact reference results in Python integers, independent of any floating-point hardware.

Bit patterns are plain integers. Numbers are pairs of an integer and a power-of-two unit, or
fractions; nothing here is a float.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

NAN32 = 0x7FC00000


def f16_integer(bits: int) -> int | None:
    """Value of an FP16 bit pattern in units of 2^-24; None for an infinity or a NaN."""
    exponent, mantissa = bits >> 10 & 31, bits & 1023
    if exponent == 31:
        return None
    magnitude = mantissa if exponent == 0 else (1024 + mantissa) << (exponent - 1)
    return -magnitude if bits >> 15 else magnitude


def round_f32(value: Fraction) -> int:
    """Bit pattern of a fraction rounded once to FP32, to nearest even; zero is +0.

    Subnormals and overflow to infinity follow IEEE 754.
    """
    sign = 0x80000000 if value < 0 else 0
    value = abs(value)
    if value == 0:
        return 0
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    if Fraction(2) ** exponent > value:
        exponent -= 1
    exponent = max(exponent, -126)  # of the leading bit; subnormals share the smallest
    significand = round(value / Fraction(2) ** (exponent - 23))  # a Fraction rounds to even
    # A carry out of the significand runs into the exponent field, as it should.
    return sign | min(((exponent + 126) << 23) + significand, 0x7F800000)


def verify_dot(x: Sequence[int], w: Sequence[int]) -> int:
    """FP32 bits of the exact, once-rounded dot product of FP16 bit patterns."""
    xs, ws = [f16_integer(bits) for bits in x], [f16_integer(bits) for bits in w]
    if None in xs or None in ws:
        return NAN32
    return round_f32(Fraction(sum(a * b for a, b in zip(xs, ws, strict=True)), 1 << 48))


def quantize_block(x: Sequence[int]) -> tuple[list[int], int]:
    """Mantissas and biased exponent of one block of FP16 bit patterns."""
    fields = [bits >> 10 & 31 for bits in x]
    if 31 in fields:
        return [0] * len(x), 31
    exponent = max(1, *fields)
    step = Fraction(2) ** (exponent - 15 - 6)
    values = [Fraction(f16_integer(bits), 1 << 24) for bits in x]
    return [max(-127, min(127, round(value / step))) for value in values], exponent


def activation_value(mantissa: int, exponent: int) -> Fraction | None:
    """Value of a block activation; None in a block that held an infinity or a NaN."""
    return None if exponent == 31 else mantissa * Fraction(2) ** (exponent - 15 - 6)


def fraction_dot(x: Sequence[Fraction | None], w: Sequence[Fraction | None]) -> int:
    """FP32 bits of the exact, once-rounded dot product; None stands for infinities and NaNs."""
    if None in x or None in w:
        return NAN32
    return round_f32(sum((a * b for a, b in zip(x, w, strict=True)), Fraction(0)))
