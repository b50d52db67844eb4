# SPDX-License-Identifier: Apache-2.0
"""Tables of the elementary functions: lines or parabolas in integers, one for each interval.

Golden model and hardware share them (pure Python, as `speq.model.number_format`), so that an
exponential, a reciprocal and a root are small integer sums of products, the same everywhere.

A table approximates a falling, convex function f of a fraction x in [0, 1), which is `index_bits`
bits i and behind them `bits` bits g:

    slope = c1[i]                                      lines
    slope = c1[i] - ((g >> drop) * c2[i] >> shift2)    parabolas
    f     = c0[i] - (g * slope >> shift1)              in units of 2^-value_bits

Coefficients follow from f at the two or three Chebyshev points of the interval, in decimal
arithmetic of 40 digits; the first is then moved so that the largest errors above and below are
equal. Where f(0) is 1 it has no error: the largest weight of a softmax is exactly 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Context, Decimal, localcontext
from functools import partial

_CONTEXT = Context(prec=40)
_CHECKED = 8  # parts of an interval at whose ends the error is looked at


@dataclass(frozen=True, eq=False)
class FunctionTable:
    """A table: see the module's text. Coefficients are computed from `function`, of decimal x;
    those of lines have no `drop` and `shift2`, and c2 is 0."""

    function: Callable[[Decimal], Decimal]
    index_bits: int
    bits: int
    value_bits: int
    shift1: int
    drop: int | None = None
    shift2: int = 0
    c0: tuple[int, ...] = field(init=False)
    c1: tuple[int, ...] = field(init=False)
    c2: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        with localcontext(_CONTEXT):
            rows = [self._coefficients(i) for i in range(1 << self.index_bits)]
        for name, values in zip(("c0", "c1", "c2"), zip(*rows, strict=True), strict=True):
            object.__setattr__(self, name, values)

    def _coefficients(self, i: int) -> tuple[int, int, int]:
        size = Decimal(1) / (1 << self.index_bits)
        start = size * i
        outer = (Decimal(2 if self.drop is None else 3)).sqrt() / 2
        low, middle, high = (size / 2 * (1 + place) for place in (-outer, 0, outer))
        y_low, y_middle, y_high = (self.function(start + x) for x in (low, middle, high))
        # What a unit of the slope is worth.
        fraction_bits = self.index_bits + self.bits
        slope_bits = self.value_bits + self.shift1 - fraction_bits
        if self.drop is None:
            slope, c2 = (y_high - y_low) / (high - low), 0
        else:
            first = (y_middle - y_low) / (middle - low)
            second = (y_high - y_middle) / (high - middle)
            bend = (second - first) / (high - low)
            slope = first - bend * (low + middle)  # at the interval's start
            c2 = round(bend * Decimal(2) ** (slope_bits + self.shift2 + self.drop - fraction_bits))
        c1 = round(-slope * Decimal(2) ** slope_bits)
        errors = []
        for part in range(_CHECKED + 1):
            g = min((part << self.bits) // _CHECKED, (1 << self.bits) - 1)
            exact = self.function(start + size * g / (1 << self.bits)) * (1 << self.value_bits)
            errors.append(exact + self._fall(g, c1, c2))
        c0 = round((min(errors) + max(errors)) / 2)
        if i == 0 and self.function(Decimal(0)) == 1:
            c0 = 1 << self.value_bits
        return c0, c1, c2

    def _fall(self, g: int, c1: int, c2: int) -> int:
        slope = c1 if self.drop is None else c1 - ((g >> self.drop) * c2 >> self.shift2)
        return g * slope >> self.shift1

    def value(self, x: int) -> int:
        """f of a fraction in units of 2^-(index_bits + bits), in units of 2^-value_bits."""
        i, g = x >> self.bits, x & (1 << self.bits) - 1
        return self.c0[i] - self._fall(g, self.c1[i], self.c2[i])


#: log2(e) and its fraction bits, the bits of a significand that it is multiplied with, and the
#: fraction bits of what an exponential is the power of two of.
LOG2_E = 0x2E2A9
LOG2_E_BITS = 17
LOGARITHM_SIGNIFICAND = 18
LOGARITHM_BITS = 16
#: 2^-x, for exponentials.
POWER = FunctionTable(
    lambda x: Decimal(2) ** -x,
    index_bits=6,
    bits=10,
    value_bits=17,
    shift1=10,
)
#: 1 / (1 + x), for sigmoids.
SIGMOID = FunctionTable(
    lambda x: 1 / (1 + x),
    index_bits=7,
    bits=9,
    value_bits=17,
    shift1=10,
)
_to_24_bits = partial(
    FunctionTable, index_bits=7, bits=16, value_bits=26, shift1=16, drop=4, shift2=12
)
#: 1 / (1 + x), to FP32's 24 bits.
INVERSE = _to_24_bits(lambda x: 1 / (1 + x))
#: 1 / sqrt(1 + x) and 1 / sqrt(2 + 2 x), to as many.
ROOTS = (
    _to_24_bits(lambda x: 1 / (1 + x).sqrt()),
    _to_24_bits(lambda x: 1 / (2 + 2 * x).sqrt()),
)
