# SPDX-License-Identifier: Apache-2.0
"""The partial sums of rows, and the order in which they are added up."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.common.logic import any_of, delayed
from speq.hw.common.ram import Ram
from speq.hw.engine_config import check_range
from speq.hw.vector.command import vector_tiles_bits
from speq.hw.vector.word_counter import words_per_row

#: Partial sums of a row, as `speq.model.vector_ops` has them.
PARTIAL_SUMS = 64


def slot_bits(config: AcceleratorConfig) -> int:
    """Bits of the number of a word of a row's partial sums; 1 if there is one word."""
    return max(1, (PARTIAL_SUMS // config.lanes - 1).bit_length())


class PartialSums(wiring.Component):
    """64 partial sums of each row, in words of `lanes`, and the additions that leave their sum, as
    `speq.model.vector_ops.row_sum` says: the upper half to the lower one, until one is left.

    The adders are not here. Each addition of two words begins with `adds`: `first` holds one of
    them in the next cycle, `other` the other `other_delay` cycles later than that. At the end each
    row comes once more, with `scales`: its sum is element 0 of `first`.

    Timing: `busy` is high from the cycle after `start` on; the additions of one level follow each
    other without a pause, the next level's begin `pause` cycles after the last one of them, and
    `busy` falls `scale_pause` cycles after the last row. While it is low, `partial` is the word of
    `read_row` and `read_slot` of the cycle before.

    Parameters
    ----------
    config : AcceleratorConfig
        With lanes.
    other_delay, pause, scale_pause : int
        2 or more.

    Members
    -------
    start : In(1)
    last_row : In(row_bits)
        While `busy`: the rows from 0 to this one are added up.
    tiles : In
        While `busy`: of a row. What no element of them is in counts as 0.
    busy : Out(1)
    adds : Out(1)
    scales : Out(1)
    row, slot : Out
        With `adds`: where the sum is to go.
    first, other : Out(ArrayLayout(32, lanes))
    read_row, read_slot : In
    partial : Out(ArrayLayout(32, lanes))
    write_enable : In(1)
    write_row, write_slot : In
    write_data : In(ArrayLayout(32, lanes))

    Raises
    ------
    ValueError
        If there are no lanes, or a delay is out of its range.
    """

    def __init__(
        self, config: AcceleratorConfig, other_delay: int, pause: int, scale_pause: int
    ) -> None:
        self._words = words_per_row(config)
        check_range("other_delay", other_delay, 2, 30)
        check_range("pause", pause, 2, 60)
        check_range("scale_pause", scale_pause, 2, 60)
        self.config = config
        self.other_delay = other_delay
        self.pause = pause
        self.scale_pause = scale_pause
        row, slot = config.engine.row_bits, slot_bits(config)
        word = data.ArrayLayout(32, config.lanes)
        super().__init__(
            {
                "start": In(1),
                "last_row": In(row),
                "tiles": In(vector_tiles_bits(config)),
                "busy": Out(1),
                "adds": Out(1),
                "scales": Out(1),
                "row": Out(row),
                "slot": Out(slot),
                "first": Out(word),
                "other": Out(word),
                "read_row": In(row),
                "read_slot": In(slot),
                "partial": Out(word),
                "write_enable": In(1),
                "write_row": In(row),
                "write_slot": In(slot),
                "write_data": In(word),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        lanes = self.config.lanes
        slots = PARTIAL_SUMS // lanes
        # Two copies, as two words are read in a cycle.
        depth = 1 << len(self.row) + len(self.slot)
        m.submodules.firsts = firsts = Ram(32 * lanes, depth)
        m.submodules.others = others = Ram(32 * lanes, depth)
        for ram in (firsts, others):
            m.d.comb += [
                ram.write_enable.eq(self.write_enable),
                ram.write_address.eq(Cat(self.write_slot, self.write_row)),
                ram.write_data.eq(self.write_data),
                ram.read_enable.eq(1),
            ]

        # A level: so many pairs of words for each row; behind these, without pairs, the halves of a
        # word that are so many elements apart; behind these the sums.
        pairs = Signal(len(self.slot), reset_less=True)
        distance = Signal(lanes.bit_length() - 1, reset_less=True)
        is_first_level = Signal(reset_less=True)
        row = Signal.like(self.row, reset_less=True)
        slot = Signal.like(self.slot, reset_less=True)
        timer = Signal(range(max(self.pause, self.scale_pause)), reset_less=True)
        row_ends = (pairs == 0) | (slot + 1 == pairs)
        m.d.comb += [
            self.row.eq(row),
            self.slot.eq(slot),
            self.scales.eq(~pairs.any() & ~distance.any()),
        ]
        with m.FSM():
            with m.State("IDLE"):
                m.d.sync += [
                    pairs.eq(slots // 2),
                    distance.eq(lanes // 2),
                    is_first_level.eq(1),
                    row.eq(0),
                    slot.eq(0),
                ]
                with m.If(self.start):
                    m.next = "ADD"
            with m.State("ADD"):
                m.d.comb += [self.busy.eq(1), self.adds.eq(1)]
                m.d.sync += [
                    slot.eq(Mux(row_ends, 0, slot + 1)),
                    timer.eq(Mux(self.scales, self.scale_pause, self.pause) - 2),
                ]
                with m.If(row_ends):
                    m.d.sync += row.eq(row + 1)
                    with m.If(row == self.last_row):
                        m.d.sync += row.eq(0)
                        m.next = "WAIT"
            with m.State("WAIT"):
                m.d.comb += self.busy.eq(1)
                m.d.sync += timer.eq(timer - 1)
                with m.If(timer == 0):
                    with m.If(self.scales):
                        m.next = "IDLE"
                    with m.Else():
                        m.d.sync += [is_first_level.eq(0), pairs.eq(pairs >> 1)]
                        with m.If(pairs == 0):
                            m.d.sync += distance.eq(distance >> 1)
                        m.next = "ADD"

        # Of a short row some words have never been written.
        def is_missing(word: Signal) -> Signal:
            missing = Signal(name="is_missing", reset_less=True)
            tile = word >> (self._words.bit_length() - 1)
            m.d.sync += missing.eq(is_first_level & (tile >= self.tiles))
            return missing

        m.d.comb += [
            firsts.read_address.eq(Cat(slot, row)),
            self.first.eq(firsts.read_data & ~is_missing(slot).replicate(32 * lanes)),
        ]
        other_row, other_slot = (
            delayed(m, value, self.other_delay - 1) for value in (row, slot | pairs)
        )
        m.d.comb += [
            others.read_address.eq(
                Mux(self.busy, Cat(other_slot, other_row), Cat(self.read_slot, self.read_row))
            ),
            self.partial.eq(others.read_data),
        ]
        # A register between the RAM and the choice among its elements.
        is_there = ~is_missing(other_slot)
        other = delayed(m, others.read_data & is_there.replicate(32 * lanes), 1)
        word = data.View(self.partial.shape(), other)
        for lane in range(lanes):
            choices = [word[lane] & pairs.any().replicate(32)]
            for bit in range(lanes.bit_length() - 1):
                chosen = distance[bit] & ~pairs.any()
                choices.append(word[lane ^ 1 << bit] & chosen.replicate(32))
            m.d.comb += self.other[lane].eq(any_of(choices))
        return m
