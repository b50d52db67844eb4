# SPDX-License-Identifier: Apache-2.0
"""The array's weight words, from memory."""

from __future__ import annotations

from amaranth.hdl import Elaboratable, Module, Mux, ResetInserter, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.common.logic import ceil_div, exceeds
from speq.hw.common.ram_fifo import RamFifo
from speq.hw.engine_config import DRAFT_LANES, FP16_BITS, Mode
from speq.hw.memory.axi import guard, guarded_members
from speq.hw.memory.memory_reader import MemoryReader
from speq.hw.memory.plane_merger import PlaneMerger, merger_command_layout
from speq.hw.memory.repeater import Repeater
from speq.hw.memory.word_packer import WordPacker
from speq.model.number_format import residual_words

#: Commands whose last word may not have been taken when another is taken.
_COMMANDS = 4
#: Chunks that have been requested and not been taken from the buffer.
_CHUNKS = 32
_MAX_CHUNK_WORDS = 16
#: Words of the residuals that belong to a word of draft codes.
RESIDUAL_WORDS = residual_words(DRAFT_LANES)


def tile_bits(config: AcceleratorConfig) -> int:
    """Bits of a number of tiles."""
    engine = config.engine
    return (-(-engine.max_o // engine.cols)).bit_length()


def beats_per_word(config: AcceleratorConfig) -> int:
    """Beats of the weight port that hold a word of 16 bits per column."""
    return FP16_BITS * config.engine.cols // config.weights.data_bits


def chunk_words(config: AcceleratorConfig) -> int:
    """Words of the draft plane that are read between words of the residual plane: a burst."""
    return min(max(1, config.weights.burst_beats // beats_per_word(config)), _MAX_CHUNK_WORDS)


def weight_command_layout(config: AcceleratorConfig) -> data.StructLayout:
    """The weights of a GEMM: `tiles` tiles of `k` weights per column, both 1 or more.

    `plane` and `residual` are byte addresses, `stride` the distance of the plane's tiles in bytes,
    0 if they follow each other; see `AcceleratorConfig.job_layout`.
    """
    return data.StructLayout(
        {
            "mode": Mode,
            "k": config.engine.k_bits,
            "tiles": tile_bits(config),
            "plane": config.address_bits,
            "residual": config.address_bits,
            "stride": config.address_bits,
        }
    )


def _word_count_bits(config: AcceleratorConfig) -> int:
    """Bits of a number of words of a chunk; the residual's are up to three times a chunk's."""
    return max(config.engine.k_bits, (RESIDUAL_WORDS * _MAX_CHUNK_WORDS).bit_length())


def _chunk_layout(config: AcceleratorConfig) -> data.StructLayout:
    """Words that follow each other in memory, of the residual or of another plane."""
    return data.StructLayout({"words": _word_count_bits(config), "residual": 1})


class _Chunker(wiring.Component):
    """Cut commands into chunks: a memory command and a note of what it reads for each.

    In verify mode a chunk of the draft plane alternates with the residuals of the same weights; in
    the other modes a tile is a chunk.

    Members
    -------
    command : In(stream of weight_command_layout(config))
    requests : Out(stream of config.weights.command_layout)
    chunks : Out(stream of _chunk_layout(config))
        The same chunk as that of `requests`; both are taken in the same cycle.
    busy : Out(1)
    """

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        super().__init__(
            {
                "command": In(stream.Signature(weight_command_layout(config))),
                "requests": Out(stream.Signature(config.weights.command_layout)),
                "chunks": Out(stream.Signature(_chunk_layout(config))),
                "busy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config = self.config
        command = self.command.payload
        word_bytes = beats_per_word(config) * config.weights.beat_bytes
        chunk = chunk_words(config)

        active = Signal()
        tiles = Signal(tile_bits(config), reset_less=True)  # that are left
        verify = Signal(reset_less=True)
        in_residual = Signal()
        tile = Signal(config.address_bits, reset_less=True)  # address of the plane's next tile
        stride = Signal.like(tile)
        has_stride = Signal(reset_less=True)
        plane = Signal.like(tile)
        residual = Signal.like(tile)

        # Of a tile and of what is left of it: words of the plane, those in the next chunk, and
        # whether there are others behind that.
        bits = config.engine.k_bits
        span_layout = data.StructLayout({"left": bits, "part": bits, "more": 1})
        whole = Signal(span_layout, reset_less=True)
        span = Signal(span_layout, reset_less=True)
        part = span.part
        # Times `RESIDUAL_WORDS`, 3, by an adder, which is faster than a multiplier.
        residual_part = (part << 1)[: chunk.bit_length() + 1] + part[: chunk.bit_length()]
        amount = Signal(_word_count_bits(config))
        step = Signal()
        m.d.comb += [
            amount.eq(Mux(in_residual, residual_part, part)),
            self.busy.eq(active),
            self.requests.valid.eq(active & self.chunks.ready),
            self.requests.payload.address.eq(Mux(in_residual, residual, plane)),
            self.requests.payload.beats.eq(amount * beats_per_word(config)),
            step.eq(self.requests.valid & self.requests.ready),
            self.chunks.valid.eq(step),
            self.chunks.payload.words.eq(amount),
            self.chunks.payload.residual.eq(in_residual),
        ]
        weights_done = step & (in_residual | ~verify)
        tile_done = weights_done & ~span.more
        done = tile_done & (tiles == 1)
        m.d.comb += self.command.ready.eq(~active | done)

        with m.If(step):
            m.d.sync += in_residual.eq(verify & ~in_residual)
            with m.If(in_residual):
                m.d.sync += residual.eq(residual + residual_part * word_bytes)
            with m.Else():
                m.d.sync += plane.eq(plane + part * word_bytes)
        with m.If(tile_done):
            m.d.sync += [tiles.eq(tiles - 1), span.eq(whole)]
            with m.If(has_stride):
                m.d.sync += [plane.eq(tile), tile.eq(tile + stride)]
        with m.Elif(weights_done):
            is_long = exceeds(span.left, 2 * chunk)
            rest = (span.left - chunk)[: len(span.left)]
            m.d.sync += [
                span.left.eq(rest),
                span.part.eq(Mux(is_long, chunk, rest)),
                span.more.eq(is_long),
            ]
        with m.If(done):
            m.d.sync += active.eq(0)
        with m.If(self.command.valid & self.command.ready):
            words = Mux(command.mode == Mode.BYPASS, command.k, _draft_words(command.k))
            is_cut = (command.mode == Mode.VERIFY) & exceeds(words, chunk)
            for each in (whole, span):
                m.d.sync += [
                    each.left.eq(words),
                    each.part.eq(Mux(is_cut, chunk, words)),
                    each.more.eq(is_cut),
                ]
            m.d.sync += [
                active.eq(1),
                tiles.eq(command.tiles),
                verify.eq(command.mode == Mode.VERIFY),
                plane.eq(command.plane),
                tile.eq(command.plane + command.stride),
                stride.eq(command.stride),
                has_stride.eq(command.stride != 0),
                residual.eq(command.residual),
            ]
        return m


def _draft_words(k: Value) -> Value:
    """Words of the draft plane for k weights."""
    return ceil_div(k, DRAFT_LANES)


class WeightReader(wiring.Component):
    """For each command, the weight words of its tiles as the engine takes them.

    Per tile these are k words merged from both planes (verify), ceil(k / 4) words of the draft
    plane (draft) or k plain words (bypass); the planes are [tile][word][column] in 16 bits. In
    verify mode one reader reads both, in chunks of `chunk_words` words of the draft plane and three
    times as many of the residual plane, so that neither is read at the expense of the other. The
    reader runs ahead across tiles and commands.

    Flow control, faults and `clear`: as of `MemoryReader`. With an ideal memory that sustains a
    beat per cycle, there is a word in each cycle in which the port can have transferred one, that
    is, with a port as wide as the array, in each cycle in draft and bypass mode and in k of
    ``4 * ceil(k / 4)`` cycles in verify mode, also from tile to tile and from command to command.

    Parameters
    ----------
    config : AcceleratorConfig

    Members
    -------
    axi : Out(config.weights.read_signature)
    command : In(stream of weight_command_layout(config))
    weights : Out(stream of ArrayLayout(16, cols))
    and `guarded_members(address_bits)`, where a refused transfer is a chunk
    """

    #: Cycles from taking a command to its first request on the bus.
    LATENCY = 1 + MemoryReader.LATENCY

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        word = data.ArrayLayout(FP16_BITS, config.engine.cols)
        super().__init__(
            {
                "axi": Out(config.weights.read_signature),
                "command": In(stream.Signature(weight_command_layout(config))),
                "weights": Out(stream.Signature(word)),
            }
            | guarded_members(config.address_bits)
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config = self.config
        resettable = ResetInserter(self.clear)
        chunker = _Chunker(config)
        reader = MemoryReader(config.weights)
        merges = Repeater(merger_command_layout(config.engine), tile_bits(config), _COMMANDS)
        merger = PlaneMerger(config.engine)
        m.submodules.chunker = resettable(chunker)
        m.submodules.reader = reader
        m.submodules.merges = resettable(merges)
        m.submodules.merger = resettable(merger)
        wiring.connect(m, reader.axi, wiring.flipped(self.axi))
        wiring.connect(m, chunker.requests, reader.command)
        wiring.connect(m, merges.items, merger.command)
        wiring.connect(m, merger.words, wiring.flipped(self.weights))

        command, merge = self.command.payload, merges.command.payload
        is_draft = command.mode == Mode.DRAFT
        take = self.command.valid & self.command.ready
        m.d.comb += [
            self.command.ready.eq(chunker.command.ready & merges.command.ready & ~self.clear),
            chunker.command.payload.eq(command),
            chunker.command.valid.eq(take),
            merge.item.words.eq(Mux(is_draft, _draft_words(command.k), command.k)),
            merge.item.merge.eq(command.mode == Mode.VERIFY),
            merge.times.eq(command.tiles),
            merges.command.valid.eq(take),
        ]
        self._route(m, reader, chunker, merger)

        guard(m, self, reader)
        m.d.comb += self.busy.eq(chunker.busy | reader.busy | merges.busy | merger.busy)
        return m

    def _route(
        self, m: Module, reader: MemoryReader, chunker: _Chunker, merger: PlaneMerger
    ) -> None:
        """Words from the reader to the merger, by plane.

        While one plane's chunk passes, the merger works on the other's words in its FIFO.
        """
        config = self.config
        resettable = ResetInserter(self.clear)
        width = FP16_BITS * config.engine.cols
        packer = WordPacker(config.weights.data_bits, width)
        m.submodules.packer = resettable(packer)
        wiring.connect(m, reader.data, packer.beats)
        # Chunks are whole words, so the packer need not know where they end.
        m.d.comb += [packer.command.valid.eq(1), packer.command.payload.words.eq(1)]

        layout = _chunk_layout(config)
        chunks = SyncFIFO(width=layout.size, depth=_CHUNKS)
        m.submodules.chunks = resettable(chunks)
        # The chunk whose words pass, in registers: the queue's memory is slow. It is there long
        # before its words.
        chunk = Signal(layout, reset_less=True)  # `words` that are left
        passing = Signal()
        give = packer.words.valid & packer.words.ready
        last = chunk.words == 1
        m.d.comb += [
            chunks.w_data.eq(chunker.chunks.payload),
            chunks.w_en.eq(chunker.chunks.valid),
            chunker.chunks.ready.eq(chunks.w_rdy),
            chunks.r_en.eq(~passing | (give & last)),
        ]
        with m.If(chunks.r_en):
            m.d.sync += [passing.eq(chunks.r_rdy), chunk.eq(chunks.r_data)]
        with m.Elif(give):
            m.d.sync += chunk.words.eq(chunk.words - 1)
        with m.If(self.clear):
            m.d.sync += passing.eq(0)

        for i, plane in enumerate((merger.draft, merger.residual)):
            fifo = RamFifo(width, 2 * _MAX_CHUNK_WORDS)
            m.submodules[f"fifo_{i}"] = fifo
            m.d.comb += [
                fifo.clear.eq(self.clear),
                fifo.write.payload.eq(packer.words.payload),
                fifo.write.valid.eq(packer.words.valid & passing & (chunk.residual == i)),
                plane.payload.eq(fifo.read.payload),
                plane.valid.eq(fifo.read.valid),
                fifo.read.ready.eq(plane.ready),
            ]
            with m.If(passing & (chunk.residual == i)):
                m.d.comb += packer.words.ready.eq(fifo.write.ready)
