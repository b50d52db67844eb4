# SPDX-License-Identifier: Apache-2.0
"""A writer of memory between memory and scratch memory."""

from __future__ import annotations

from amaranth.hdl import Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from speq.hw.memory.axi import LENGTH_BITS, AxiConfig
from speq.hw.memory.scratch_memory import is_in_window

_CONSTANT = ("size", "burst", "cache", "prot")


class WriteRouter(wiring.Component):
    """Pass bursts in the window of addresses to scratch memory, and all others to memory.

    Beats and responses follow the order of the requests: two queues say for which of the two each
    burst is whose beats, or whose response, have not come.

    Flow control: a request is on one of the buses `LATENCY` cycles after it was taken, one in each
    cycle; its beats pass `BEAT_LATENCY` cycles after the request at the earliest, in the cycle in
    which they come. A response passes in the cycle in which it comes, or behind those of the bursts
    before.

    Parameters
    ----------
    config : AxiConfig
        Its master has at most `outstanding` bursts without an answer.
    size : int
        Bytes of the window, a power of two from 4,096 on.

    Members
    -------
    base : In(address_bits)
        Of the window, a multiple of 4,096, to be kept while bursts are under way; 0: there is none.
    master : In(config.write_signature)
        All bursts of the same ID; none crosses a multiple of 4,096.
    memory, scratch : Out(config.write_signature)
    """

    #: Cycles from a request of the master to memory or scratch memory, and to its beats there.
    LATENCY = 1
    BEAT_LATENCY = 2

    def __init__(self, config: AxiConfig, size: int) -> None:
        self.config = config
        self.size = size
        signature = config.write_signature
        super().__init__(
            {
                "base": In(config.address_bits),
                "master": In(signature),
                "memory": Out(signature),
                "scratch": Out(signature),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        master, memory, scratch = self.master, self.memory, self.scratch
        # For each burst whether it is for scratch memory; there is always room in both.
        m.submodules.beats = beats = SyncFIFO(width=1, depth=self.config.outstanding)
        m.submodules.answers = answers = SyncFIFO(width=1, depth=self.config.outstanding)
        valid = Signal()
        address = Signal(self.config.address_bits, reset_less=True)
        length = Signal(LENGTH_BITS, reset_less=True)
        hits = Signal(reset_less=True)
        moves = Signal()
        taken = Signal()  # in the cycle before
        m.d.comb += [
            memory.awvalid.eq(valid & ~hits),
            scratch.awvalid.eq(valid & hits),
            moves.eq(valid & Mux(hits, scratch.awready, memory.awready)),
            master.awready.eq(~valid | moves),
        ]
        m.d.sync += taken.eq(master.awvalid & master.awready)
        with m.If(master.awready):
            m.d.sync += [
                valid.eq(master.awvalid),
                address.eq(master.awaddr),
                length.eq(master.awlen),
                hits.eq(is_in_window(master.awaddr, self.base, self.size)),
            ]
        # Not when the request moves on: a slave may wait for beats before it takes that.
        for queue in (beats, answers):
            m.d.comb += [queue.w_data.eq(hits), queue.w_en.eq(taken)]
        for bus in (memory, scratch):
            m.d.comb += [
                bus.awaddr.eq(address),
                bus.awlen.eq(length),
                bus.wdata.eq(master.wdata),
                bus.wstrb.eq(master.wstrb),
                bus.wlast.eq(master.wlast),
                *(getattr(bus, f"aw{name}").eq(getattr(master, f"aw{name}")) for name in _CONSTANT),
            ]
        m.d.comb += [
            memory.wvalid.eq(master.wvalid & beats.r_rdy & ~beats.r_data),
            scratch.wvalid.eq(master.wvalid & beats.r_rdy & beats.r_data),
            master.wready.eq(beats.r_rdy & Mux(beats.r_data, scratch.wready, memory.wready)),
            beats.r_en.eq(master.wvalid & master.wready & master.wlast),
            answers.r_en.eq(master.bvalid & master.bready),
        ]
        self._answer(m, answers.r_rdy, answers.r_data)
        return m

    def _answer(self, m: Module, waits: Value, is_scratch: Value) -> None:
        """Pass the response of the oldest burst that waits for one, if any does."""
        master, memory, scratch = self.master, self.memory, self.scratch
        m.d.comb += [
            memory.bready.eq(master.bready & waits & ~is_scratch),
            scratch.bready.eq(master.bready & waits & is_scratch),
            master.bvalid.eq(waits & Mux(is_scratch, scratch.bvalid, memory.bvalid)),
            master.bresp.eq(Mux(is_scratch, scratch.bresp, memory.bresp)),
        ]
