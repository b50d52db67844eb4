# SPDX-License-Identifier: Apache-2.0
"""A queue of commands, each of which is given several times."""

from __future__ import annotations

from amaranth.hdl import Elaboratable, Module, Signal
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
        Items that are taken before the first of them has been given for the last time.

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
        m.submodules.queue = queue = SyncFIFO(width=self.layout.size, depth=self.depth)
        head = data.View(self.layout, queue.r_data)
        given = Signal(self.layout["times"].width)
        last = given + 1 == head.times
        give = self.items.valid & self.items.ready
        m.d.comb += [
            queue.w_data.eq(self.command.payload),
            queue.w_en.eq(self.command.valid),
            self.command.ready.eq(queue.w_rdy),
            self.items.payload.eq(head.item),
            self.items.valid.eq(queue.r_rdy),
            queue.r_en.eq(give & last),
            self.busy.eq(queue.r_rdy),
        ]
        with m.If(give):
            m.d.sync += given.eq(given + 1)
            with m.If(last):
                m.d.sync += given.eq(0)
        return m
