# SPDX-License-Identifier: Apache-2.0
"""Scratch memory: on-chip memory behind AXI4, and the window of addresses that it stands for."""

from __future__ import annotations

from amaranth.hdl import Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In

from speq.hw.common.logic import decremented
from speq.hw.common.ram import Ram
from speq.hw.memory.axi import ID_BITS, LENGTH_BITS, PAGE_BYTES, AxiConfig

_BYTE = 8
_PAGE_BITS = PAGE_BYTES.bit_length() - 1


def is_in_window(address: Value, base: Value, size: int) -> Value:
    """Whether a burst from this address on lies in the window of `size` bytes, a power of two of
    pages, from `base` on, a multiple of a page. There is no window if `base` is 0.

    A burst crosses no page, so that all of it does or nothing.
    """
    distance = address[_PAGE_BITS:] - base[_PAGE_BITS:]  # below 0 in front of the window
    return (distance[(size // PAGE_BYTES).bit_length() - 1 :] == 0) & (base != 0)


class ScratchMemory(wiring.Component):
    """On-chip memory as an AXI4 slave, of one RAM for each byte of a beat.

    The address of a byte in it is that on the bus modulo `size`, so that any window of `size` bytes
    has a place for each of its bytes. Responses are OKAY and come in the order of the requests;
    contents are undefined until written. A read that is requested when a write has been answered
    gives what was written.

    Flow control: the master is always ready for read data; all other channels may stall in any
    cycle. A burst's first beat is there `READ_LATENCY` cycles after its request was taken, then
    there is one beat per cycle, also from burst to burst. A beat is written in each cycle, a cycle
    after its burst's request at the earliest, and a burst is answered `WRITE_LATENCY` cycles after
    its last one was taken. No ready depends on a valid of the same cycle.

    Parameters
    ----------
    config : AxiConfig
        Of the bus. Its master has at most `outstanding` bursts without an answer.
    size : int
        Bytes, a power of two from 4,096 on.

    Members
    -------
    read : In(config.read_signature)
    write : In(config.write_signature)
        All bursts of the same ID.
    """

    #: Cycles from a request to the first beat.
    READ_LATENCY = 2
    #: Cycles from a burst's last beat to its response.
    WRITE_LATENCY = 2

    def __init__(self, config: AxiConfig, size: int) -> None:
        self.config = config
        self.size = size
        super().__init__({"read": In(config.read_signature), "write": In(config.write_signature)})

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        words = self.size // self.config.beat_bytes
        rams = [Ram(_BYTE, words) for _ in range(self.config.beat_bytes)]
        for i, ram in enumerate(rams):
            m.submodules[f"ram_{i}"] = ram
        self._read(m, rams)
        self._write(m, rams)
        return m

    def _word(self, address: Value) -> Value:
        """The place of the beat at an address."""
        return address[self.config.offset_bits : self.size.bit_length() - 1]

    def _read(self, m: Module, rams: list[Ram]) -> None:
        bus = self.read
        active = Signal()  # a burst of which a beat is left
        left = Signal(LENGTH_BITS, reset_less=True)  # beats behind the next one
        following = Signal(range(rams[0].depth), reset_less=True)
        fetch = Signal()
        word = Signal.like(following)
        m.d.comb += [
            bus.arready.eq(~active),
            fetch.eq(active | bus.arvalid),
            word.eq(Mux(active, following, self._word(bus.araddr))),
        ]
        for ram in rams:
            m.d.comb += [ram.read_enable.eq(fetch), ram.read_address.eq(word)]
        # A beat in the RAMs' registers, then on the bus.
        fetched = Signal()
        last = Signal(reset_less=True)
        fetched_source = Signal(ID_BITS, reset_less=True)
        with m.If(fetch):
            m.d.sync += [
                active.eq(Mux(active, left, bus.arlen) != 0),
                left.eq(decremented(Mux(active, left, bus.arlen))),
                following.eq(word + 1),
                last.eq(Mux(active, left, bus.arlen) == 0),
                fetched_source.eq(Mux(active, fetched_source, bus.arid)),
            ]
        m.d.sync += [
            fetched.eq(fetch),
            bus.rvalid.eq(fetched),
            bus.rlast.eq(last),
            bus.rid.eq(fetched_source),
            *(
                bus.rdata[_BYTE * i : _BYTE * (i + 1)].eq(ram.read_data)
                for i, ram in enumerate(rams)
            ),
        ]

    def _write(self, m: Module, rams: list[Ram]) -> None:
        bus = self.write
        depth = rams[0].depth
        m.submodules.starts = starts = SyncFIFO(width=len(self._word(bus.awaddr)), depth=2)
        goes_on = Signal()  # within a burst
        following = Signal(range(depth), reset_less=True)
        word = Signal.like(following)
        take = Signal()
        m.d.comb += [
            starts.w_data.eq(self._word(bus.awaddr)),
            starts.w_en.eq(bus.awvalid),
            bus.awready.eq(starts.w_rdy),
            bus.wready.eq(starts.r_rdy),
            take.eq(bus.wvalid & bus.wready),
            starts.r_en.eq(take & bus.wlast),
            word.eq(Mux(goes_on, following, starts.r_data)),
        ]
        with m.If(take):
            m.d.sync += [goes_on.eq(~bus.wlast), following.eq(word + 1)]
        # Written in the cycle behind.
        writes = Signal()
        ends = Signal()
        place = Signal.like(following, reset_less=True)
        beat = Signal.like(bus.wdata, reset_less=True)
        strobe = Signal.like(bus.wstrb, reset_less=True)
        m.d.sync += [
            writes.eq(take),
            ends.eq(take & bus.wlast),
            place.eq(word),
            beat.eq(bus.wdata),
            strobe.eq(bus.wstrb),
        ]
        for i, ram in enumerate(rams):
            m.d.comb += [
                ram.write_enable.eq(writes & self._is_marked(strobe, i)),
                ram.write_address.eq(place),
                ram.write_data.eq(beat[_BYTE * i : _BYTE * (i + 1)]),
            ]
        unanswered = Signal(range(self.config.outstanding + 1))
        m.d.sync += unanswered.eq(unanswered + ends - (bus.bvalid & bus.bready))
        m.d.comb += bus.bvalid.eq(unanswered != 0)

    def _is_marked(self, strobe: Value, byte: int) -> Value:
        """Whether a byte of a beat is to be written."""
        return strobe[byte]
