# SPDX-License-Identifier: Apache-2.0
"""Commands for memory, checked and split into AXI4 bursts."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.logic import decremented, incremented
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

    Flow control: the first burst is offered `LATENCY` cycles after the command was taken, then one
    burst per cycle, also from command to command.

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

    LATENCY = 3

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
        # A block is what a burst of the largest size covers.
        place_bits = config.burst_beats.bit_length() - 1
        valid = Signal(2)
        move = Signal(2)  # from a stage to the next one
        take = Signal()
        has_spare = Signal()
        free = ~valid[0] | move[0]
        m.d.comb += [
            move[0].eq(valid[0] & (~valid[1] | move[1])),
            self.command.ready.eq(~has_spare & ~self.hold & ~self.clear),
            take.eq(self.command.valid & self.command.ready),
        ]

        # Stage 1: the last beat, which may be beyond the last address that there is, and the same
        # counted from the beginning of the first block. Beside it stands a spare one, so that no
        # path leads from the bus through this unit.
        layout = data.StructLayout(
            {
                "address": config.address_bits,
                "last_word": max(config.word_bits, BEATS_BITS) + 1,
                "span": BEATS_BITS + 1,
                "malformed": 1,
            }
        )
        taken = Signal(layout)
        first = Signal(layout, reset_less=True)
        spare = Signal(layout, reset_less=True)
        command = self.command.payload
        first_word = command.address[config.offset_bits :]
        m.d.comb += [
            taken.address.eq(command.address),
            taken.last_word.eq(first_word + command.beats - 1),
            taken.span.eq(first_word[:place_bits] + command.beats - 1),
            taken.malformed.eq((command.beats == 0) | command.address[: config.offset_bits].any()),
        ]
        with m.If(free):
            m.d.sync += [first.eq(Mux(has_spare, spare, taken)), has_spare.eq(0)]
        with m.Elif(take):
            m.d.sync += [spare.eq(taken), has_spare.eq(1)]

        # Stage 2: whether it is allowed, and its first burst.
        largest = config.burst_beats - 1
        checked = Signal(config.address_bits, reset_less=True)
        allowed = Signal(reset_less=True)
        word = first.address[config.offset_bits :]
        # Blocks behind the first one, and the last beat's place in the last one.
        blocks, end = first.span[place_bits:], first.span[:place_bits]
        first_length = Signal(LENGTH_BITS, reset_less=True)
        first_left = Signal.like(blocks, reset_less=True)
        first_end = Signal(LENGTH_BITS, reset_less=True)
        first_last = Signal(reset_less=True)
        with m.If(move[0]):
            m.d.sync += [
                checked.eq(first.address),
                allowed.eq(~first.malformed & self._is_inside(first.address, first.last_word)),
                first_last.eq(blocks == 0),
                first_length.eq(Mux(blocks == 0, end, largest) - word[:place_bits]),
                first_left.eq(blocks),
                first_end.eq(end),
            ]

        # Stage 3: bursts, when those of the command before it have been taken.
        burst = self.bursts.payload
        left = Signal.like(blocks, reset_less=True)  # blocks behind this one
        last_end = Signal(LENGTH_BITS, reset_less=True)
        done = Signal()
        start = Signal()
        step = Signal()
        refuse = Signal()
        active = self.bursts.valid
        m.d.comb += [
            step.eq(active & self.bursts.ready),
            done.eq(~active | (self.bursts.ready & burst.last)),
            start.eq(valid[1] & allowed & ~self.hold & done),
            refuse.eq(valid[1] & ~allowed & ~self.hold & ~active),
            move[1].eq(start | refuse),
            self.refused.eq(refuse & ~self.clear),
            self.refused_address.eq(checked),
            self.busy.eq(valid.any() | active),
        ]
        with m.If(start):
            m.d.sync += [
                burst.word.eq(checked[config.offset_bits :]),
                burst.length.eq(first_length),
                burst.last.eq(first_last),
                left.eq(first_left),
                last_end.eq(first_end),
            ]
        with m.Elif(step):
            is_last = left == 1
            m.d.sync += [
                burst.word.eq(
                    Cat(Const(0, place_bits), incremented(burst.word[place_bits:], Const(1)))
                ),
                burst.length.eq(Mux(is_last, last_end, largest)),
                burst.last.eq(is_last),
                left.eq(decremented(left)),
            ]
        m.d.sync += [
            valid.eq(Cat(~free | has_spare | take, (valid[1] & ~move[1]) | move[0])),
            active.eq(start | (active & ~(step & burst.last))),
        ]
        with m.If(self.clear):
            m.d.sync += [has_spare.eq(0), valid.eq(0), active.eq(0)]
        return m

    def _is_inside(self, address: Value, last_word: Value) -> Value:
        """Whether the bytes from `address` to the last of `last_word` are in the region."""
        last_byte = Cat(Const(-1, self.config.offset_bits), last_word)
        return (address >= self.base) & (last_byte <= self.limit)
