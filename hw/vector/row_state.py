# SPDX-License-Identifier: Apache-2.0
"""A register for each row of words that come in any order of rows, one in each cycle."""

from __future__ import annotations

from amaranth.hdl import Array, Module, Mux, Signal, Value


def last_of_row(m: Module, rows: int, next_row: Value, row: Value, result: Signal) -> Value:
    """The result that the row of the word at hand had last.

    Parameters
    ----------
    m : Module
    rows : int
    next_row, row : Value
        The row of the word in the next cycle, and of the one at hand.
    result : Signal
        Register with the result of the word in the last cycle.
    """
    shape = result.shape()
    previous = Signal.like(row, name="previous_row", reset_less=True)
    states = Array(Signal(shape, name=f"state_{i}", reset_less=True) for i in range(rows))
    same = Signal(name="same_row", reset_less=True)
    before = Signal(shape, name="before", reset_less=True)
    m.d.sync += [
        previous.eq(row),
        # One cycle late: what is on the way there is taken from the way.
        states[previous].eq(result),
        same.eq(next_row == row),
        before.eq(Mux(next_row == previous, result, states[next_row])),
    ]
    return Mux(same, result, before)
