# SPDX-License-Identifier: Apache-2.0
"""A queue of commands, each of which is given several times."""

from __future__ import annotations

from amaranth.hdl import Elaboratable, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out


def repeated_layout(item: data.Layout, times_bits: int) -> data.StructLayout:
    """An `item` that is to be given `times` times (1 or more)."""
    return data.StructLayout({"item": item, "times": times_bits})


class Repeater(wiring.Component):
    """Give each item `times` times.

    Flow control: both streams may stall in any cycle. An item is offered in the cycle after it was
    taken, and one per cycle without a gap, also from item to item.

    Parameters
    ----------
    item : data.Layout
    times_bits : int
    depth : int
        Items that are taken before the first of them has been given for the last time, from 2.

    Members
    -------
    command : In(stream of repeated_layout(item, times_bits))
    items : Out(stream of item)
    busy : Out(1)
        There is an item.
    """

    def __init__(self, item: data.Layout, times_bits: int, depth: int) -> None:
        self.layout = repeated_layout(item, times_bits)
        self.depth = depth
        super().__init__(
            {
                "command": In(stream.Signature(self.layout)),
                "items": Out(stream.Signature(item)),
                "busy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        # Behind the one that is given, which is in registers.
        m.submodules.queue = queue = SyncFIFO(width=self.layout.size, depth=self.depth - 1)
        head = Signal(self.layout, reset_less=True)  # `times` that are left
        active = Signal()
        give = Signal()
        free = Signal()
        m.d.comb += [
            give.eq(active & self.items.ready),
            free.eq(~active | (give & (head.times == 1))),
            queue.w_data.eq(self.command.payload),
            # If no other waits, an item need not either.
            queue.w_en.eq(self.command.valid & (queue.r_rdy | ~free)),
            queue.r_en.eq(free),
            self.command.ready.eq(queue.w_rdy),
            self.items.payload.eq(head.item),
            self.items.valid.eq(active),
            self.busy.eq(active),
        ]
        with m.If(free):
            m.d.sync += [
                active.eq(queue.r_rdy | self.command.valid),
                head.eq(Mux(queue.r_rdy, queue.r_data, self.command.payload.as_value())),
            ]
        with m.Elif(give):
            m.d.sync += head.times.eq(head.times - 1)
        return m
