# SPDX-License-Identifier: Apache-2.0
"""Which entries of the KV cache the rows of a pass attend to."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.common.logic import delayed, pipeline_stage
from speq.hw.common.ram import Ram
from speq.hw.vector.command import DETAIL_BITS, rows_layout, vector_tiles_bits
from speq.hw.vector.word_counter import words_per_row


class AttentionMask(wiring.Component):
    """The entries that the softmax of a row counts, a word of lanes at a time.

    Entries below `position` are those of earlier passes, in the order of the text; entry
    ``position + r`` is that of row r of the pass. Row t sees, of the former all, of the latter
    those of the rows that it follows and its own; with a window w only those of them whose distance
    in the text is below w.

    Timing: `busy` is high from the cycle after `start` on, for `ROW_CYCLES` a row. While it is low,
    `seen` is that of `row` and `word` of `LATENCY` cycles before; a word per cycle, no flow
    control.

    Parameters
    ----------
    config : AcceleratorConfig
        With lanes.

    Members
    -------
    start : In(1)
    count : In(token_bits)
        With `start`: rows of the pass, 1 or more.
    position : In(k_bits)
        With `start`.
    window : In(32)
        With `start`; 0: none.
    rows : In(rows_layout(config))
        While `busy`; each row follows one before it.
    busy : Out(1)
    row : In(row_bits)
        A row of the pass.
    word : In
        Number of a word of entries: bit i of `seen` is entry ``word * lanes + i``.
    seen : Out(lanes)

    Raises
    ------
    ValueError
        If there are no lanes.
    """

    LATENCY = 4
    #: Cycles that `busy` is high for each row.
    ROW_CYCLES = 4

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        self._word_bits = vector_tiles_bits(config) + (words_per_row(config) - 1).bit_length()
        engine = config.engine
        super().__init__(
            {
                "start": In(1),
                "count": In(engine.token_bits),
                "position": In(engine.k_bits),
                "window": In(DETAIL_BITS),
                "rows": In(rows_layout(config)),
                "busy": Out(1),
                "row": In(engine.row_bits),
                "word": In(self._word_bits),
                "seen": Out(config.lanes),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        engine, lanes = self.config.engine, self.config.lanes
        shift = lanes.bit_length() - 1
        # The bits of the pass's own entries, from the word on that has the first of them.
        own_words = -(-(engine.rows + lanes - 1) // lanes)
        own_bits = own_words * lanes
        # An entry has a word and a lane, however few there are.
        entry_bits = max(engine.k_bits, shift + 1)
        depth = max(2, engine.rows)
        m.submodules.masks = masks = Ram(own_bits + entry_bits, depth)
        m.submodules.paths = paths = Ram(engine.rows, depth)

        # A row after the other: where it is, the path to the row that it follows, what it sees.
        position = Signal(entry_bits, reset_less=True)
        window = Signal(engine.k_bits, reset_less=True)
        has_window = Signal(reset_less=True)
        row = Signal(engine.row_bits, reset_less=True)
        one_hot = Signal(engine.rows, reset_less=True)
        rows_left = Signal(engine.token_bits, reset_less=True)
        step = Signal(self.ROW_CYCLES)
        m.d.comb += self.busy.eq(step.any())
        m.d.sync += step.eq(step << 1)
        with m.If(step[-1] & (rows_left != 1)):
            m.d.sync += [
                step.eq(1),
                row.eq(row + 1),
                one_hot.eq(one_hot << 1),
                rows_left.eq(rows_left - 1),
            ]
        with m.If(self.start):
            m.d.sync += [
                step.eq(1),
                row.eq(0),
                one_hot.eq(1),
                rows_left.eq(self.count),
                position.eq(self.position),
                window.eq(self.window),
                has_window.eq(self.window.any() & ~self.window[engine.k_bits :].any()),
            ]
        own, parent = pipeline_stage(m, 1, depth=self.rows[row].depth, parent=self.rows[row].parent)
        m.d.comb += [paths.read_address.eq(parent), paths.read_enable.eq(step[1])]
        # Of the pass's rows those from this depth on are in the window.
        oldest = own + 1 - window
        end = (position + own + 1)[:entry_bits]
        all_near, oldest, end = pipeline_stage(
            m,
            2,
            all_near=~has_window | (oldest < 0),
            oldest=oldest[: engine.row_bits],
            end=end,
        )
        near = Cat(all_near | (other.depth >= oldest) for other in self.rows)
        path = Mux(row == 0, 0, paths.read_data) | one_hot
        lowest = Mux(has_window & (end > window), end - window, 0)[:entry_bits]
        path, visible, lowest = pipeline_stage(m, 3, path=path, visible=path & near, lowest=lowest)
        placed = Signal(own_bits)
        m.d.comb += [
            paths.write_enable.eq(step[3]),
            paths.write_address.eq(row),
            paths.write_data.eq(path),
            masks.write_enable.eq(step[3]),
            masks.write_address.eq(row),
            placed.eq(visible << position[:shift]),
            masks.write_data.eq(Cat(placed, lowest)),
        ]

        # A word: behind the RAM, where it is from those that decide.
        m.d.comb += [masks.read_address.eq(self.row), masks.read_enable.eq(1)]
        word = delayed(m, self.word, 1)
        first_word = position[shift:]
        own, lowest, word, distance, is_before, is_at = pipeline_stage(
            m,
            5,
            own=masks.read_data[:own_bits],
            lowest=masks.read_data[own_bits:],
            word=word,
            distance=word - first_word,
            is_before=word < first_word,
            is_at=word == first_word,
        )
        first_lanes, lowest_lanes = (_below(n[:shift], lanes) for n in (position, lowest))
        lowest_word = lowest[shift:]
        own, below, hidden = pipeline_stage(
            m,
            6,
            own=_chosen(own, distance, own_words, lanes),
            below=Mux(is_at, first_lanes, is_before.replicate(lanes)),
            hidden=Mux(word == lowest_word, lowest_lanes, (word < lowest_word).replicate(lanes)),
        )
        (seen,) = pipeline_stage(m, 7, seen=own | (below & ~hidden))
        m.d.comb += self.seen.eq(seen)
        return m


def _below(bound: Value, lanes: int) -> Value:
    """The lanes below a bound, which is one of them."""
    return Cat(*(lane < bound for lane in range(lanes - 1)), Const(0, 1))


def _chosen(value: Value, number: Value, words: int, lanes: int) -> Value:
    """The word of a signed number, of so many; 0 if there is none."""
    chosen: Value = Const(0, lanes)
    for i in range(words):
        chosen = chosen | (value.word_select(i, lanes) & (number == i).replicate(lanes))
    return chosen
