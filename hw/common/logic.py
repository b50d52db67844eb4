# SPDX-License-Identifier: Apache-2.0
"""Small pieces of combinational logic that several units need."""

from __future__ import annotations

from collections.abc import Iterable

from amaranth.hdl import Value


def ceil_div(value: Value, divisor: int) -> Value:
    """value / divisor, rounded up; the divisor is a power of two."""
    return (value + (divisor - 1)) >> (divisor.bit_length() - 1)


def any_of(values: Iterable[Value]) -> Value:
    """OR of one or more values, bit by bit, as a balanced tree."""
    values = list(values)
    while len(values) > 1:
        pairs = [a | b for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + values[2 * len(pairs) :]
    return values[0]
