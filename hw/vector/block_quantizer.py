# SPDX-License-Identifier: Apache-2.0
"""FP16 activations to 8-bit block floating point, for draft passes."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.ieee754 import FP16, FP16_SPECIAL, effective_exponent, significand
from speq.hw.common.logic import pipeline_stage, shift_right_sticky
from speq.hw.common.ram_fifo import RamFifo
from speq.hw.engine_config import (
    BLOCK_ACTIVATION,
    BLOCK_MAGNITUDE_BITS,
    FP16_BITS,
    check_power_of_two,
)

_EXPONENT_BITS = 5
#: Bits of a significand below a magnitude's last one, if it has the block's exponent.
_DROPPED = 4
#: Exponents of which a stage of the search for a word's largest finds the largest.
_RADIX = 4


def activation_word_layout(lanes: int) -> data.StructLayout:
    """So many FP16 activations of a row. With `last` they are the row's last."""
    return data.StructLayout({"values": data.ArrayLayout(FP16_BITS, lanes), "last": 1})


def block_word_layout(lanes: int) -> data.StructLayout:
    """So many block activations and their exponent. With `last` they are their block's last."""
    return data.StructLayout(
        {
            "activations": data.ArrayLayout(BLOCK_ACTIVATION, lanes),
            "exponent": _EXPONENT_BITS,
            "last": 1,
        }
    )


class BlockQuantizer(wiring.Component):
    """Quantise activations to sign, 7-bit magnitude and an exponent that a block shares.

    Formula: `speq.model.arith.quantize_activations`, bit for bit: the exponent is the largest of
    the block's exponent fields and at least 1, a magnitude is the activation in units of
    ``2^(exponent - 15 - 6)``, rounded to nearest even and at most 127; a zero is never negative. A
    block with an infinity or a NaN has the exponent 31 and only zeros.

    A block is `block` activations of a row, or what is left at the row's end. What the row's last
    word has behind its end must be zero.

    Flow control: both streams may stall in any cycle. A word in and a word out per cycle, without
    gaps between blocks; a block's first word is offered `latency` cycles after its last one was
    taken, if nothing stalls.

    Parameters
    ----------
    lanes : int
        Activations of a word: a power of two, 4 to 64.
    block : int
        Activations that share an exponent: a multiple of `lanes`.
    ahead : int
        Words that are taken behind a block even if none of it has been.

    Members
    -------
    activations : In(stream of activation_word_layout(lanes))
    blocks : Out(stream of block_word_layout(lanes))
    clear : In(1)
        Drop everything that has not been taken.

    Raises
    ------
    ValueError
        If `lanes` or `block` is not such a number.
    """

    def __init__(self, lanes: int, block: int, ahead: int = 0) -> None:
        check_power_of_two("lanes", lanes, 4, 64)
        if block < lanes or block % lanes:
            raise ValueError(f"block is {block!r}; allowed are multiples of lanes, {lanes}")
        self.lanes = lanes
        self.ahead = ahead
        self.words = block // lanes
        #: Cycles from taking a word to having its block's exponent.
        self._measuring = ((lanes - 1).bit_length() + 1) // 2 + 1
        self.latency = self._measuring + RamFifo.LATENCY + 2
        super().__init__(
            {
                "activations": In(stream.Signature(activation_word_layout(lanes))),
                "blocks": Out(stream.Signature(block_word_layout(lanes))),
                "clear": In(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        # Words wait for their block's exponent. There is room for a block, and for those that come
        # while its exponent is on the way.
        waiting = self.words + self.ahead + self._measuring + RamFifo.LATENCY + 1
        depth = 1 << (waiting - 1).bit_length()
        word_layout = activation_word_layout(self.lanes)
        m.submodules.buffer = buffer = RamFifo(word_layout.size, depth)
        # Each exponent belongs to a word in the buffer, so that this one is never the fuller.
        m.submodules.exponents = exponents = RamFifo(_EXPONENT_BITS, depth)

        taken = self.activations.payload
        place = Signal(range(max(2, self.words)))
        ends = taken.last | (place == self.words - 1)
        takes = self.activations.valid & self.activations.ready
        m.d.comb += [
            self.activations.ready.eq(buffer.write.ready),
            buffer.write.valid.eq(self.activations.valid),
            buffer.write.payload.eq(Cat(taken.values, ends)),
            buffer.clear.eq(self.clear),
            exponents.clear.eq(self.clear),
        ]
        with m.If(takes):
            m.d.sync += place.eq(Mux(ends, 0, place + 1))
        with m.If(self.clear):
            m.d.sync += place.eq(0)

        # The largest exponent of each word, by fours, then of the block.
        fields = [data.View(FP16, value).exponent for value in taken.values]
        valid, first, last = takes, place == 0, ends
        stage = 0
        while len(fields) > 1:
            stage += 1
            groups = (fields[i : i + _RADIX] for i in range(0, len(fields), _RADIX))
            largest = {f"largest_{i}": _largest(*group) for i, group in enumerate(groups)}
            first, last, *fields = pipeline_stage(m, stage, first=first, last=last, **largest)
            valid = self._valid(m, valid, f"valid_{stage}")
        (field,) = fields
        largest = Signal(_EXPONENT_BITS, reset_less=True)
        so_far = Mux(first, 1, largest)
        with m.If(valid):
            m.d.sync += largest.eq(_largest(so_far, field))
        m.d.comb += [
            exponents.write.valid.eq(self._valid(m, valid & last, "measured")),
            exponents.write.payload.eq(largest),
        ]

        # Stage 1 of quantising: magnitudes with a guard and a sticky bit behind them.
        word = data.View(word_layout, buffer.read.payload)
        exponent = exponents.read.payload
        offered = Signal()
        output = self.blocks
        moves = ~output.valid | output.ready
        takes_word = ~offered | moves
        m.d.comb += [
            buffer.read.ready.eq(exponents.read.valid & takes_word),
            exponents.read.ready.eq(buffer.read.valid & word.last & takes_word),
        ]
        finite = exponent != FP16_SPECIAL
        aligned = [Signal(BLOCK_MAGNITUDE_BITS + 2, reset_less=True) for _ in word.values]
        signs = Signal(self.lanes, reset_less=True)
        block_exponent = Signal(_EXPONENT_BITS, reset_less=True)
        block_last = Signal(reset_less=True)
        with m.If(takes_word):
            m.d.sync += [
                offered.eq(buffer.read.valid & exponents.read.valid),
                block_exponent.eq(exponent),
                block_last.eq(word.last),
            ]
            for value, target, sign in zip(word.values, aligned, signs, strict=True):
                number = data.View(FP16, value)
                placed = _placed(number, exponent)
                m.d.sync += [
                    target.eq(Mux(finite, placed, 0)),
                    sign.eq(number.negative),
                ]

        # Stage 2: round; 127 does not become 128.
        with m.If(moves):
            m.d.sync += [
                output.valid.eq(offered),
                output.payload.exponent.eq(block_exponent),
                output.payload.last.eq(block_last),
            ]
            for value, sign, result in zip(aligned, signs, output.payload.activations, strict=True):
                kept, guard, rest = value[2:], value[1], value[0]
                up = guard & (rest | kept[0]) & ~kept.all()
                magnitude = (kept + up)[:BLOCK_MAGNITUDE_BITS]
                m.d.sync += [
                    result.magnitude.eq(magnitude),
                    result.negative.eq(sign & (kept.any() | up)),
                ]
        with m.If(self.clear):
            m.d.sync += [offered.eq(0), output.valid.eq(0)]
        return m

    def _valid(self, m: Module, value: Value, name: str) -> Signal:
        """Whether a word is in the next stage."""
        following = Signal(name=name)
        m.d.sync += following.eq(value & ~self.clear)
        return following


def _largest(a: Value, b: Value, *others: Value) -> Value:
    """The largest of two or four exponent fields, all of which are compared at once."""
    first = Mux(a > b, a, b)
    if not others:
        return first
    c, d = others
    second_larger = Mux(a > b, Mux(c > d, c > a, d > a), Mux(c > d, c > b, d > b))
    return Mux(second_larger, Mux(c > d, c, d), first)


def _placed(number: data.View, exponent: Value) -> Value:
    """Magnitude, guard and sticky bit of a number in a block of that exponent."""
    distance = (exponent - effective_exponent(number))[:_EXPONENT_BITS]
    # From 8 places on, it is below half of the last one.
    value = shift_right_sticky(significand(number), distance[:3])
    kept = Cat(value[: _DROPPED - 1].any(), value[_DROPPED - 1 :])
    return Mux(distance[3:].any(), 0, kept)
