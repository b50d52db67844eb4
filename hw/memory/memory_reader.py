# SPDX-License-Identifier: Apache-2.0
"""Reading memory: commands in, a stream of beats out, through an AXI4 master."""

from __future__ import annotations

from amaranth.hdl import Elaboratable, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.ram_fifo import RamFifo
from speq.hw.memory.axi import (
    AddressChannel,
    AxiConfig,
    FaultState,
    guarded_members,
)
from speq.hw.memory.burst_splitter import BurstSplitter


class MemoryReader(wiring.Component):
    """For each command, the beats of memory from its address upwards, in order.

    A burst is requested only when the buffer has room for the longest one, so the read data channel
    is always ready, whatever the consumer does: readers that share an interconnect cannot block
    one another.

    Flow control: the command and the data stream may stall in any cycle. A command's request is on
    the bus `LATENCY` cycles after the command was taken, a beat is offered `RamFifo.LATENCY`
    cycles after it was received. Without stalls there is one beat per cycle, also from command to
    command (see `AxiConfig` for the depth that this needs).

    Faults: a command that is malformed or leaves the region never reaches the bus and sets `error`;
    the beats of the commands before it are delivered. A bad response sets `error`, too; the beats
    before it remain to be taken, it and all that come after it are thrown away, and no burst is
    requested any more. With `error` set no command is taken. `clear` ends this at any time, also
    without an error, as an abort: commands and beats in the unit are dropped (`data.valid` falls),
    and the unit takes commands again when all its transactions have been answered.

    Parameters
    ----------
    config : AxiConfig

    Members
    -------
    axi : Out(config.read_signature)
    command : In(stream of config.command_layout)
    data : Out(stream of data_bits)
    base, limit : In(address_bits)
        First and last byte of the region; to be kept while busy.
    busy : Out(1)
        There are commands, beats not taken, or transactions without an answer, or the unit waits
        for `clear` after a bad response.
    error : Out(Fault)
    error_address : Out(address_bits)
        Of the refused command or the burst with the bad response.
    clear : In(1)
    """

    #: Cycles from taking a command to its first request on the bus.
    LATENCY = BurstSplitter.LATENCY + 1

    def __init__(self, config: AxiConfig) -> None:
        self.config = config
        super().__init__(
            {
                "axi": Out(config.read_signature),
                "command": In(stream.Signature(config.command_layout)),
                "data": Out(stream.Signature(config.data_bits)),
            }
            | guarded_members(config.address_bits)
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config = self.config
        axi = self.axi
        m.submodules.splitter = splitter = BurstSplitter(config)
        m.submodules.channel = channel = AddressChannel(config)
        m.submodules.faults = faults = FaultState(config)
        m.submodules.buffer = buffer = RamFifo(config.data_bits, config.depth)
        # Addresses of outstanding bursts, for the report of a bad response.
        # None is answered before two cycles have passed.
        m.submodules.requested = requested = RamFifo(
            config.word_bits, 1 << (config.outstanding - 1).bit_length()
        )
        wiring.connect(m, wiring.flipped(self.command), splitter.command)
        wiring.connect(m, wiring.flipped(self.data), buffer.read)

        room = Signal(range(config.depth + 1), init=config.depth)  # beats not yet promised
        has_room = Signal(init=1)  # for the longest burst
        outstanding = Signal(range(config.outstanding + 1))
        burst = splitter.bursts.payload
        request = Signal()
        finish = Signal()
        taken = Signal()  # in the cycle before
        m.d.comb += [
            splitter.bursts.ready.eq(
                has_room
                & (outstanding != config.outstanding)
                & channel.requests.ready
                & ~faults.stopped
            ),
            request.eq(splitter.bursts.valid & splitter.bursts.ready),
            channel.requests.valid.eq(request),
            channel.requests.payload.word.eq(burst.word),
            channel.requests.payload.length.eq(burst.length),
            finish.eq(axi.rvalid & axi.rlast),
        ]
        m.d.sync += [
            outstanding.eq(outstanding + request - finish),
            taken.eq(self.data.valid & self.data.ready),
        ]
        with m.If(faults.restart):
            m.d.sync += [room.eq(config.depth), has_room.eq(1)]
        with m.Else():
            # Both outcomes are there before `request` is.
            left, longest = Signal.like(room), config.burst_beats.bit_length() - 1
            freed = Signal.like(room)
            m.d.comb += [left.eq(room - (burst.length + ~taken)), freed.eq(room + taken)]
            m.d.sync += [
                room.eq(Mux(request, left, freed)),
                has_room.eq(Mux(request, left[longest:].any(), freed[longest:].any())),
            ]

        channel.drive(m, axi, "ar", axi.rready)
        m.d.comb += [
            requested.write.payload.eq(burst.word),
            requested.write.valid.eq(request),
            requested.read.ready.eq(finish),
            buffer.write.payload.eq(axi.rdata),
            buffer.write.valid.eq(axi.rvalid & ~axi.rresp[1] & ~faults.stopped),
            buffer.clear.eq(self.clear),
        ]

        faults.supervise(
            m,
            self,
            splitter,
            valid=axi.rvalid,
            response=axi.rresp,
            word=requested.read.payload,
            outstanding=outstanding,
        )
        m.d.comb += self.busy.eq(splitter.busy | (room != config.depth) | faults.stopped)
        return m
