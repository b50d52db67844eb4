# SPDX-License-Identifier: Apache-2.0
"""Writing memory: commands and a stream of beats in, through an AXI4 master."""

from __future__ import annotations

from amaranth.hdl import Elaboratable, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from speq.hw.common.ram_fifo import RamFifo
from speq.hw.memory.axi import (
    LENGTH_BITS,
    AddressChannel,
    AxiConfig,
    FaultState,
    guarded_members,
)
from speq.hw.memory.burst_splitter import BurstSplitter


def write_layout(config: AxiConfig) -> data.StructLayout:
    """One beat to write: `strobe` marks the bytes that are written."""
    return data.StructLayout({"data": config.data_bits, "strobe": config.beat_bytes})


class MemoryWriter(wiring.Component):
    """For each command, as many beats of the data stream into memory, from its address upwards.

    A burst is requested only when all its beats are in the buffer, so the write data channel never
    waits for the producer: a writer cannot block others that share an interconnect.

    Flow control: the command and the data stream may stall in any cycle; beats may come before
    their command, as far as the buffer holds them. A burst's request and its first beat are on the
    bus at the earliest `LATENCY` cycles after the command was taken, and `DATA_LATENCY` cycles
    after its last beat was. Without stalls there is one beat per cycle, also from command to
    command (see `AxiConfig` for the depth that this needs), behind the data stream by one burst.

    Faults: a command that is malformed or leaves the region never reaches the bus and sets `error`;
    the commands before it are finished. A bad response sets `error`, too; the bursts that have been
    requested are finished, whatever their responses, and no other is requested. With `error` set no
    command is taken. `clear` ends this at any time, also without an error, as an abort: commands
    and beats of bursts that have not been requested are dropped, and the unit takes commands and
    beats again when all its transactions have been answered. A command that was dropped or failed
    gives no `done`.

    Parameters
    ----------
    config : AxiConfig

    Members
    -------
    axi : Out(config.write_signature)
    command : In(stream of config.command_layout)
    data : In(stream of write_layout(config))
    base, limit : In(address_bits)
        First and last byte of the region; to be kept while busy.
    done : Out(1)
        Pulse: all bursts of a command, the oldest that is left, have been answered.
    busy : Out(1)
        There are commands or transactions without an answer, or the unit waits for `clear` after
        a bad response.
    error : Out(Fault)
    error_address : Out(address_bits)
        Of the refused command or the burst with the bad response.
    clear : In(1)
    """

    #: Cycles from taking a command to its first request on the bus, if its beats are there.
    LATENCY = BurstSplitter.LATENCY + 1
    #: Cycles from taking a burst's last beat to its request, if the command was there before.
    DATA_LATENCY = 2

    def __init__(self, config: AxiConfig) -> None:
        self.config = config
        super().__init__(
            {
                "axi": Out(config.write_signature),
                "command": In(stream.Signature(config.command_layout)),
                "data": In(stream.Signature(write_layout(config))),
                "done": Out(1),
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
        wiring.connect(m, wiring.flipped(self.command), splitter.command)

        available = Signal(range(config.depth + 2))  # beats that no burst has been promised
        outstanding = Signal(range(config.outstanding + 1))
        burst = splitter.bursts.payload
        request = Signal()
        taken = Signal()
        m.d.comb += [
            splitter.bursts.ready.eq(
                (available > burst.length)
                & (outstanding != config.outstanding)
                & channel.requests.ready
                & ~faults.stopped
            ),
            request.eq(splitter.bursts.valid & splitter.bursts.ready),
            channel.requests.valid.eq(request),
            channel.requests.payload.word.eq(burst.word),
            channel.requests.payload.length.eq(burst.length),
            taken.eq(self.data.valid & self.data.ready),
        ]
        m.d.sync += outstanding.eq(outstanding + request - axi.bvalid)
        with m.If(faults.restart):
            m.d.sync += available.eq(0)
        with m.Else():
            m.d.sync += available.eq(
                Mux(request, available - (burst.length + ~taken), available + taken)
            )

        channel.drive(m, axi, "aw", axi.bready)
        self._send_data(m, request, faults)

        # What a response belongs to.
        tag_layout = data.StructLayout({"word": config.word_bits, "last": 1})
        m.submodules.requested = requested = SyncFIFO(
            width=tag_layout.size, depth=config.outstanding
        )
        asked = data.View(tag_layout, requested.w_data)
        answered = data.View(tag_layout, requested.r_data)
        m.d.comb += [
            asked.word.eq(burst.word),
            asked.last.eq(burst.last),
            requested.w_en.eq(request),
            requested.r_en.eq(axi.bvalid),
            self.done.eq(axi.bvalid & answered.last & ~axi.bresp[1] & ~faults.stopped),
        ]

        faults.supervise(
            m,
            self,
            splitter,
            valid=axi.bvalid,
            response=axi.bresp,
            word=answered.word,
            outstanding=outstanding,
        )
        m.d.comb += self.busy.eq(splitter.busy | (outstanding != 0) | faults.stopped)
        return m

    def _send_data(self, m: Module, request: Signal, faults: FaultState) -> None:
        """Beats from the data stream, through the buffer, to the write data channel."""
        config = self.config
        axi = self.axi
        layout = write_layout(config)
        m.submodules.buffer = buffer = RamFifo(layout.size, config.depth)
        m.submodules.lengths = lengths = SyncFIFO(width=LENGTH_BITS, depth=config.outstanding)
        queued = Signal()  # there is a length
        index = Signal(LENGTH_BITS)
        sent = Signal()
        beat = data.View(layout, buffer.read.payload)
        m.d.comb += [
            buffer.write.payload.eq(self.data.payload),
            buffer.write.valid.eq(self.data.valid & ~faults.stopped),
            self.data.ready.eq(buffer.write.ready & ~faults.stopped),
            # Only when the bursts that have been requested have all been sent.
            buffer.clear.eq(faults.restart),
            lengths.w_data.eq(m.submodules.splitter.bursts.payload.length),
            lengths.w_en.eq(request),
            axi.wdata.eq(beat.data),
            axi.wstrb.eq(beat.strobe),
            axi.wlast.eq(index == lengths.r_data),
            axi.wvalid.eq(queued & buffer.read.valid),
            sent.eq(axi.wvalid & axi.wready),
            buffer.read.ready.eq(sent),
            lengths.r_en.eq(sent & axi.wlast),
        ]
        with m.If(sent):
            m.d.sync += index.eq(Mux(axi.wlast, 0, index + 1))
        with m.If(request):
            m.d.sync += queued.eq(1)
        with m.Elif(lengths.r_en):
            m.d.sync += queued.eq(lengths.level != 1)
