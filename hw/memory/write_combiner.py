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

#: Bits of the number of commands that are on offer or not carried out: more than this unit, a mux
#: and a writer hold.
_UNANSWERED_BITS = 10
#: Pieces marked with `last` whose commands may not have been carried out.
LASTS = 8
#: Pieces that are taken whatever becomes of them: they keep the way of `ready` short.
_PIECES = 2


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

    At most `LASTS` pieces with `last` may be taken before `finished` has told of the first of them.

    Parameters
    ----------
    config : AxiConfig

    Members
    -------
    pieces : In(stream of piece_layout(config))
    writes : Out(write_source_signature(config))
    finished : Out(1)
        Pulse: all up to a piece with `last`, the oldest that is left, has been written.
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
                "finished": Out(1),
                "busy": Out(1),
                "clear": In(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config = self.config
        layout = piece_layout(config)
        burst = config.burst_beats
        command_layout = data.StructLayout({"word": config.word_bits, "beats": burst.bit_length()})
        # Two bursts, so that one is filled while the other is passed on.
        m.submodules.beats = beats = RamFifo(write_layout(config).size, 2 * burst)
        # As many as that has beats, with the one at its output.
        commands = SyncFIFO(width=command_layout.size, depth=2 * burst + 1)
        m.submodules.commands = ResetInserter(self.clear)(commands)

        # Pieces, each with how it relates to the one before it.
        related = data.StructLayout({"piece": layout, "same": 1, "follows": 1})
        pieces = SyncFIFO(width=related.size, depth=_PIECES)
        m.submodules.pieces = ResetInserter(self.clear)(pieces)
        offered = self.pieces.payload
        word = Signal(config.word_bits, reset_less=True)
        follower = Signal(config.word_bits, reset_less=True)
        goes_on = Signal()
        taken = data.View(related, pieces.w_data)
        m.d.comb += [
            taken.piece.eq(offered),
            taken.same.eq(goes_on & (offered.word == word)),
            taken.follows.eq(goes_on & (offered.word == follower)),
            pieces.w_en.eq(self.pieces.valid),
            self.pieces.ready.eq(pieces.w_rdy),
        ]
        with m.If(self.pieces.valid & self.pieces.ready):
            m.d.sync += [
                word.eq(offered.word),
                follower.eq(offered.word + 1),
                goes_on.eq(~offered.last),
            ]

        # A beat, which waits for all its pieces.
        head = data.View(related, pieces.r_data)
        piece, same = head.piece, head.same
        beat = Signal(layout, reset_less=True)
        has_beat = Signal()
        leaves = Signal()
        moves = Signal()
        m.d.comb += [
            moves.eq(pieces.r_rdy & (same | ~has_beat | leaves)),
            pieces.r_en.eq(moves),
            # There is room for a command of each beat.
            leaves.eq(has_beat & (beat.last | (pieces.r_rdy & ~same)) & beats.write.ready),
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
            closes.eq(beat.last | ~head.follows | place.all()),
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
        first = data.View(command_layout, commands.r_data)
        m.d.comb += [
            writes.command.valid.eq(commands.r_rdy),
            writes.command.payload.address.eq(Cat(Const(0, config.offset_bits), first.word)),
            writes.command.payload.beats.eq(first.beats),
            commands.r_en.eq(writes.command.ready),
            writes.data.valid.eq(beats.read.valid),
            writes.data.payload.eq(beats.read.payload),
            beats.read.ready.eq(writes.data.ready),
        ]
        unanswered = Signal(_UNANSWERED_BITS)
        m.d.sync += unanswered.eq(unanswered + commands.w_en - writes.done)
        m.d.comb += self.busy.eq(pieces.r_rdy | has_beat | (count != 0) | (unanswered != 0))

        # Numbers of the commands that end with `last`; commands are carried out in order.
        asked = Signal(_UNANSWERED_BITS)
        answered = Signal(_UNANSWERED_BITS)
        lasts = SyncFIFO(width=_UNANSWERED_BITS, depth=LASTS)
        m.submodules.lasts = ResetInserter(self.clear)(lasts)
        m.d.sync += [asked.eq(asked + commands.w_en), answered.eq(answered + writes.done)]
        m.d.comb += [
            lasts.w_data.eq(asked),
            lasts.w_en.eq(commands.w_en & beat.last),
            self.finished.eq(writes.done & lasts.r_rdy & (lasts.r_data == answered)),
            lasts.r_en.eq(self.finished),
        ]
        with m.If(self.clear):
            m.d.sync += [
                has_beat.eq(0),
                goes_on.eq(0),
                count.eq(0),
                unanswered.eq(0),
                asked.eq(0),
                answered.eq(0),
            ]
        return m
