# SPDX-License-Identifier: Apache-2.0
"""The largest numbers of rows."""

from __future__ import annotations

from amaranth.hdl import Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.ieee754 import FP32, is_nan
from speq.hw.common.logic import pipeline_stage
from speq.hw.engine_config import check_power_of_two, check_range
from speq.hw.vector.fp32_maximum import Fp32Maximum
from speq.hw.vector.row_state import last_of_row

_LEAST = 0xFF800000  # minus infinity


def row_maximum_latency(lanes: int) -> int:
    """Cycles: a level of the tree each, and the comparison with what was there."""
    return 2 + (lanes - 1).bit_length()


class RowMaximum(wiring.Component):
    """The largest of each row's FP32 numbers, as the softmax needs it.

    Formula: ``maximum = max of the row's numbers since its `first` that count``, minus infinity if
    there is none; NaN counts as minus infinity, and of both zeros either may be it.

    Latency `latency` cycles from a word to its row's maximum with it; a word per cycle, of any row,
    no flow control. Words without `valid` change nothing.

    Parameters
    ----------
    lanes : int
        Numbers of a word, a power of two from 4 to 64.
    rows : int
        1 to 64.

    Members
    -------
    valid : In(1)
    first : In(1)
        The first word of its row.
    row : In(range(rows))
    counts : In(lanes)
        The numbers that count.
    numbers : In(ArrayLayout(32, lanes))
    maximum : Out(32)

    Raises
    ------
    ValueError
        If a parameter is out of its range.
    """

    def __init__(self, lanes: int, rows: int) -> None:
        check_power_of_two("lanes", lanes, 4, 64)
        check_range("rows", rows, 1, 64)
        self.lanes = lanes
        self.rows = rows
        self.latency = row_maximum_latency(lanes)
        super().__init__(
            {
                "valid": In(1),
                "first": In(1),
                "row": In(range(max(2, rows))),
                "counts": In(lanes),
                "numbers": In(data.ArrayLayout(32, lanes)),
                "maximum": Out(32),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        masked = [
            Mux(counts & self.valid & ~is_nan(data.View(FP32, number)), number, _LEAST)
            for counts, number in zip(self.counts, self.numbers, strict=True)
        ]
        numbers: list[Value] = list(
            pipeline_stage(m, 0, **{f"number_{i}": v for i, v in enumerate(masked)})
        )
        (first,) = pipeline_stage(m, 0, first=self.first & self.valid)
        # What is no word counts as one of the same row in which no number counts.
        row = following = Signal.like(self.row, name="row_0", reset_less=True)
        with m.If(self.valid):
            m.d.sync += row.eq(self.row)
        level = 0
        while len(numbers) > 1:
            level += 1
            numbers = [
                _larger(m, f"maximum_{level}_{i}", a, b)
                for i, (a, b) in enumerate(zip(numbers[::2], numbers[1::2], strict=True))
            ]
            following = row
            first, row = pipeline_stage(m, level, first=first, row=row)
        m.submodules.running = running = Fp32Maximum()
        before = last_of_row(m, self.rows, following, row, running.maximum)
        m.d.comb += [
            running.a.eq(Mux(first, _LEAST, before)),
            running.b.eq(numbers[0]),
            self.maximum.eq(running.maximum),
        ]
        return m


def _larger(m: Module, name: str, a: Value, b: Value) -> Value:
    """The larger of two numbers, a cycle later."""
    m.submodules[name] = unit = Fp32Maximum()
    m.d.comb += [unit.a.eq(a), unit.b.eq(b)]
    return unit.maximum
