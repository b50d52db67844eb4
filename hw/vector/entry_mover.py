# SPDX-License-Identifier: Apache-2.0
"""Copying an entry of the KV cache of a block to another place."""

from __future__ import annotations

from amaranth.hdl import (
    Array,
    Cat,
    Const,
    Elaboratable,
    Module,
    Mux,
    ResetInserter,
    Signal,
    Value,
)
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.common.logic import ceil_div
from speq.hw.memory.axi import guard, guarded_members
from speq.hw.memory.memory_reader import MemoryReader
from speq.hw.memory.write_mux import write_source_signature
from speq.hw.vector.command import segment_bits

_FP16_BITS = 16
_FP16_BYTES = 2
#: Elements that have been read and not written.
_AHEAD = 4
#: More than there are commands that a `WriteMux` has passed on beside those of a `MemoryWriter`.
_COMMANDS_AHEAD = 7


def entry_command_layout(config: AcceleratorConfig) -> data.StructLayout:
    """The operands of a MOVE (`speq.hw.control.descriptor.FORMS`): `o` KV heads of `k` elements."""
    engine, address = config.engine, config.address_bits
    return data.StructLayout(
        {
            "k": engine.k_bits,
            "o": segment_bits(config),
            "first": address,
            "second": address,
            "inner": address,
            "outer": address,
            "source": engine.k_bits,
            "position": engine.k_bits,
        }
    )


class EntryMover(wiring.Component):
    """Copy entry `source` of the keys and values of a block to the place of entry `position`.

    The keys of C entries are lines of C elements, one for each of `o` * `k`: at ``first + (entry //
    C) inner``, element entry % C of each. Whole lines are read, and of what is written to whole
    lines only the element is marked. The values of an entry are C elements for each of `o` *
    ceil(`k` / C) tiles: at ``second + tile outer + 2 C entry``. `o` and `k` are 1 or more.

    Flow control: all streams may stall in any cycle. A command is taken when the one before is
    finished. Without stalls there is a beat in every cycle, but for those that memory takes for the
    first of them and a few for each head and tile.

    Faults: as of a reader; writes are supervised by what writes. `clear` drops everything (`valid`
    may fall), and must come together with that of the writer.

    Parameters
    ----------
    config : AcceleratorConfig

    Members
    -------
    axi : Out(config.data.read_signature)
    command : In(stream of entry_command_layout(config))
    write : Out(write_source_signature(config.data))
    base, limit, busy, error, error_address, clear
        As `guarded_members`; not busy again when all writes have been answered.
    """

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        super().__init__(
            {
                "axi": Out(config.data.read_signature),
                "command": In(stream.Signature(entry_command_layout(config))),
                "write": Out(write_source_signature(config.data)),
            }
            | guarded_members(config.address_bits)
        )

    def elaborate(self, platform: object) -> Elaboratable:
        top = Module()
        top.submodules.reader = reader = MemoryReader(self.config.data)
        wiring.connect(top, reader.axi, wiring.flipped(self.axi))
        guard(top, self, reader)
        # The reader must not forget its transactions.
        m = Module()
        top.submodules.steps = ResetInserter(self.clear)(m)
        move = Signal(entry_command_layout(self.config), reset_less=True)
        moving = Signal()
        take = Signal()
        m.d.comb += [
            self.command.ready.eq(~moving),
            take.eq(self.command.valid & ~moving),
            self.busy.eq(moving | reader.busy),
        ]
        with m.If(take):
            m.d.sync += [move.eq(self.command.payload), moving.eq(1)]
        self._command(m, move, take, moving, reader)
        self._copy(m, move, take, moving, reader)
        return top

    def _command(
        self, m: Module, move: data.View, take: Value, moving: Signal, reader: MemoryReader
    ) -> None:
        """The transfers: for each head the lines of its keys, then for each tile its values; and
        the end, when all that is written has been answered."""
        config = self.config
        engine, address = config.engine, config.address_bits
        column_bits = (engine.cols - 1).bit_length()
        line_bits = column_bits + 1  # of the address, within 2 C bytes
        line_beats = self._line_beats
        # Addresses of both ends; a distance and which of its multiples they still lack.
        places = [Signal(address, name=name, reset_less=True) for name in ("source", "target")]
        lacks = [
            Signal(max(1, engine.k_bits - column_bits), name=f"{name}_lacks", reset_less=True)
            for name in ("source", "target")
        ]
        distance = Signal(address, reset_less=True)
        heads = Signal(segment_bits(config), reset_less=True)  # left, with this one
        tiles = Signal(range(-(-engine.max_k // engine.cols) + 1), reset_less=True)
        values = Signal()
        taken = Signal(2)
        commands = (reader.command, self.write.command)
        for command, place in zip(commands, places, strict=True):
            m.d.comb += [
                command.payload.address.eq(place),
                command.payload.beats.eq(
                    Mux(values, line_beats, move.k << (line_beats.bit_length() - 1))
                ),
            ]
        ready = Cat(command.ready for command in commands)
        writes = Signal(range(config.data.outstanding + _COMMANDS_AHEAD + 1))
        new = self.write.command.valid & self.write.command.ready
        m.d.sync += writes.eq(writes + new - self.write.done)
        with m.FSM():
            with m.State("IDLE"):
                payload = self.command.payload
                m.d.sync += [
                    *(place.eq(payload.first) for place in places),
                    lacks[0].eq(payload.source >> column_bits),
                    lacks[1].eq(payload.position >> column_bits),
                    distance.eq(payload.inner),
                    heads.eq(payload.o),
                    values.eq(0),
                ]
                with m.If(take):
                    m.next = "PLACE"
            with m.State("PLACE"):
                for place, lack in zip(places, lacks, strict=True):
                    m.d.sync += lack.eq(lack >> 1)
                    with m.If(lack[0]):
                        m.d.sync += place.eq(place + distance)
                m.d.sync += distance.eq(distance << 1)
                with m.If(~Cat(lacks).any()):
                    m.next = "TRANSFER"
            with m.State("TRANSFER"):
                m.d.comb += Cat(command.valid for command in commands).eq(~taken)
                m.d.sync += taken.eq(taken | ready)
                with m.If(taken.all()):
                    m.d.sync += [taken.eq(0), tiles.eq(tiles - 1)]
                    m.next = "NEXT"
            with m.State("NEXT"):
                step = Mux(values, move.outer, move.k << line_bits)
                m.d.sync += [place.eq(place + step) for place in places]
                m.next = "TRANSFER"
                with m.If(~values | (tiles == 0)):
                    m.d.sync += [heads.eq(heads - 1), tiles.eq(ceil_div(move.k, engine.cols))]
                    with m.If(heads == 1):
                        m.next = "VALUES"
                        with m.If(values):
                            m.next = "WRITES"
            with m.State("VALUES"):
                m.d.sync += [
                    places[0].eq(move.second + (move.source << line_bits)),
                    places[1].eq(move.second + (move.position << line_bits)),
                    heads.eq(move.o),
                    values.eq(1),
                ]
                m.next = "TRANSFER"
            with m.State("WRITES"):
                with m.If(writes == 0):
                    m.d.sync += moving.eq(0)
                    m.next = "IDLE"

    @property
    def _line_beats(self) -> int:
        """Beats of C elements."""
        return self.config.engine.cols * _FP16_BYTES // self.config.data.beat_bytes

    def _copy(
        self, m: Module, move: data.View, take: Value, moving: Signal, reader: MemoryReader
    ) -> None:
        """Beats: those of keys become elements, of which each is written with a line; those of
        values are passed on."""
        config, beats = self.config, self._line_beats
        beat_bytes = config.data.beat_bytes
        place_bits = (beat_bytes // _FP16_BYTES - 1).bit_length()
        entry = data.StructLayout({"element": _FP16_BITS, "last": 1})
        m.submodules.elements = elements = SyncFIFO(width=entry.size, depth=_AHEAD)
        read = Signal(entry, reset_less=True)  # the last line's
        has_read = Signal()
        written = data.View(entry, elements.r_data)
        heads = Signal(segment_bits(config), reset_less=True)  # that are left, with this one
        lines = Signal(config.engine.k_bits, reset_less=True)  # of this head
        reads_values, writes_values = Signal(), Signal()
        beat_bits = (beats - 1).bit_length()
        read_beat, written_beat = Signal(max(1, beat_bits)), Signal(max(1, beat_bits))
        source_beat, target_beat = (
            entry_number[place_bits : place_bits + beat_bits]
            for entry_number in (move.source, move.position)
        )
        is_last_line = (lines == 1) & (heads == 1)
        beat, output = reader.data, self.write.data
        takes_key = beat.valid & beat.ready & ~reads_values
        m.d.comb += [
            elements.w_data.eq(read),
            elements.w_en.eq(has_read),
            # There must be room for an element on its way.
            beat.ready.eq(
                moving
                & Mux(
                    reads_values,
                    writes_values & output.ready,
                    elements.w_level < _AHEAD - 1,
                )
            ),
        ]
        places = Array(beat.payload.word_select(i, _FP16_BITS) for i in range(1 << place_bits))
        m.d.sync += has_read.eq(0)
        with m.If(takes_key):
            m.d.sync += read_beat.eq(read_beat + 1)
            with m.If(read_beat == source_beat):
                m.d.sync += read.element.eq(places[move.source[:place_bits]])
            with m.If(read_beat == beats - 1):
                m.d.sync += [
                    read_beat.eq(0),
                    has_read.eq(1),
                    read.last.eq(is_last_line),
                    lines.eq(lines - 1),
                    reads_values.eq(is_last_line),
                ]
                with m.If(lines == 1):
                    m.d.sync += [lines.eq(move.k), heads.eq(heads - 1)]

        strobe = Const((1 << _FP16_BYTES) - 1, beat_bytes)
        shift = Cat(Const(0, 1), move.position[:place_bits])
        m.d.comb += [
            output.valid.eq(Mux(writes_values, beat.valid & reads_values & moving, elements.r_rdy)),
            output.payload.data.eq(
                Mux(
                    writes_values,
                    beat.payload,
                    written.element.replicate(beat_bytes // _FP16_BYTES),
                )
            ),
            output.payload.strobe.eq(
                Mux(
                    writes_values,
                    ~Const(0, beat_bytes),
                    Mux(written_beat == target_beat, strobe << shift, 0),
                )
            ),
        ]
        with m.If(~writes_values & output.valid & output.ready):
            m.d.sync += written_beat.eq(written_beat + 1)
            with m.If(written_beat == beats - 1):
                m.d.comb += elements.r_en.eq(1)
                m.d.sync += [written_beat.eq(0), writes_values.eq(written.last)]
        with m.If(take):
            m.d.sync += [
                reads_values.eq(0),
                writes_values.eq(0),
                lines.eq(self.command.payload.k),
                heads.eq(self.command.payload.o),
            ]
