# SPDX-License-Identifier: Apache-2.0
"""A reader of memory between memory and scratch memory."""

from __future__ import annotations

from amaranth.hdl import Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from speq.hw.memory.axi import LENGTH_BITS, AxiConfig
from speq.hw.memory.scratch_memory import is_in_window

_CONSTANT = ("size", "burst", "cache", "prot")
_RESPONSE = ("rdata", "rresp", "rlast")


class ReadRouter(wiring.Component):
    """Pass bursts in the window of addresses to scratch memory, and all others to memory.

    A burst for one of them is passed on when all for the other have been answered, so that read
    data come in the order of the requests whatever the two do, and no order between them can keep
    both waiting.

    Flow control: a request is on one of the buses `LATENCY` cycles after it was taken, one in each
    cycle if all are for the same. Read data pass in the cycle in which they come.

    Parameters
    ----------
    config : AxiConfig
    size : int
        Bytes of the window, a power of two from 4,096 on.

    Members
    -------
    base : In(address_bits)
        Of the window, a multiple of 4,096, to be kept while bursts are under way; 0: there is none.
    master : In(config.read_signature)
        All bursts of the same ID; none crosses a multiple of 4,096.
    memory, scratch : Out(config.read_signature)
    """

    #: Cycles from a request of the master to memory or scratch memory.
    LATENCY = 1

    def __init__(self, config: AxiConfig, size: int) -> None:
        self.config = config
        self.size = size
        signature = config.read_signature
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
        valid = Signal()
        address = Signal(self.config.address_bits, reset_less=True)
        length = Signal(LENGTH_BITS, reset_less=True)
        hits = Signal(reset_less=True)
        outstanding = Signal(range(self.config.outstanding + 1))
        idle = Signal(init=1)  # outstanding == 0
        is_scratch = Signal()  # of those that are outstanding
        allowed = Signal()
        moves = Signal()
        ends = Signal()
        m.d.comb += [
            allowed.eq(self._is_allowed(idle, hits == is_scratch)),
            memory.arvalid.eq(valid & allowed & ~hits),
            scratch.arvalid.eq(valid & allowed & hits),
            moves.eq(valid & allowed & Mux(hits, scratch.arready, memory.arready)),
            master.arready.eq(~valid | moves),
            ends.eq(master.rvalid & master.rready & master.rlast),
        ]
        with m.If(master.arready):
            m.d.sync += [
                valid.eq(master.arvalid),
                address.eq(master.araddr),
                length.eq(master.arlen),
                hits.eq(is_in_window(master.araddr, self.base, self.size)),
            ]
        with m.If(moves):
            m.d.sync += is_scratch.eq(hits)
        with m.If(moves & ~ends):
            m.d.sync += [outstanding.eq(outstanding + 1), idle.eq(0)]
        with m.Elif(~moves & ends):
            m.d.sync += [outstanding.eq(outstanding - 1), idle.eq(outstanding == 1)]
        for bus in (memory, scratch):
            m.d.comb += [
                bus.araddr.eq(address),
                bus.arlen.eq(length),
                bus.rready.eq(master.rready),
                *(getattr(bus, f"ar{name}").eq(getattr(master, f"ar{name}")) for name in _CONSTANT),
            ]
        m.d.comb += master.rvalid.eq(memory.rvalid | scratch.rvalid)
        for name in _RESPONSE:
            choice = Mux(is_scratch, getattr(scratch, name), getattr(memory, name))
            m.d.comb += getattr(master, name).eq(choice)
        return m

    def _is_allowed(self, idle: Value, same: Value) -> Value:
        """Whether a burst may be passed on: none is outstanding, or only such as are for the same
        of the two."""
        return idle | same
