# SPDX-License-Identifier: Apache-2.0
"""Small pieces of combinational logic that several units need."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, ValueLike

#: Bits of a piece of an incrementer.
_PIECE = 8


def ceil_div(value: Value, divisor: int) -> Value:
    """value / divisor, rounded up; the divisor is a power of two."""
    return (value + (divisor - 1)) >> (divisor.bit_length() - 1)


def exceeds(value: Value, bound: int) -> Value:
    """Whether a number is larger; a constant where its bits do not allow it, of which tools warn
    otherwise."""
    return value > bound if 1 << len(value) > bound + 1 else Const(0)


def any_of(values: Iterable[Value]) -> Value:
    """OR of one or more values, bit by bit, as a balanced tree."""
    values = list(values)
    while len(values) > 1:
        pairs = [a | b for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + values[2 * len(pairs) :]
    return values[0]


def pipeline_stage(m: Module, number: int, **values: ValueLike) -> tuple[Signal, ...]:
    """The values in the next cycle, in registers without a reset that are named after them and
    the stage's number."""
    registers = []
    for name, value in values.items():
        value = Value.cast(value)
        register = Signal(value.shape(), name=f"{name}_{number}", reset_less=True)
        m.d.sync += register.eq(value)
        registers.append(register)
    return tuple(registers)


def registered(m: Module, value: Value, name: str) -> Signal:
    """`value` of the cycle before, in a register of this name without a reset."""
    register = Signal(value.shape(), name=name, reset_less=True)
    m.d.sync += register.eq(value)
    return register


def delayed(m: Module, value: Value, cycles: int) -> Value:
    """`value` so many cycles later, in registers without a reset."""
    for _ in range(cycles):
        register = Signal(value.shape(), reset_less=True)
        m.d.sync += register.eq(value)
        value = register
    return value


def leading_zeros(value: Value) -> Value:
    """Number of zeros above the highest one, and `len(value)` if there is no one: a tree of
    logarithmic depth."""
    levels = len(value).bit_length()
    # A one right below the value ends the count; what is below that does not matter.
    bits = Cat(Const(-1, (1 << levels) - len(value)), value)
    # For each piece of the value, the highest first: the bits of its count, and whether it is all
    # zeros.
    pieces: list[tuple[list[Value], Value]] = [([], ~bit) for bit in reversed(bits)]
    while len(pieces) > 1:
        halves = zip(pieces[::2], pieces[1::2], strict=True)
        pieces = [
            (
                [*map(partial(Mux, upper_empty), lower, upper), upper_empty],
                upper_empty & lower_empty,
            )
            for (upper, upper_empty), (lower, lower_empty) in halves
        ]
    count, _ = pieces[0]
    return Cat(*count)


def shift_right_sticky(value: Value, amount: Value) -> Value:
    """`value` shifted right, the lowest bit being the OR of itself and of all bits shifted out."""
    # The largest step first: what the later ones cannot bring into a part that is used is left out.
    for stage, shifts in reversed(list(enumerate(amount))):
        distance = min(1 << stage, len(value) - 1)
        lost = value[: distance + 1].any()
        value = Mux(shifts, Cat(lost, value[distance + 1 :]), value)
    return value


def incremented(value: Value, carry: Value) -> Value:
    """``value + carry`` without its own carry, in pieces that each wait only for whether the bits
    below are all ones."""
    pieces = []
    for low in range(0, len(value), _PIECE):
        piece = value[low : low + _PIECE]
        pieces.append(Mux(carry, (piece + 1)[: len(piece)], piece))
        carry = carry & piece.all()
    return Cat(*pieces)


def decremented(value: Value) -> Value:
    """``value - 1``, modulo 2^bits, with the short paths of `incremented`."""
    return ~incremented(~value, Const(1))
