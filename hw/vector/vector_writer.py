# SPDX-License-Identifier: Apache-2.0
"""Results of vector operations to memory, in the form that their target says."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, ResetInserter, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.control.descriptor import Target
from speq.hw.engine_config import FP16_BITS
from speq.hw.memory.write_combiner import WriteCombiner, piece_layout
from speq.hw.memory.write_mux import write_source_signature
from speq.hw.vector.command import result_word_layout
from speq.hw.vector.run_planner import writer_command_layout
from speq.hw.vector.transposer import Transposer, placed_word_layout
from speq.hw.vector.word_counter import WordCounter

_BYTE = 8
_FP32_BITS = 32


class VectorWriter(wiring.Component):
    """Write the results of vector operations, each to where its target says
    (`speq.hw.control.descriptor.Target`).

    Write commands are offered only when all their beats are there (`WriteCombiner`). Bytes that no
    element goes to are not written.

    Flow control: all streams may stall in any cycle. A command is taken when the last result of
    the one before is on its way to memory. Without stalls TILES and VALUES take one cycle for each
    word of lanes, or for each of its beats if it has several; for the others see `Transposer`.

    Parameters
    ----------
    config : AcceleratorConfig
        With lanes.

    Members
    -------
    command : In(stream of writer_command_layout(config))
    words : In(stream of result_word_layout(config))
        The words of a command in their order, those of one sweep.
    drafts : Out(stream of placed_word_layout(config))
        Words of DRAFT_ACTIVATIONS, for an `ActivationQuantizer`.
    pieces : In(stream of piece_layout(config.data))
        Its writes, to be offered only between commands or for these words.
    writes : Out(write_source_signature(config.data))
    finished : Out(1)
        Pulse: the writes of a command, or all further ones up to the last, have been answered, in
        their order. At most `LASTS` of these may be under way.
    busy : Out(1)
        There is a command, or a write that has not been answered.
    clear : In(1)
        Drop everything.
    """

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        super().__init__(
            {
                "command": In(stream.Signature(writer_command_layout(config))),
                "words": In(stream.Signature(result_word_layout(config))),
                "drafts": Out(stream.Signature(placed_word_layout(config))),
                "pieces": In(stream.Signature(piece_layout(config.data))),
                "writes": Out(write_source_signature(config.data)),
                "finished": Out(1),
                "busy": Out(1),
                "clear": In(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config = self.config
        m.submodules.counter = counter = WordCounter(config)
        transposer = Transposer(config)
        m.submodules.transposer = ResetInserter(self.clear)(transposer)
        m.submodules.combiner = combiner = WriteCombiner(config.data)
        wiring.connect(m, combiner.writes, wiring.flipped(self.writes))

        active = Signal()
        start = Signal()
        command = Signal(writer_command_layout(config), reset_less=True)
        target = command.target
        drafts = target == Target.DRAFT_ACTIVATIONS
        transposes = (target != Target.TILES) & (target != Target.VALUES) & ~drafts
        m.d.comb += [self.command.ready.eq(~active), counter.shape.eq(self.command.payload.sweep)]
        m.d.sync += start.eq(self.command.valid & self.command.ready)
        with m.If(self.command.valid & self.command.ready):
            m.d.sync += [active.eq(1), command.eq(self.command.payload)]
        m.d.comb += [
            counter.start.eq(self.command.valid & self.command.ready),
            counter.clear.eq(self.clear),
            combiner.clear.eq(self.clear),
            transposer.start.eq(start & transposes),
            transposer.command.eq(command),
            self.finished.eq(combiner.finished),
            self.busy.eq(active | combiner.busy),
        ]

        # Words to one of three ways.
        direct = stream.Signature(piece_layout(config.data)).create()
        takes_directly = self._pass_on(m, command, counter, start, direct)
        word = self.words
        taken = Mux(
            transposes, transposer.words.ready, Mux(drafts, self.drafts.ready, takes_directly)
        )
        m.d.comb += [
            word.ready.eq(counter.active & taken),
            counter.advance.eq(word.valid & word.ready),
        ]
        for way, is_chosen in ((transposer.words, transposes), (self.drafts, drafts)):
            m.d.comb += [
                way.valid.eq(word.valid & counter.active & is_chosen),
                way.payload.values.eq(word.payload.fp16),
                way.payload.place.eq(counter.place),
            ]

        # Their pieces; there are never those of two at a time.
        sources = (self.pieces, direct, transposer.pieces)
        pieces = combiner.pieces
        chosen = sources[0].payload
        for source in sources[1:]:
            chosen = Mux(source.valid, source.payload, chosen)
        m.d.comb += [
            pieces.valid.eq(Cat(source.valid for source in sources).any()),
            pieces.payload.eq(chosen),
            *(source.ready.eq(pieces.ready) for source in sources),
        ]
        with m.If(active & pieces.valid & pieces.ready & pieces.payload.last):
            m.d.sync += active.eq(0)
        with m.If(self.clear):
            m.d.sync += [active.eq(0), start.eq(0), direct.valid.eq(0)]
        return m

    def _pass_on(
        self,
        m: Module,
        command: data.View,
        counter: WordCounter,
        start: Signal,
        direct: stream.Interface,
    ) -> Value:
        """Words of TILES and VALUES as they are; whether one is taken from the stream, if it
        offers one."""
        config = self.config
        values = command.target == Target.VALUES
        word, place = self.words.payload, counter.place
        key_line = FP16_BITS // _BYTE * config.engine.cols
        moves = ~direct.valid | direct.ready

        address = Signal(config.address_bits, reset_less=True)
        tile = Signal(config.address_bits, reset_less=True)
        segment = Signal(config.address_bits, reset_less=True)
        part = Signal(range(max(2, self._parts(_FP32_BITS))))
        last_part = Mux(values, self._parts(FP16_BITS) - 1, self._parts(_FP32_BITS) - 1)
        takes = moves & (part == last_part)
        gives = self.words.valid & counter.active & (values | (command.target == Target.TILES))
        sizes = [
            min(config.data.beat_bytes, bits * config.lanes // _BYTE)
            for bits in (FP16_BITS, _FP32_BITS)
        ]
        with m.If(start):
            # The values of the pass's first row.
            first = command.results + Mux(
                values, command.position << (key_line.bit_length() - 1), 0
            )
            m.d.sync += [address.eq(first), tile.eq(first), segment.eq(first), part.eq(0)]
        with m.Elif(gives & moves):
            m.d.sync += [part.eq(part + 1), address.eq(address + Mux(values, *sizes))]
            with m.If(part == last_part):
                m.d.sync += part.eq(0)
                with m.If(values & place.ends.segment):
                    following = segment + command.outer
                    m.d.sync += [address.eq(following), tile.eq(following), segment.eq(following)]
                with m.Elif(values & place.ends.tile):
                    m.d.sync += [address.eq(tile + command.inner), tile.eq(tile + command.inner)]
        halves, halves_strobe = self._part(word.fp16.as_value(), address, part)
        singles, singles_strobe = self._part(word.fp32.as_value(), address, part)
        with m.If(moves):
            m.d.sync += [
                direct.valid.eq(gives),
                direct.payload.word.eq(address[config.data.offset_bits :]),
                direct.payload.data.eq(Mux(values, halves, singles)),
                direct.payload.strobe.eq(Mux(values, halves_strobe, singles_strobe)),
                direct.payload.last.eq(place.ends.operation & (part == last_part)),
            ]
        return takes

    def _parts(self, bits: int) -> int:
        """Beats of a word of so many bits per lane."""
        return max(1, bits * self.config.lanes // self.config.data.data_bits)

    def _part(self, word: Value, address: Value, part: Value) -> tuple[Value, Value]:
        """What of a beat a part of a word is, and its strobe."""
        port = self.config.data
        if len(word) >= port.data_bits:
            return word.word_select(part, port.data_bits), Const(-1, port.beat_bytes)
        copies = port.data_bits // len(word)
        slot = address[: port.offset_bits] >> ((len(word) // _BYTE).bit_length() - 1)
        strobe = Cat((slot == i).replicate(len(word) // _BYTE) for i in range(copies))
        return word.replicate(copies), strobe
