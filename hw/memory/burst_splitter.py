# SPDX-License-Identifier: Apache-2.0
"""Commands for memory, checked and split into AXI4 bursts."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.memory.axi import BEATS_BITS, LENGTH_BITS, AxiConfig


def burst_layout(config: AxiConfig) -> data.StructLayout:
    """One burst: address in beats, AxLEN (beats less one), whether it is its command's last."""
    return data.StructLayout({"word": config.word_bits, "length": LENGTH_BITS, "last": 1})


class BurstSplitter(wiring.Component):
    """Split transfers into bursts that end where the address is a multiple of the burst length.

    So all bursts of a command but the first and the last have ``config.burst_beats`` beats, and
    none crosses a 4 KiB boundary. A command without beats, with a misaligned address or with a
    byte outside base .. limit (both included) is dropped and reported instead, after the bursts
    of the commands before it have been taken.

    Flow control: the first burst is offered two cycles after the command was taken, then one burst
    per cycle, also from command to command.

    Parameters
    ----------
    config : AxiConfig

    Members
    -------
    command : In(stream of config.command_layout)
    base, limit : In(address_bits)
        First and last byte of the region; to be kept while there are commands.
    bursts : Out(stream of burst_layout(config))
    refused : Out(1)
        Pulse: a command was dropped.
    refused_address : Out(address_bits)
        Its address, during the pulse.
    hold : In(1)
        Take and start no command.
    clear : In(1)
        Drop all commands taken, and take none.
    busy : Out(1)
        There is a command.
    """

    def __init__(self, config: AxiConfig) -> None:
        self.config = config
        super().__init__(
            {
                "command": In(stream.Signature(config.command_layout)),
                "base": In(config.address_bits),
                "limit": In(config.address_bits),
                "bursts": Out(stream.Signature(burst_layout(config))),
                "refused": Out(1),
                "refused_address": Out(config.address_bits),
                "hold": In(1),
                "clear": In(1),
                "busy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config = self.config
        command = self.command.payload

        # A command is taken together with the address of its last beat, which may be beyond the
        # last address that there is.
        waiting = Signal()
        address = Signal(config.address_bits, reset_less=True)
        last_word = Signal(max(config.word_bits, BEATS_BITS) + 1, reset_less=True)
        malformed = Signal(reset_less=True)
        start = Signal()
        take = Signal()
        m.d.comb += [
            self.command.ready.eq((~waiting | start) & ~self.hold & ~self.clear),
            take.eq(self.command.valid & self.command.ready),
        ]
        with m.If(take):
            first_word = command.address[config.offset_bits :]
            m.d.sync += [
                address.eq(command.address),
                last_word.eq(first_word + command.beats - 1),
                malformed.eq((command.beats == 0) | command.address[: config.offset_bits].any()),
            ]

        # It starts when the bursts of the command before it have been taken.
        active = Signal()
        word = Signal(config.word_bits, reset_less=True)
        end = Signal(config.word_bits, reset_less=True)
        burst = self.bursts.payload
        step = Signal()
        allowed = Signal()
        m.d.comb += [
            step.eq(self.bursts.valid & self.bursts.ready),
            start.eq(waiting & ~self.hold & (~active | (step & burst.last))),
            allowed.eq(~malformed & self._is_inside(address, last_word)),
            self.refused.eq(start & ~allowed & ~self.clear),
            self.refused_address.eq(address),
            self.busy.eq(waiting | active),
        ]

        # A block is what a burst of the largest size covers.
        place_bits = config.burst_beats.bit_length() - 1
        block, place = word[place_bits:], word[:place_bits]
        m.d.comb += [
            burst.word.eq(word),
            burst.last.eq(block == end[place_bits:]),
            burst.length.eq(Mux(burst.last, end[:place_bits], config.burst_beats - 1) - place),
            self.bursts.valid.eq(active),
        ]
        with m.If(step):
            m.d.sync += [word.eq(Cat(Const(0, place_bits), block + 1)), active.eq(~burst.last)]
        with m.If(start):
            m.d.sync += [
                active.eq(allowed),
                word.eq(address[config.offset_bits :]),
                end.eq(last_word),
            ]
        m.d.sync += waiting.eq((waiting & ~start) | take)
        with m.If(self.clear):
            m.d.sync += [waiting.eq(0), active.eq(0)]
        return m

    def _is_inside(self, address: Value, last_word: Value) -> Value:
        """Whether the bytes from `address` to the last of `last_word` are in the region."""
        last_byte = Cat(Const(-1, self.config.offset_bits), last_word)
        return (address >= self.base) & (last_byte <= self.limit)
