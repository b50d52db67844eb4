# SPDX-License-Identifier: Apache-2.0
"""What the vector unit keeps of each row."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.common.logic import delayed, pipeline_stage
from speq.hw.common.ram import Ram
from speq.hw.engine_config import FP16_BITS
from speq.hw.vector.command import segment_bits
from speq.hw.vector.fp32_to_fp16 import Fp32ToFp16
from speq.hw.vector.reciprocal import Reciprocal
from speq.hw.vector.row_maximum import RowMaximum, row_maximum_latency
from speq.hw.vector.weight_sum import WeightSum, weight_sum_latency
from speq.hw.vector.word_counter import words_per_row

#: Cycles from a word with the sum of a norm to its row's factor.
FACTOR_LATENCY = Reciprocal.LATENCY + 1


def maximum_latency(config: AcceleratorConfig) -> int:
    """Cycles from a row's last score to the largest."""
    return row_maximum_latency(config.lanes) + 1


def reciprocal_latency(config: AcceleratorConfig) -> int:
    """Cycles from a row's last weights to the reciprocal of their sum."""
    return Fp32ToFp16.LATENCY + weight_sum_latency(config.lanes) + Reciprocal.LATENCY + 1


class RowValues(wiring.Component):
    """Of each row the factor of a norm or the largest score of a softmax; and of each row of each
    segment the reciprocal of the sum of its weights.

    Formulas: ``factor = vector_ops.rsqrt(numbers[0])`` of a word with `is_sum`; the maximum of a
    row's words with `is_score`, of the numbers that count; ``vector_ops.reciprocal`` of the sum of
    a row's words with `is_weight`.

    Timing: a word per cycle, of any row, no flow control. From a word to the first cycle in which
    its row's value may be read: `factor_latency` cycles for the factor, `maximum_latency` from the
    row's last score, `reciprocal_latency` from its last weights. `value` is that of `READ_LATENCY`
    cycles before.

    Parameters
    ----------
    config : AcceleratorConfig
        With lanes.

    Members
    -------
    is_norm : In(1)
        The factor is computed, otherwise what a softmax needs; constant while words are on their
        way, like `segment`.
    is_sum, is_score, is_weight : In(1)
        What kind of word it is.
    row : In(row_bits)
    begins, ends : In(1)
        It is the row's first or last word.
    counts : In(lanes)
    numbers : In(ArrayLayout(32, lanes))
    weights : In(ArrayLayout(16, lanes))
        FP16, `Fp32ToFp16.LATENCY` cycles after the word's `is_weight`.
    segment : In
    read_row, read_segment : In
    reads_reciprocal : In(1)
        Constant while values are on their way.
    value : Out(32)

    Raises
    ------
    ValueError
        If there are no lanes.
    """

    READ_LATENCY = 2

    def __init__(self, config: AcceleratorConfig) -> None:
        words_per_row(config)
        engine, lanes = config.engine, config.lanes
        self.config = config
        self._maximum = RowMaximum(lanes, engine.rows)
        self._weight_sum = WeightSum(lanes, engine.max_k, engine.rows)
        self.factor_latency = FACTOR_LATENCY
        self.maximum_latency = maximum_latency(config)
        self.reciprocal_latency = reciprocal_latency(config)
        super().__init__(
            {
                "is_norm": In(1),
                "is_sum": In(1),
                "is_score": In(1),
                "is_weight": In(1),
                "row": In(engine.row_bits),
                "begins": In(1),
                "ends": In(1),
                "counts": In(lanes),
                "numbers": In(data.ArrayLayout(32, lanes)),
                "weights": In(data.ArrayLayout(FP16_BITS, lanes)),
                "segment": In(segment_bits(config)),
                "read_row": In(engine.row_bits),
                "read_segment": In(segment_bits(config)),
                "reads_reciprocal": In(1),
                "value": Out(32),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config = self.config
        m.submodules.maximum = maximum = self._maximum
        m.submodules.weight_sum = weight_sum = self._weight_sum
        m.submodules.reciprocal = reciprocal = Reciprocal()
        m.submodules.values = values = Ram(32, max(2, config.engine.rows))
        depth = config.query_heads << config.engine.row_bits
        m.submodules.reciprocals = reciprocals = Ram(32, depth)

        m.d.comb += [
            maximum.valid.eq(self.is_score),
            maximum.first.eq(self.begins),
            maximum.row.eq(self.row),
            maximum.counts.eq(self.counts),
            maximum.numbers.eq(self.numbers),
        ]
        has_maximum, maximum_row = (
            delayed(m, value, maximum.latency) for value in (self.is_score & self.ends, self.row)
        )

        is_weight, begins, ends, row = (
            delayed(m, value, Fp32ToFp16.LATENCY)
            for value in (self.is_weight, self.begins, self.ends, self.row)
        )
        m.d.comb += [
            weight_sum.valid.eq(is_weight),
            weight_sum.first.eq(begins),
            weight_sum.row.eq(row),
            weight_sum.weights.eq(self.weights),
        ]
        has_total, total_row = (
            delayed(m, value, weight_sum.latency) for value in (is_weight & ends, row)
        )

        m.d.comb += [
            reciprocal.x.eq(Mux(self.is_norm, self.numbers[0], weight_sum.total)),
            reciprocal.root.eq(self.is_norm),
        ]
        has_reciprocal, reciprocal_row = (
            delayed(m, value, Reciprocal.LATENCY)
            for value in (
                Mux(self.is_norm, self.is_sum, has_total),
                Mux(self.is_norm, self.row, total_row),
            )
        )
        m.d.comb += [
            values.write_enable.eq(Mux(self.is_norm, has_reciprocal, has_maximum)),
            values.write_address.eq(Mux(self.is_norm, reciprocal_row, maximum_row)),
            values.write_data.eq(Mux(self.is_norm, reciprocal.result, maximum.maximum)),
            reciprocals.write_enable.eq(~self.is_norm & has_reciprocal),
            reciprocals.write_address.eq(Cat(reciprocal_row, self.segment)[: _bits(depth)]),
            reciprocals.write_data.eq(reciprocal.result),
            values.read_enable.eq(1),
            values.read_address.eq(self.read_row),
            reciprocals.read_enable.eq(1),
            reciprocals.read_address.eq(Cat(self.read_row, self.read_segment)[: _bits(depth)]),
        ]
        (value,) = pipeline_stage(
            m, 2, value=Mux(self.reads_reciprocal, reciprocals.read_data, values.read_data)
        )
        m.d.comb += self.value.eq(value)
        return m


def _bits(depth: int) -> int:
    """Bits of an address."""
    return (depth - 1).bit_length()
