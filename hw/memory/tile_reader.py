# SPDX-License-Identifier: Apache-2.0
"""Reading a matrix of tiles from memory as a stream of words."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, ResetInserter, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.logic import ceil_div
from speq.hw.memory.axi import BEATS_BITS, AxiConfig, guard, guarded_members
from speq.hw.memory.memory_reader import MemoryReader
from speq.hw.memory.repeater import Repeater
from speq.hw.memory.word_packer import WordPacker, packer_command_layout

#: Commands whose last word may not have been taken when another is taken.
_COMMANDS = 4


def tile_command_layout(config: AxiConfig, word_count_bits: int, tile_bits: int) -> data.Layout:
    """`tiles` tiles (1 or more) of `words` words (1 or more) from byte address `address` on.

    Each tile begins with a beat: `stride` bytes behind the one before it, or with the next beat if
    `stride` is 0.
    """
    return data.StructLayout(
        {
            "address": config.address_bits,
            "stride": config.address_bits,
            "words": word_count_bits,
            "tiles": tile_bits,
        }
    )


class TileReader(wiring.Component):
    """For each command, the words of its tiles, in order.

    Each tile is one command for a `MemoryReader`. They are issued as fast as that one takes them,
    whatever the consumer does, so the buffer is filled across tiles and commands.

    Flow control, faults and `clear`: as of `MemoryReader`; after `clear` no word is offered that
    belongs to an earlier command. Without stalls there is a word per cycle, or a beat per cycle if
    words are wider, also from tile to tile and from command to command, if tiles have enough beats
    to keep the memory busy (`AxiConfig`). The first request of a command is on the bus `LATENCY`
    cycles after the command was taken.

    Parameters
    ----------
    config : AxiConfig
    word_bits : int
        Bits of a word, a power of two.
    word_count_bits, tile_bits : int
        Bits of a command's number of words and of tiles.

    Members
    -------
    axi : Out(config.read_signature)
    command : In(stream of tile_command_layout(config, word_count_bits, tile_bits))
    words : Out(stream of word_bits)
    and `guarded_members(address_bits)`
    """

    #: Cycles from taking a command to its first request on the bus.
    LATENCY = 1 + MemoryReader.LATENCY

    def __init__(
        self, config: AxiConfig, word_bits: int, word_count_bits: int, tile_bits: int
    ) -> None:
        self.config = config
        self.word_bits = word_bits
        self.word_count_bits = word_count_bits
        self.tile_bits = tile_bits
        command = tile_command_layout(config, word_count_bits, tile_bits)
        super().__init__(
            {
                "axi": Out(config.read_signature),
                "command": In(stream.Signature(command)),
                "words": Out(stream.Signature(word_bits)),
            }
            | guarded_members(config.address_bits)
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config = self.config
        resettable = ResetInserter(self.clear)
        packer_command = packer_command_layout(self.word_count_bits)
        reader = MemoryReader(config)
        packer = WordPacker(config.data_bits, self.word_bits, self.word_count_bits)
        lengths = Repeater(packer_command, self.tile_bits, _COMMANDS)
        m.submodules.reader = reader
        m.submodules.packer = resettable(packer)
        m.submodules.lengths = resettable(lengths)
        wiring.connect(m, reader.axi, wiring.flipped(self.axi))
        wiring.connect(m, lengths.items, packer.command)
        wiring.connect(m, reader.data, packer.beats)
        wiring.connect(m, packer.words, wiring.flipped(self.words))

        command = self.command.payload
        take = self.command.valid & self.command.ready
        left = Signal(self.tile_bits)  # tiles
        issue = reader.command.valid & reader.command.ready
        m.d.comb += [
            self.command.ready.eq(
                ((left == 0) | (issue & (left == 1))) & lengths.command.ready & ~self.clear
            ),
            lengths.command.valid.eq(take),
            lengths.command.payload.item.words.eq(command.words),
            lengths.command.payload.times.eq(command.tiles),
            reader.command.valid.eq(left != 0),
        ]
        stride = Signal(config.address_bits, reset_less=True)
        has_stride = Signal(reset_less=True)
        request = reader.command.payload
        address = Signal(config.address_bits, reset_less=True)
        beats = Signal(BEATS_BITS, reset_less=True)
        m.d.comb += [request.address.eq(address), request.beats.eq(beats)]
        with m.If(take):
            m.d.sync += [
                left.eq(command.tiles),
                address.eq(command.address),
                stride.eq(command.stride),
                has_stride.eq(command.stride != 0),
                beats.eq(self._beats(command.words)),
            ]
        with m.Elif(issue):
            contiguous = Cat(Const(0, config.offset_bits), beats)
            m.d.sync += [
                left.eq(left - 1),
                address.eq(address + Mux(has_stride, stride, contiguous)),
            ]
        with m.If(self.clear):
            m.d.sync += left.eq(0)

        guard(m, self, reader)
        m.d.comb += self.busy.eq((left != 0) | lengths.busy | packer.busy | reader.busy)
        return m

    def _beats(self, words: Value) -> Value:
        """Beats of a tile."""
        if self.word_bits >= self.config.data_bits:
            return words * (self.word_bits // self.config.data_bits)
        per_beat = self.config.data_bits // self.word_bits
        return ceil_div(words, per_beat)


def forward(
    m: Module, outer: wiring.Component, reader: TileReader, words: stream.Interface
) -> None:
    """Connect a unit that only words its commands differently with its TileReader: all but the
    command's payload. `words` is the unit's output stream."""
    wiring.connect(m, reader.axi, wiring.flipped(outer.axi))
    m.d.comb += [
        reader.command.valid.eq(outer.command.valid),
        outer.command.ready.eq(reader.command.ready),
        words.payload.eq(reader.words.payload),
        words.valid.eq(reader.words.valid),
        reader.words.ready.eq(words.ready),
        reader.base.eq(outer.base),
        reader.limit.eq(outer.limit),
        reader.clear.eq(outer.clear),
        outer.busy.eq(reader.busy),
        outer.error.eq(reader.error),
        outer.error_address.eq(reader.error_address),
    ]
