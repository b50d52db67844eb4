# SPDX-License-Identifier: Apache-2.0
"""The order in which all parts of the vector unit go through the words of an operation."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.vector.command import segment_bits, shape_layout, vector_tiles_bits


def words_per_row(config: AcceleratorConfig) -> int:
    """Words of a row of a tile. Raises ValueError if there are no lanes."""
    if not config.lanes:
        raise ValueError("lanes is 0; a vector unit needs at least 4")
    return config.engine.cols // config.lanes


def place_layout(config: AcceleratorConfig) -> data.StructLayout:
    """Where a word of an operation is, all counted from 0.

    `second`: in the second sweep through the segment. `first` and `last`: each by itself, the word
    is in the first or last row of the tile, in the first or last tile of the segment, and so on.
    `begins` and `ends`: it is the first or last word of all of the row (in this tile), the tile,
    the sweep, the segment (both sweeps), the operation.

    Lane i of the word holds element ``Cat(word, tile) * lanes + i`` of the row.
    """
    marks = data.StructLayout({"word": 1, "row": 1, "tile": 1, "sweep": 1, "segment": 1})
    spans = data.StructLayout({"row": 1, "tile": 1, "sweep": 1, "segment": 1, "operation": 1})
    return data.StructLayout(
        {
            "segment": segment_bits(config),
            "second": 1,
            "tile": vector_tiles_bits(config),
            "row": config.engine.row_bits,
            "word": max(1, (words_per_row(config) - 1).bit_length()),
            "first": marks,
            "last": marks,
            "begins": spans,
            "ends": spans,
        }
    )


class WordCounter(wiring.Component):
    """Goes through all words of an operation, in their order.

    For each segment, in one sweep or in two, for each tile, for each row: the words of the row. The
    last segment has `last_rows` rows, the others `rows` (`shape_layout`).

    Timing: `active` rises `LATENCY` cycles after `start`; from then on `place` is that of a word,
    from registers, and `advance` makes it the next one's in the next cycle. `active` falls after
    the last. An `advance` while it is low has no effect. `start` begins anew at any time.

    Parameters
    ----------
    config : AcceleratorConfig
        With lanes.
    words : int or None
        Words of a row of a tile, a power of two up to C / lanes. By default C / lanes.

    Members
    -------
    start : In(1)
    shape : In(shape_layout(config))
        With `start`; all numbers 1 or more.
    twice : In(1)
        With `start`: two sweeps through each segment.
    advance : In(1)
    active : Out(1)
    place : Out(place_layout(config))
        Undefined while not active.
    clear : In(1)
        End it at any time.

    Raises
    ------
    ValueError
        If there are no lanes, or `words` is not such a number.
    """

    #: Cycles from `start` to the first word's place.
    LATENCY = 2

    def __init__(self, config: AcceleratorConfig, words: int | None = None) -> None:
        most = words_per_row(config)
        self.words = most if words is None else words
        if not 1 <= self.words <= most or self.words & (self.words - 1):
            raise ValueError(f"words is {words!r}; allowed are powers of two up to {most}")
        super().__init__(
            {
                "start": In(1),
                "shape": In(shape_layout(config)),
                "twice": In(1),
                "advance": In(1),
                "active": Out(1),
                "place": Out(place_layout(config)),
                "clear": In(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        place, shape = self.place, self.shape
        first, last = place.first, place.last

        # What is left to do behind the current row, tile and segment, and what it is at the start
        # of each: the flags of the next word then follow from comparisons with constants alone.
        segments_left = Signal.like(shape.segments, reset_less=True)
        tiles_left = Signal.like(shape.tiles, reset_less=True)
        rows_left = Signal.like(shape.rows, reset_less=True)
        more_tiles = Signal.like(shape.tiles, reset_less=True)
        more_rows = Signal.like(shape.rows, reset_less=True)
        more_last_rows = Signal.like(shape.rows, reset_less=True)
        one_tile = Signal(reset_less=True)
        one_row = Signal(reset_less=True)
        one_last_row = Signal(reset_less=True)
        twice = Signal(reset_less=True)
        loaded = Signal()
        m.d.sync += loaded.eq(self.start)

        # An inactive counter may go on: it has no effect.
        ends = place.ends
        next_row = self.advance & ends.row
        next_tile = self.advance & ends.tile
        next_sweep = loaded | (self.advance & ends.sweep)
        next_segment = self.advance & ends.segment
        if self.words == 1:
            m.d.comb += [first.word.eq(1), last.word.eq(1)]
        else:
            word = Signal(range(self.words), reset_less=True)
            following = (word + 1)[: len(word)]
            m.d.comb += place.word.eq(word)
            with m.If(loaded):
                m.d.sync += [word.eq(0), first.word.eq(1), last.word.eq(0)]
            with m.Elif(self.advance):
                m.d.sync += [
                    word.eq(following),
                    first.word.eq(last.word),
                    last.word.eq(following.all()),
                ]

        # The segment that the next word is in, for the number of its rows.
        last_segment = Signal()
        m.d.comb += last_segment.eq(
            Mux(loaded, segments_left == 0, last.segment | (next_segment & (segments_left == 1)))
        )
        with m.If(next_tile | loaded):
            m.d.sync += [
                place.row.eq(0),
                first.row.eq(1),
                rows_left.eq(Mux(last_segment, more_last_rows, more_rows)),
                last.row.eq(Mux(last_segment, one_last_row, one_row)),
            ]
        with m.Elif(next_row):
            m.d.sync += [
                place.row.eq(place.row + 1),
                first.row.eq(0),
                rows_left.eq(rows_left - 1),
                last.row.eq(rows_left == 1),
            ]

        with m.If(next_sweep):
            m.d.sync += [
                place.tile.eq(0),
                first.tile.eq(1),
                tiles_left.eq(more_tiles),
                last.tile.eq(one_tile),
            ]
        with m.Elif(next_tile):
            m.d.sync += [
                place.tile.eq(place.tile + 1),
                first.tile.eq(0),
                tiles_left.eq(tiles_left - 1),
                last.tile.eq(tiles_left == 1),
            ]

        with m.If(next_segment | loaded):
            m.d.sync += [place.second.eq(0), last.sweep.eq(~twice)]
        with m.Elif(next_sweep):
            m.d.sync += [place.second.eq(1), last.sweep.eq(1)]
        m.d.comb += first.sweep.eq(~place.second)

        with m.If(loaded):
            m.d.sync += [place.segment.eq(0), first.segment.eq(1), last.segment.eq(last_segment)]
        with m.Elif(next_segment):
            m.d.sync += [
                place.segment.eq(place.segment + 1),
                first.segment.eq(0),
                segments_left.eq(segments_left - 1),
                last.segment.eq(last_segment),
            ]

        with m.If(self.start):
            m.d.sync += [
                segments_left.eq(shape.segments - 1),
                more_tiles.eq(shape.tiles - 1),
                more_rows.eq(shape.rows - 1),
                more_last_rows.eq(shape.last_rows - 1),
                one_tile.eq(shape.tiles == 1),
                one_row.eq(shape.rows == 1),
                one_last_row.eq(shape.last_rows == 1),
                twice.eq(self.twice),
            ]

        for flags, spans in ((first, place.begins), (last, place.ends)):
            m.d.comb += [
                spans.row.eq(flags.word),
                spans.tile.eq(Cat(flags.word, flags.row).all()),
                spans.sweep.eq(Cat(flags.word, flags.row, flags.tile).all()),
                spans.segment.eq(Cat(flags.word, flags.row, flags.tile, flags.sweep).all()),
                spans.operation.eq(flags.as_value().all()),
            ]

        m.d.sync += self.active.eq(
            ~self.start & (loaded | (self.active & ~(self.advance & ends.operation)))
        )
        with m.If(self.clear):
            m.d.sync += [loaded.eq(0), self.active.eq(0)]
        return m
