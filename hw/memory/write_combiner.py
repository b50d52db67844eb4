# SPDX-License-Identifier: Apache-2.0
"""Pieces of beats, each with its address, into as few and as long write commands as possible."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, ResetInserter, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from speq.hw.common.ram_fifo import RamFifo
from speq.hw.memory.axi import AxiConfig
from speq.hw.memory.memory_writer import write_layout
from speq.hw.memory.write_mux import write_source_signature

#: Pieces that are taken whatever becomes of them: they keep the way of `ready` short.
_PIECES = 2
#: Commands on offer.
_COMMANDS = 4
#: Bits of the number of commands that are on offer or not carried out: more than this unit, a mux
#: and a writer hold.
_UNANSWERED_BITS = 8


def piece_layout(config: AxiConfig) -> data.StructLayout:
    """Bytes of a beat, those that `strobe` marks. `word` is its address in beats. With `last`
    nothing follows for now."""
    return data.StructLayout(
        {
            "word": config.word_bits,
            "data": config.data_bits,
            "strobe": config.beat_bytes,
            "last": 1,
        }
    )


class WriteCombiner(wiring.Component):
    """Join pieces of the same beat that follow each other, and beats at rising addresses to one
    command.

    A command ends where the address is a multiple of a burst, where the next piece is of neither
    the same beat nor the next one, and with `last`. It is offered only when all its beats are
    there, so that this unit never holds up other sources of a `WriteMux`.

    Flow control: all streams may stall in any cycle. Without stalls a piece is taken in every
    cycle. A command is offered some cycles after its last piece was taken if that is marked with
    `last`, else after the next piece was.

    Parameters
    ----------
    config : AxiConfig

    Members
    -------
    pieces : In(stream of piece_layout(config))
    writes : Out(write_source_signature(config))
    busy : Out(1)
        There are pieces, or commands that have not been carried out.
    clear : In(1)
        Drop everything.
    """

    def __init__(self, config: AxiConfig) -> None:
        self.config = config
        super().__init__(
            {
                "pieces": In(stream.Signature(piece_layout(config))),
                "writes": Out(write_source_signature(config)),
                "busy": Out(1),
                "clear": In(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config = self.config
        layout = piece_layout(config)
        burst = config.burst_beats
        command_layout = data.StructLayout(
            {"word": config.word_bits, "beats": (burst).bit_length()}
        )
        # Two bursts, so that one is filled while the other is passed on.
        m.submodules.beats = beats = RamFifo(write_layout(config).size, 2 * burst)
        commands = SyncFIFO(width=command_layout.size, depth=_COMMANDS)
        m.submodules.commands = ResetInserter(self.clear)(commands)

        pieces = SyncFIFO(width=layout.size, depth=_PIECES)
        m.submodules.pieces = ResetInserter(self.clear)(pieces)

        # A piece, and how it relates to the one before it.
        piece = Signal(layout, reset_less=True)
        has_piece = Signal()
        same = Signal(reset_less=True)
        follows = Signal(reset_less=True)
        follower = Signal(config.word_bits, reset_less=True)
        goes_on = Signal()
        moves = Signal()
        offered = data.View(layout, pieces.r_data)
        m.d.comb += [
            pieces.w_data.eq(self.pieces.payload),
            pieces.w_en.eq(self.pieces.valid),
            self.pieces.ready.eq(pieces.w_rdy),
            pieces.r_en.eq(~has_piece | moves),
        ]
        with m.If(pieces.r_rdy & pieces.r_en):
            m.d.sync += [
                has_piece.eq(1),
                piece.eq(offered),
                same.eq(goes_on & (offered.word == piece.word)),
                follows.eq(goes_on & (offered.word == follower)),
                follower.eq(offered.word + 1),
                goes_on.eq(~offered.last),
            ]
        with m.Elif(moves):
            m.d.sync += has_piece.eq(0)

        # A beat, which waits for all its pieces.
        beat = Signal(layout, reset_less=True)
        has_beat = Signal()
        leaves = Signal()
        m.d.comb += [
            moves.eq(has_piece & (same | ~has_beat | leaves)),
            leaves.eq(
                has_beat & (beat.last | (has_piece & ~same)) & beats.write.ready & commands.w_rdy
            ),
        ]
        with m.If(moves):
            m.d.sync += [
                has_beat.eq(1),
                beat.word.eq(piece.word),
                beat.last.eq(piece.last),
                beat.strobe.eq(Mux(same, beat.strobe, 0) | piece.strobe),
            ]
            for i, strobe in enumerate(piece.strobe):
                with m.If(strobe):
                    m.d.sync += beat.data[8 * i : 8 * i + 8].eq(piece.data[8 * i : 8 * i + 8])
        with m.Elif(leaves):
            m.d.sync += has_beat.eq(0)

        # Beats of a command are in one burst, so that its start follows from its length.
        place_bits = burst.bit_length() - 1
        place = beat.word[:place_bits]
        count = Signal(max(1, place_bits))
        closes = Signal()
        command = Signal(command_layout)
        m.d.comb += [
            closes.eq(beat.last | ~follows | place.all()),
            command.word.eq(Cat((place - count)[:place_bits], beat.word[place_bits:])),
            command.beats.eq(count + 1),
            beats.write.valid.eq(leaves),
            beats.write.payload.eq(Cat(beat.data, beat.strobe)),
            beats.clear.eq(self.clear),
            commands.w_data.eq(command),
            commands.w_en.eq(leaves & closes),
        ]
        with m.If(leaves):
            m.d.sync += count.eq(Mux(closes, 0, count + 1))

        writes = self.writes
        head = data.View(command_layout, commands.r_data)
        m.d.comb += [
            writes.command.valid.eq(commands.r_rdy),
            writes.command.payload.address.eq(Cat(Const(0, config.offset_bits), head.word)),
            writes.command.payload.beats.eq(head.beats),
            commands.r_en.eq(writes.command.ready),
            writes.data.valid.eq(beats.read.valid),
            writes.data.payload.eq(beats.read.payload),
            beats.read.ready.eq(writes.data.ready),
        ]
        unanswered = Signal(_UNANSWERED_BITS)
        m.d.sync += unanswered.eq(unanswered + commands.w_en - writes.done)
        m.d.comb += self.busy.eq(
            pieces.r_rdy | has_piece | has_beat | (count != 0) | (unanswered != 0)
        )
        with m.If(self.clear):
            m.d.sync += [
                has_piece.eq(0),
                has_beat.eq(0),
                goes_on.eq(0),
                count.eq(0),
                unanswered.eq(0),
            ]
        return m
