# SPDX-License-Identifier: Apache-2.0
"""An operand of the vector unit from memory."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, ResetInserter, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import TOKEN_BITS, AcceleratorConfig
from speq.hw.common.ram import Ram
from speq.hw.engine_config import FP16_BITS
from speq.hw.memory.axi import guard, guarded_members
from speq.hw.memory.memory_reader import MemoryReader
from speq.hw.memory.word_packer import WordPacker
from speq.hw.vector.fp16_to_fp32 import Fp16ToFp32
from speq.hw.vector.operand_requests import OperandMode, OperandRequests, operand_command_layout
from speq.hw.vector.word_counter import WordCounter, words_per_row

_FP32_BITS = 32


class OperandReader(wiring.Component):
    """For each command, the words of an operand in FP32, in the order of `WordCounter`.

    FP16 numbers become FP32 numbers as in `Fp16ToFp32`.

    Flow control: command and words may stall in any cycle. Transfers (`OperandRequests`) are
    requested whatever the consumer does, so the buffer is filled. Without stalls there is a word
    per cycle, or a beat's width of FP32 numbers per cycle where words are wider, if transfers are
    long enough to keep the memory busy (`AxiConfig`). A command is taken when all words of the one
    before it have been taken.

    Faults and `clear`: as of `MemoryReader`; after `clear` no word is offered that belongs to an
    earlier command. After an error the unit is busy until `clear`.

    Parameters
    ----------
    config : AcceleratorConfig
        With lanes. The port is that of `config.data`.
    halves : bool
        There are commands for FP16 numbers.

    Members
    -------
    axi : Out(config.data.read_signature)
    command : In(stream of operand_command_layout(config))
    index_row : Out(row_bits)
    index : In(24)
        In mode ROWS the index of row `index_row`, in the same cycle or in the next.
    words : Out(stream of ArrayLayout(32, lanes))
    and `guarded_members(address_bits)`

    Raises
    ------
    ValueError
        If there are no lanes.
    """

    def __init__(self, config: AcceleratorConfig, *, halves: bool = True) -> None:
        self.config = config
        self._halves = halves
        self._words_per_row = words_per_row(config)
        super().__init__(
            {
                "axi": Out(config.data.read_signature),
                "command": In(stream.Signature(operand_command_layout(config))),
                "index_row": Out(config.engine.row_bits),
                "index": In(TOKEN_BITS),
                "words": Out(stream.Signature(data.ArrayLayout(_FP32_BITS, config.lanes))),
            }
            | guarded_members(config.address_bits)
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config = self.config
        word_bits = _FP32_BITS * config.lanes
        resettable = ResetInserter(self.clear)
        requests = OperandRequests(config)
        packer = WordPacker(config.data.data_bits, word_bits, self._words_per_row.bit_length())
        counter = WordCounter(config)
        chunk = Ram(word_bits, max(2, self._words_per_row))
        m.submodules.reader = reader = MemoryReader(config.data)
        m.submodules.requests = resettable(requests)
        m.submodules.packer = resettable(packer)
        m.submodules.counter = resettable(counter)
        m.submodules.chunk = chunk
        wiring.connect(m, reader.axi, wiring.flipped(self.axi))
        wiring.connect(m, requests.transfers, reader.command)
        wiring.connect(m, reader.data, packer.beats)
        # So `ready` of the reader depends on little, and what comes from its RAM is late.
        packed = SyncFIFO(width=word_bits, depth=2)
        m.submodules.packed = resettable(packed)
        m.d.comb += [
            packed.w_data.eq(packer.words.payload),
            packed.w_en.eq(packer.words.valid),
            packer.words.ready.eq(packed.w_rdy),
        ]
        guard(m, self, reader)

        # One command at a time.
        command = self.command.payload
        take = Signal()
        given = Signal(init=1)  # the last word of the command has been given
        half = Signal(reset_less=True)
        channels = Signal(reset_less=True)
        m.d.comb += [
            self.command.ready.eq(given & ~requests.busy & ~self.clear),
            take.eq(self.command.valid & self.command.ready),
            requests.command.valid.eq(take),
            requests.command.payload.eq(command),
            self.index_row.eq(requests.index_row),
            requests.index.eq(self.index),
            counter.start.eq(take),
            counter.shape.eq(command.extent),
            counter.twice.eq(command.twice),
            self.busy.eq(~given | requests.busy | reader.busy),
        ]
        with m.If(take):
            m.d.sync += [half.eq(command.half), channels.eq(command.mode == OperandMode.CHANNELS)]

        # A chunk is a whole number of beats and of words, so the packer may begin anew with each.
        # In mode CHANNELS it is stored on its way, and comes from there for the other rows.
        place = counter.place
        step = Signal()
        give = Signal()
        again = Signal(reset_less=True)  # the next word comes from there
        fresh, leaves = self._widened(m, packed.r_data, half, take, give & ~again)
        stored = Signal(reset_less=True)
        passed = Signal(word_bits, reset_less=True)
        m.d.comb += [
            packer.command.valid.eq(1),
            packer.command.payload.words.eq(self._words_per_row),
            packer.half.eq(half & (self._words_per_row == 1)),
            step.eq(~self.words.valid | self.words.ready),
            packed.r_en.eq(step & counter.active & ~again & leaves),
            give.eq(step & counter.active & (again | packed.r_rdy)),
            counter.advance.eq(give),
            # A word that is not there yet is stored, too, and replaced when it comes.
            chunk.write_enable.eq(step & ~again),
            chunk.write_address.eq(place.word),
            chunk.write_data.eq(fresh),
            chunk.read_enable.eq(step & again),
            chunk.read_address.eq(place.word),
            self.words.payload.eq(Mux(stored, chunk.read_data, passed)),
        ]
        with m.If(step):
            m.d.sync += [
                passed.eq(fresh),
                stored.eq(again),
                self.words.valid.eq(counter.active & (again | packed.r_rdy)),
            ]
        with m.If(take):
            m.d.sync += again.eq(0)
        with m.Elif(give):
            still_first = place.first.row & ~place.ends.row
            m.d.sync += again.eq(channels & ~place.ends.tile & ~still_first)
        with m.If(take):
            m.d.sync += given.eq(0)
        with m.Elif(self.words.valid & self.words.ready & ~counter.active):
            m.d.sync += given.eq(1)
        with m.If(self.clear):
            m.d.sync += [given.eq(1), self.words.valid.eq(0)]
        return m

    def _widened(
        self, m: Module, word: Value, half: Value, starts: Value, gives: Value
    ) -> tuple[Value, Value]:
        """The FP32 numbers of a word, and whether it has no more. One of FP16 numbers has those of
        two words, the lower half first; if a chunk is a single word, the upper half's alone."""
        if not self._halves:
            return word, Const(1)
        upper = Signal(init=1)
        if self._words_per_row > 1:
            with m.If(starts):
                m.d.sync += upper.eq(0)
            with m.Elif(gives):
                m.d.sync += upper.eq(~upper)
        chosen = word.word_select(upper, len(word) // 2)
        numbers = []
        for i in range(self.config.lanes):
            m.submodules[f"converter_{i}"] = converter = Fp16ToFp32()
            m.d.comb += converter.fp16.eq(chosen.word_select(i, FP16_BITS))
            numbers.append(converter.fp32)
        return Mux(half, Cat(numbers), word), ~half | upper
