# SPDX-License-Identifier: Apache-2.0
"""Rows of FP16 elements into lines of the same element of all rows."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.common.ram import Ram
from speq.hw.engine_config import FP16_BITS
from speq.hw.memory.write_combiner import piece_layout
from speq.hw.vector.run_planner import RunPlanner, line_places, run_layout, writer_command_layout
from speq.hw.vector.word_counter import place_layout, words_per_row

_BYTE = 8
#: Tiles that are held: one is filled while the other is passed on.
_TILES = 2
#: Runs that wait for being passed on.
_RUNS = 2


def placed_word_layout(config: AcceleratorConfig) -> data.StructLayout:
    """FP16 elements of a row, and where they are."""
    return data.StructLayout(
        {"values": data.ArrayLayout(FP16_BITS, config.lanes), "place": place_layout(config)}
    )


class Transposer(wiring.Component):
    """Write tiles of rows as lines of elements, to where the target of a command says
    (`speq.hw.control.descriptor.Target`, all but TILES and VALUES).

    Flow control: both streams may stall in any cycle. Without stalls a word is taken in every
    cycle, until two tiles are held. A run of a tile (`RunPlanner`) takes, besides the cycles of a
    pipeline, one cycle for as many lines as a beat and a word of lanes hold, two if these are in
    two beats, and one for each line of KEYS; a line that is wider than a beat takes one for each
    of its beats.

    Parameters
    ----------
    config : AcceleratorConfig
        With lanes.

    Members
    -------
    start : In(1)
        A command begins; all pieces of the one before have been taken.
    command : In(writer_command_layout(config))
        From `start` on until the last piece was taken.
    words : In(stream of placed_word_layout(config))
        Not before the cycle after `start`.
    pieces : Out(stream of piece_layout(config.data))
        `last` marks the command's last.
    """

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        # A line has the numbers of all rows, and may be followed by bytes that nothing is for.
        self._line_bits = FP16_BITS * line_places(config)
        size = config.data.data_bits
        #: Lines of A bytes in a beat, and how many of them are passed on together.
        self._slots = max(1, size // (_BYTE * config.activation_bytes))
        self._group = min(self._slots, config.lanes)
        #: Beats of a line.
        self._parts = max(1, self._line_bits // size)
        super().__init__(
            {
                "start": In(1),
                "command": In(writer_command_layout(config)),
                "words": In(stream.Signature(placed_word_layout(config))),
                "pieces": Out(stream.Signature(piece_layout(config.data))),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        m.submodules.planner = planner = RunPlanner(self.config)
        m.d.comb += [planner.start.eq(self.start), planner.command.eq(self.command)]
        banks = [
            Ram(FP16_BITS * self.config.lanes, _TILES * words_per_row(self.config))
            for _ in range(self.config.engine.rows)
        ]
        for i, bank in enumerate(banks):
            m.submodules[f"bank_{i}"] = bank
        drained = Signal()
        self._fill(m, planner, banks, drained)
        self._drain(m, planner, banks, drained)
        return m

    def _fill(self, m: Module, planner: RunPlanner, banks: list[Ram], drained: Signal) -> None:
        """Words to the banks of their rows, and whole tiles to the planner."""
        word, place = self.words.payload, self.words.payload.place
        held = Signal(range(_TILES + 1))
        half = Signal()
        take = self.words.valid & self.words.ready
        filled = take & place.ends.tile
        tile = planner.tiles.payload
        m.d.comb += [
            self.words.ready.eq(held != _TILES),
            # There is room for as many tiles as are held.
            planner.tiles.valid.eq(filled),
            tile.rows.eq(place.row + 1),
            tile.ends_segment.eq(place.ends.segment),
            tile.ends_operation.eq(place.ends.operation),
        ]
        m.d.sync += [held.eq(held + filled - drained), half.eq(half ^ filled)]
        for i, bank in enumerate(banks):
            m.d.comb += [
                bank.write_enable.eq(take & (place.row == i)),
                bank.write_address.eq(self._bank_address(place.word, half)),
                bank.write_data.eq(word.values),
            ]

    def _bank_address(self, word: Value, half: Value) -> Value:
        return Cat(word[: words_per_row(self.config).bit_length() - 1], half)

    def _group_layout(self) -> data.StructLayout:
        """Lines of a run whose numbers lie in a word of the banks, from number `element` of the
        tile on. The first is at `address`; `splits`: they are in two beats."""
        config = self.config
        run = run_layout(config)
        return data.StructLayout(
            {
                "address": config.address_bits,
                "element": range(config.engine.cols),
                "lines": range(self._group + 1),
                "splits": 1,
                "ends_run": 1,
                "run": run,
            }
        )

    def _next_group(self, m: Module, planner: RunPlanner, takes: Value) -> tuple[Signal, data.View]:
        """The groups of all runs, one behind the other, in a register that takes the next one."""
        config = self.config
        layout = run_layout(config)
        # It also keeps the way of `ready` from the planner.
        m.submodules.runs = runs = SyncFIFO(width=layout.size, depth=_RUNS)
        following = data.View(layout, runs.r_data)
        key_line = FP16_BITS // _BYTE * config.engine.cols

        run = Signal(layout, reset_less=True)  # its address and lines move on
        active = Signal()
        element = Signal(range(config.engine.cols), reset_less=True)
        is_last = Signal(reset_less=True)
        step = Mux(run.keys, 1, self._group)
        m.d.comb += [
            runs.w_data.eq(planner.runs.payload),
            runs.w_en.eq(planner.runs.valid),
            planner.runs.ready.eq(runs.w_rdy),
            runs.r_en.eq(~active | (takes & is_last)),
        ]
        with m.If(runs.r_en):
            m.d.sync += [
                active.eq(runs.r_rdy),
                run.eq(following),
                element.eq(0),
                is_last.eq(following.lines <= Mux(following.keys, 1, self._group)),
            ]
        with m.Elif(takes):
            m.d.sync += [
                run.address.eq(
                    run.address + Mux(run.keys, key_line, self._group * config.activation_bytes)
                ),
                run.lines.eq(run.lines - step),
                element.eq(element + step),
                is_last.eq(run.lines <= Mux(run.keys, 2, 2 * self._group)),
            ]

        valid = Signal()
        group = Signal(self._group_layout(), reset_less=True)
        lines = Mux(is_last, run.lines, step)
        slot = run.address[: config.data.offset_bits][config.activation_bytes.bit_length() - 1 :]
        with m.If(takes):
            m.d.sync += [
                valid.eq(active),
                group.run.eq(run),
                group.address.eq(run.address),
                group.element.eq(element),
                group.lines.eq(lines),
                group.splits.eq(~run.keys & (slot + lines > self._slots)),
                group.ends_run.eq(is_last),
            ]
        return valid, group

    def _drain(self, m: Module, planner: RunPlanner, banks: list[Ram], drained: Signal) -> None:
        """Lines from the banks, run by run.

        A pipeline that stands still as a whole: read, choose a group of lines of a word, rotate
        their rows to their places, put the lines into a beat.
        """
        config = self.config
        offset_bits = config.data.offset_bits
        lanes_bits = config.lanes.bit_length() - 1
        group_bits = self._group.bit_length() - 1

        part = Signal(range(max(2, self._parts)))
        is_last_part = Signal()
        half = Signal()
        moves = Signal()
        takes = Signal()
        valid, group = self._next_group(m, planner, takes)
        m.d.comb += [
            is_last_part.eq(part == (self._parts - 1 if self._parts > 1 else group.splits)),
            moves.eq(~self.pieces.valid | self.pieces.ready),
            takes.eq(~valid | (moves & is_last_part)),
            drained.eq(valid & takes & group.ends_run & group.run.ends_tile),
        ]
        with m.If(valid & moves):
            m.d.sync += part.eq(Mux(is_last_part, 0, part + 1))
        m.d.sync += half.eq(half ^ drained)
        for bank in banks:
            m.d.comb += [
                bank.read_enable.eq(moves),
                bank.read_address.eq(self._bank_address(group.element[lanes_bits:], half)),
            ]

        layout = data.StructLayout(
            {
                "word": config.data.word_bits,
                "place": offset_bits,
                "part": len(part),
                "element": lanes_bits,
                "lines": range(self._group + 1),
                "shift": len(group.run.shift),
                "places": len(group.run.places),
                "keys": 1,
                "last": 1,
            }
        )
        stages = ("read", "chosen", "rotated")
        read, chosen, rotated = (Signal(layout, name=name, reset_less=True) for name in stages)
        valids = [Signal(name=f"{name}_valid") for name in stages]
        with m.If(moves):
            m.d.sync += [
                read.word.eq(group.address[offset_bits:] + part),
                read.place.eq(group.address),
                read.part.eq(part),
                read.element.eq(group.element),
                read.lines.eq(group.lines),
                read.shift.eq(group.run.shift),
                read.places.eq(group.run.places),
                read.keys.eq(group.run.keys),
                read.last.eq(is_last_part & group.ends_run & group.run.ends_operation),
                chosen.eq(read),
                rotated.eq(chosen),
                Cat(valids).eq(Cat(valid, valids[:-1])),
                self.pieces.valid.eq(valids[-1]),
            ]

        # For each line of the group, the number of each row.
        width = self._group * FP16_BITS
        by_row = [Signal(width, name=f"row_{i}", reset_less=True) for i in range(len(banks))]
        with m.If(moves):
            for numbers, bank in zip(by_row, banks, strict=True):
                index = read.element[group_bits:]
                m.d.sync += numbers.eq(bank.read_data.word_select(index, width))

        lines = [
            Signal(self._line_bits, name=f"line_{i}", reset_less=True) for i in range(self._group)
        ]
        for i, line in enumerate(lines):
            turned = Cat(numbers.word_select(i, FP16_BITS) for numbers in by_row)
            turned = Cat(turned, Const(0, self._line_bits - len(turned)))
            for j in range(line_places(config).bit_length() - 1):
                turned = Mux(chosen.shift[j], turned.rotate_left(FP16_BITS << j), turned)
            with m.If(moves):
                m.d.sync += line.eq(turned)

        self._put(m, rotated, lines, moves)

    def _put(self, m: Module, head: data.View, lines: list[Signal], moves: Signal) -> None:
        """Lines into a beat, at their slots, and marks of the places that are written."""
        config = self.config
        size, beat_bytes = config.data.data_bits, config.data.beat_bytes
        piece = self.pieces.payload
        group_bits = self._group.bit_length() - 1
        marks = Cat(mark.replicate(FP16_BITS // _BYTE) for mark in head.places)
        if self._parts > 1:
            (line,) = lines
            content = line.word_select(head.part, size)
            strobe = marks.word_select(head.part, beat_bytes)
        else:
            line_bytes = self._line_bits // _BYTE
            slot_bytes = beat_bytes // self._slots
            slot = head.place[slot_bytes.bit_length() - 1 :]
            unit = head.place[line_bytes.bit_length() - 1 :]
            contents, strobes = [], []
            for i in range(self._slots):
                line, is_here = lines[0], Const(1)
                if self._slots > 1:
                    # Lines go round: those that begin before the first one are in the next beat.
                    index = (i - slot)[: self._slots.bit_length() - 1]
                    number = Mux(head.keys, head.element[:group_bits], index[:group_bits])
                    line = Cat(lines).word_select(number, self._line_bits)
                    is_next = slot > i if i < self._slots - 1 else Const(0)
                    is_here = (index < head.lines) & (is_next == head.part[0])
                for j in range(slot_bytes // line_bytes):
                    contents.append(line)
                    of_keys = unit == i * (slot_bytes // line_bytes) + j
                    written = Mux(head.keys, of_keys, is_here if j == 0 else 0)
                    strobes.append(Mux(written, marks, 0))
            content, strobe = Cat(contents), Cat(strobes)
        with m.If(moves):
            m.d.sync += [
                piece.word.eq(head.word),
                piece.data.eq(content),
                piece.strobe.eq(strobe),
                piece.last.eq(head.last),
            ]
