# SPDX-License-Identifier: Apache-2.0
"""FIFO in the design's memory primitive."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.ram import Ram


class RamFifo(wiring.Component):
    """FIFO of at least `depth` words: one word in and one out per cycle, in two cycles at least.

    Parameters
    ----------
    width : int
        Bits of a word.
    depth : int
        Words: a power of two, 2 or more.

    Members
    -------
    write : In(stream of width)
        Ready when fewer than `depth` words are in the RAM; one more may wait at the output.
    read : Out(stream of width)
    clear : In(1)
        Drop all words.

    Raises
    ------
    ValueError
        If the depth is not such a power of two.
    """

    #: Cycles from taking a word to offering it.
    LATENCY = 2

    def __init__(self, width: int, depth: int) -> None:
        if depth < 2 or depth & (depth - 1):
            raise ValueError(f"depth is {depth!r}; allowed are powers of two from 2")
        self.width = width
        self.depth = depth
        super().__init__(
            {
                "write": In(stream.Signature(width)),
                "read": Out(stream.Signature(width)),
                "clear": In(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        m.submodules.ram = ram = Ram(self.width, self.depth)
        written = Signal(range(self.depth))
        fetched = Signal(range(self.depth))
        stored = Signal(range(self.depth + 1))
        has_words = Signal()  # stored != 0
        write = Signal()
        fetch = Signal()
        m.d.comb += [
            self.write.ready.eq(~stored[-1]),  # stored != depth
            write.eq(self.write.valid & self.write.ready),
            fetch.eq(has_words & (~self.read.valid | self.read.ready)),
            ram.write_enable.eq(write),
            ram.write_address.eq(written),
            ram.write_data.eq(self.write.payload),
            ram.read_enable.eq(fetch),
            ram.read_address.eq(fetched),
            self.read.payload.eq(ram.read_data),
        ]
        with m.If(write):
            m.d.sync += written.eq(written + 1)
        with m.If(fetch):
            m.d.sync += fetched.eq(fetched + 1)
        # Both outcomes are there before `fetch` is.
        m.d.sync += [
            stored.eq(Mux(fetch, stored - ~write, stored + write)),
            has_words.eq(write | Mux(fetch, stored != 1, has_words)),
        ]
        m.d.sync += self.read.valid.eq(fetch | (self.read.valid & ~self.read.ready))
        with m.If(self.clear):
            m.d.sync += [Cat(written, fetched, stored, has_words).eq(0), self.read.valid.eq(0)]
        return m
