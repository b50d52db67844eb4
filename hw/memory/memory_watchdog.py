# SPDX-License-Identifier: Apache-2.0
"""Noticing that memory does not answer any more."""

from __future__ import annotations

from amaranth.hdl import Const, Elaboratable, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.logic import incremented

_CYCLES_BITS = 32
#: Bits of a number of transactions: more than all readers and writers may have under way.
_TRANSACTIONS_BITS = 12


class MemoryWatchdog(wiring.Component):
    """Says when memory owes an answer and no channel of any port has moved for a while.

    Memory owes an answer to a request, until the last beat or the response has come, and to what is
    on offer, until it is taken.

    Parameters
    ----------
    channels : int
        Address channels.

    Members
    -------
    requests, answers : In(channels)
        Pulses: a request on this address channel is taken; the last beat or the response of a
        transaction comes.
    offer : In(1)
        Level: a request or a beat to write is on offer.
    transfer : In(1)
        Anything is taken on any channel.
    timeout : In(32)
        Cycles without a transfer, 0: any.
    silent : Out(1)
        Level, from the cycle after the last of them on until the next transfer.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(
            {
                "requests": In(channels),
                "answers": In(channels),
                "offer": In(1),
                "transfer": In(1),
                "timeout": In(_CYCLES_BITS),
                "silent": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        outstanding = Signal(_TRANSACTIONS_BITS)
        cycles = Signal(_CYCLES_BITS, init=1)  # without a transfer, with this one
        waits = Signal()
        m.d.comb += waits.eq((outstanding != 0) | self.offer)
        m.d.sync += [
            outstanding.eq(outstanding + sum(self.requests) - sum(self.answers)),
            self.silent.eq(waits & ~self.transfer & (self.timeout != 0) & (cycles >= self.timeout)),
        ]
        with m.If(self.transfer | ~waits):
            m.d.sync += cycles.eq(1)
        with m.Elif(~cycles.all()):
            m.d.sync += cycles.eq(incremented(cycles, Const(1)))
        return m
