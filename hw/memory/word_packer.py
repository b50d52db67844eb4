# SPDX-License-Identifier: Apache-2.0
"""Beats of a memory port into words of another width."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.memory.axi import BEATS_BITS


def packer_command_layout(count_bits: int = BEATS_BITS) -> data.StructLayout:
    """A run of `words` words (1 or more)."""
    return data.StructLayout({"words": count_bits})


class WordPacker(wiring.Component):
    """For each command, that many words from a stream of beats, the first in the low bits.

    Each command begins with a new beat: what is left of the last beat of the one before it is
    dropped.

    Flow control: all streams may stall in any cycle. Without stalls there is one word per cycle if
    a word is at most as wide as a beat, otherwise one beat is taken per cycle, also from command to
    command. A word is offered in the cycle in which its last beat is.

    Parameters
    ----------
    beat_bits, word_bits : int
        Powers of two.
    count_bits : int
        Bits of a command's number of words.

    Members
    -------
    half : In(1)
        Where a word is several beats: each of the words has only its upper half's beats.
    command : In(stream of packer_command_layout(count_bits))
    beats : In(stream of beat_bits)
    words : Out(stream of word_bits)
    busy : Out(1)
        A command's last word has not been taken.

    Raises
    ------
    ValueError
        If a width is not a power of two.
    """

    def __init__(self, beat_bits: int, word_bits: int, count_bits: int = BEATS_BITS) -> None:
        for name, value in (("beat_bits", beat_bits), ("word_bits", word_bits)):
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} is {value!r}; allowed are powers of two")
        self.beat_bits = beat_bits
        self.word_bits = word_bits
        super().__init__(
            {
                "half": In(1),
                "command": In(stream.Signature(packer_command_layout(count_bits))),
                "beats": In(stream.Signature(beat_bits)),
                "words": Out(stream.Signature(word_bits)),
                "busy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        left = Signal(len(self.command.payload.words))  # words of the command
        last = left == 1
        give = Signal()
        m.d.comb += [
            give.eq(self.words.valid & self.words.ready),
            self.busy.eq(left != 0),
            self.command.ready.eq((left == 0) | (give & last)),
        ]
        with m.If(self.command.valid & self.command.ready):
            m.d.sync += left.eq(self.command.payload.words)
        with m.Elif(give):
            m.d.sync += left.eq(left - 1)
        if self.word_bits <= self.beat_bits:
            self._cut(m, last, give)
        else:
            self._join(m)
        return m

    def _cut(self, m: Module, last: Signal, give: Signal) -> None:
        """A beat holds one word or more."""
        words = self.beat_bits // self.word_bits
        index = Signal(range(max(2, words)))
        m.d.comb += [
            self.words.payload.eq(self.beats.payload.word_select(index, self.word_bits)),
            self.words.valid.eq(self.beats.valid & self.busy),
            self.beats.ready.eq(give & (last | (index == words - 1))),
        ]
        with m.If(give):
            m.d.sync += index.eq(Mux(self.beats.ready, 0, index + 1))

    def _join(self, m: Module) -> None:
        """A word is several beats; the last one need not be stored."""
        beats = self.word_bits // self.beat_bits
        index = Signal(range(beats))
        stored = Signal(self.word_bits - self.beat_bits, reset_less=True)
        complete = (index == beats - 1) | self.half & (index == beats // 2 - 1)
        word = Cat(stored, self.beats.payload)
        m.d.comb += [
            self.words.payload.eq(word),
            self.words.valid.eq(self.beats.valid & self.busy & complete),
            self.beats.ready.eq(self.busy & (~complete | self.words.ready)),
        ]
        with m.If(self.beats.valid & self.beats.ready):
            m.d.sync += [
                stored.eq(word[self.beat_bits :]),
                index.eq(Mux(complete, 0, index + 1)),
            ]
