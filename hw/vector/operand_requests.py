# SPDX-License-Identifier: Apache-2.0
"""The transfers from memory that an operand of the vector unit consists of."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, unsigned
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import TOKEN_BITS, AcceleratorConfig
from speq.hw.common.ram import Ram
from speq.hw.memory.axi import BEATS_BITS
from speq.hw.vector.command import shape_layout
from speq.hw.vector.word_counter import WordCounter

_FP32_BITS = 32


class OperandMode(enum.Enum, shape=unsigned(2)):
    """Where the chunks of an operand are, the C elements of a row in a tile."""

    #: [segment][tile][row], one after the other.
    TILES = 0
    #: [segment][tile], the same for all rows.
    CHANNELS = 1
    #: Those of a row follow each other, at its index in a table of rows, for all segments.
    ROWS = 2


def operand_command_layout(config: AcceleratorConfig) -> data.StructLayout:
    """An operand of an operation that goes through `extent`: FP16 numbers if `half`, otherwise FP32
    numbers.

    It begins at byte address `address`, a multiple of a beat. In mode ROWS the chunk of row r in
    tile i is at ``address + index(r) * row_stride + i * chunk bytes``; `row_stride` is a multiple
    of a beat, and `last_rows` at most `rows`. With `twice` each segment is given in two sweeps.
    """
    return data.StructLayout(
        {
            "mode": OperandMode,
            "half": 1,
            "twice": 1,
            "address": config.address_bits,
            "row_stride": config.address_bits,
            "extent": shape_layout(config),
        }
    )


class OperandRequests(wiring.Component):
    """For each command, its transfers from memory, in the order in which `WordCounter` goes through
    the operand: in mode ROWS each chunk, in the others each sweep through a segment.

    Products are sums over the bits of a factor, so they take time: in mode ROWS there is one for
    each of `rows` rows, with its index, in mode TILES one with `rows` and one with `last_rows`, and
    in mode CHANNELS two with 1; of a single segment only the second.

    Flow control: both streams may stall in any cycle. A command is taken when all transfers of the
    one before it have been taken. The first transfer is offered `LATENCY` cycles later, and for
    each product `PRODUCT_LATENCY` and one for each bit of the factor; then there is one per cycle.

    Parameters
    ----------
    config : AcceleratorConfig
        With lanes.

    Members
    -------
    command : In(stream of operand_command_layout(config))
    index_row : Out(row_bits)
    index : In(24)
        In mode ROWS the index of row `index_row`, in the same cycle or in the next.
    transfers : Out(stream of config.data.command_layout)
    busy : Out(1)
        There is a command.

    Raises
    ------
    ValueError
        If there are no lanes.
    """

    #: Cycles from taking a command to its first transfer, without the products.
    LATENCY = 4
    #: Cycles of a product with 0.
    PRODUCT_LATENCY = 3

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        super().__init__(
            {
                "command": In(stream.Signature(operand_command_layout(config))),
                "index_row": Out(config.engine.row_bits),
                "index": In(TOKEN_BITS),
                "transfers": Out(stream.Signature(config.data.command_layout)),
                "busy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config = self.config
        m.submodules.counter = counter = WordCounter(config, words=1)
        m.submodules.bases = bases = Ram(config.address_bits, max(2, config.engine.rows))
        command = Signal(operand_command_layout(config), reset_less=True)
        extent = command.extent
        by_rows = Signal()
        m.d.comb += by_rows.eq(command.mode == OperandMode.ROWS)
        # A port is not wider than a chunk of FP16 numbers, so that these are powers of two.
        chunk_beats = config.engine.cols * _FP32_BITS // config.data.data_bits
        half_chunk_beats = chunk_beats // 2

        # Of a transfer in the last segment and in the others.
        beats = Signal(BEATS_BITS, reset_less=True)
        last_beats = Signal(BEATS_BITS, reset_less=True)

        # Transfers, in two steps: the row's address is fetched, the offset is added. `ready` of the
        # reader of memory depends on much; behind a queue, little depends on it.
        m.submodules.queue = queue = SyncFIFO(width=config.data.command_layout.size, depth=2)
        place = counter.place
        step = queue.w_rdy
        fetched = Signal()
        offset = Signal(config.data.word_bits, reset_less=True)  # beats
        fetched_offset = Signal.like(offset, reset_less=True)
        fetched_beats = Signal(BEATS_BITS, reset_less=True)
        transfer = Signal(config.data.command_layout)
        base = Mux(by_rows, bases.read_data, command.address)
        m.d.comb += [
            transfer.address.eq(base + Cat(Const(0, config.data.offset_bits), fetched_offset)),
            transfer.beats.eq(fetched_beats),
            queue.w_data.eq(transfer),
            queue.w_en.eq(fetched),
            self.transfers.payload.eq(queue.r_data),
            self.transfers.valid.eq(queue.r_rdy),
            queue.r_en.eq(self.transfers.ready),
            bases.read_address.eq(place.row),
            bases.read_enable.eq(step),
            counter.advance.eq(step),
            counter.shape.eq(extent),
            counter.twice.eq(command.twice),
        ]
        with m.If(~by_rows):
            m.d.comb += [
                counter.shape.tiles.eq(1),
                counter.shape.rows.eq(1),
                counter.shape.last_rows.eq(1),
            ]
        with m.If(step):
            m.d.sync += [
                fetched.eq(counter.active),
                fetched_offset.eq(offset),
                fetched_beats.eq(Mux(place.last.segment, last_beats, beats)),
            ]
            with m.If(by_rows & place.ends.sweep):
                m.d.sync += offset.eq(0)
            with m.Elif(counter.active & Mux(by_rows, place.ends.tile, place.ends.segment)):
                m.d.sync += offset.eq(offset + beats)

        # In mode ROWS the address of each row is found before the first transfer, otherwise the
        # beats of a segment (`row` is 0) and of the last one (1).
        row = self.index_row
        total = Signal(max(config.address_bits, BEATS_BITS), reset_less=True)
        summand = Signal.like(total, reset_less=True)
        factor = Signal(TOKEN_BITS, reset_less=True)
        m.d.comb += [
            self.busy.eq(1),
            bases.write_address.eq(row),
            bases.write_data.eq(total),
        ]
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += [self.busy.eq(0), self.command.ready.eq(1)]
                given = self.command.payload
                # A segment that is the only one is the last.
                m.d.sync += row.eq((given.mode != OperandMode.ROWS) & (given.extent.segments == 1))
                with m.If(self.command.valid):
                    m.d.sync += command.eq(self.command.payload)
                    m.next = "INDEX"
            with m.State("INDEX"):
                m.next = "FACTORS"
            with m.State("FACTORS"):
                with m.If(by_rows):
                    m.d.sync += [
                        total.eq(command.address),
                        summand.eq(command.row_stride),
                        factor.eq(self.index),
                    ]
                with m.Else():
                    chunks = Mux(row == 0, extent.rows, extent.last_rows)
                    tiles = extent.tiles
                    m.d.sync += [
                        total.eq(0),
                        summand.eq(
                            Mux(command.half, tiles * half_chunk_beats, tiles * chunk_beats)
                        ),
                        factor.eq(Mux(command.mode == OperandMode.CHANNELS, 1, chunks)),
                    ]
                m.next = "SUM"
            with m.State("SUM"):
                m.d.sync += [
                    total.eq(total + Mux(factor[0], summand, 0)),
                    summand.eq(summand << 1),
                    factor.eq(factor >> 1),
                ]
                with m.If(factor == 0):
                    m.d.sync += row.eq(row + 1)
                    with m.If(by_rows):
                        m.d.comb += bases.write_enable.eq(1)
                        one = Mux(command.half, half_chunk_beats, chunk_beats)
                        m.d.sync += [beats.eq(one), last_beats.eq(one)]
                    with m.Elif(row == 0):
                        m.d.sync += beats.eq(total)
                    with m.Else():
                        m.d.sync += last_beats.eq(total)
                    m.next = "INDEX"
                    with m.If(Mux(by_rows, row + 1 == extent.rows, row == 1)):
                        m.d.comb += counter.start.eq(1)
                        m.d.sync += offset.eq(0)
                        m.next = "BEGIN"
            with m.State("BEGIN"):  # `WordCounter.LATENCY`
                m.next = "REQUEST"
            with m.State("REQUEST"):
                with m.If(~counter.active & ~fetched & ~queue.r_rdy):
                    m.next = "IDLE"
        return m
