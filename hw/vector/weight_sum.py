# SPDX-License-Identifier: Apache-2.0
"""The exact sums of rows of softmax weights."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.ieee754 import FP16, FP32_BIAS, FP32_FRACTION, significand
from speq.hw.common.logic import incremented, leading_zeros, pipeline_stage
from speq.hw.engine_config import FP16_BITS, check_power_of_two, check_range
from speq.hw.vector.row_state import last_of_row

#: Softmax weights are FP16 numbers from 0 to 1, integers times 2^-24.
_UNIT_EXPONENT = -24
_WEIGHT_BITS = 1 - _UNIT_EXPONENT


def weight_sum_latency(lanes: int) -> int:
    """Cycles: integers, a level of the tree each, the sum, its leading zeros, and the rounding."""
    return 5 + (lanes - 1).bit_length()


class WeightSum(wiring.Component):
    """The sums of rows of softmax weights, exact and rounded once, as `vector_ops.softmax_weights`
    has them.

    Formula: ``total = fp32(sum of the row's weights since its `first`)``.

    Latency `latency` cycles from a word to its row's total with it; a word per cycle, of any row,
    no flow control. Words without `valid` change nothing.

    Parameters
    ----------
    lanes : int
        Weights of a word, a power of two from 4 to 64.
    max_count : int
        Most weights of a row.
    rows : int
        1 to 64.

    Members
    -------
    valid : In(1)
    first : In(1)
        The first word of its row.
    row : In(range(rows))
    weights : In(ArrayLayout(16, lanes))
        FP16, from 0 to 1.
    total : Out(32)

    Raises
    ------
    ValueError
        If a parameter is out of its range.
    """

    def __init__(self, lanes: int, max_count: int, rows: int) -> None:
        check_power_of_two("lanes", lanes, 4, 64)
        check_range("max_count", max_count, 1, 2**16)
        check_range("rows", rows, 1, 64)
        self.lanes = lanes
        self.max_count = max_count
        self.rows = rows
        self.latency = weight_sum_latency(lanes)
        super().__init__(
            {
                "valid": In(1),
                "first": In(1),
                "row": In(range(max(2, rows))),
                "weights": In(data.ArrayLayout(FP16_BITS, lanes)),
                "total": Out(32),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        # What is no word counts as one of the same row, of zeros.
        values: list[Value] = [Mux(self.valid, _integer(weight), 0) for weight in self.weights]
        level = 1
        (first,) = pipeline_stage(m, level, first=self.first & self.valid)
        row = following = Signal.like(self.row, name="row_1", reset_less=True)
        with m.If(self.valid):
            m.d.sync += row.eq(self.row)
        values = list(pipeline_stage(m, level, **{f"weight_{i}": v for i, v in enumerate(values)}))
        while len(values) > 1:
            level += 1
            sums = [a + b for a, b in zip(values[::2], values[1::2], strict=True)]
            values = list(pipeline_stage(m, level, **{f"sum_{i}": v for i, v in enumerate(sums)}))
            following = row
            first, row = pipeline_stage(m, level, first=first, row=row)

        total = Signal(_WEIGHT_BITS + (self.max_count - 1).bit_length(), reset_less=True)
        before = last_of_row(m, self.rows, following, row, total)
        m.d.sync += total.eq(Mux(first, 0, before) + values[0])

        # To FP32: the leading one to the top, and rounded to nearest even.
        bits = len(total)
        integer, zeros = pipeline_stage(m, level + 2, integer=total, zeros=leading_zeros(total))
        (aligned, zeros) = pipeline_stage(
            m, level + 3, aligned=(integer << zeros)[:bits], zeros=zeros
        )
        kept, rest = aligned[bits - FP32_FRACTION - 1 :], aligned[: bits - FP32_FRACTION - 1]
        guard, sticky = rest[-1], rest[:-1].any()
        field = (FP32_BIAS + _UNIT_EXPONENT + bits - 1 - zeros)[:8]
        rounded = incremented(Cat(kept[:-1], field), guard & (sticky | kept[0]))
        (result,) = pipeline_stage(
            m, level + 4, result=Mux(aligned[-1], Cat(rounded, Const(0, 1)), 0)
        )
        m.d.comb += self.total.eq(result)
        return m


def _integer(weight: Value) -> Value:
    """A weight in units of 2^-24."""
    number = data.View(FP16, weight)
    shift = Mux(number.exponent == 0, 0, number.exponent - 1)[:4]
    return (significand(number) << shift)[:_WEIGHT_BITS]
