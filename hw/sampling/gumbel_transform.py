# SPDX-License-Identifier: Apache-2.0
"""From random bits to Gumbel noise."""

from __future__ import annotations

from collections.abc import Sequence

from amaranth.hdl import Array, Cat, Const, Elaboratable, Module, Mux, Signal, Value, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.ieee754 import FP32_BIAS, FP32_FRACTION
from speq.hw.common.logic import leading_zeros, pipeline_stage
from speq.model.noise_format import (
    FRACTION_BITS,
    LN_2,
    NOISE_FRACTION_BITS,
    PLACE_BITS,
    SEGMENT_BITS,
    Table,
    correction_table,
    logarithm_table,
)

_RANDOM_BITS = 64
_ARGUMENT_BITS = SEGMENT_BITS + PLACE_BITS
#: Exponential variables are from ln 2 to below 46.
_LEAST_PLACE, _MOST_PLACE = FRACTION_BITS - 1, FRACTION_BITS + 5
#: Noise is between -4 and 46.
_SUM = signed(FRACTION_BITS + 7)
_NOISE_BITS = NOISE_FRACTION_BITS + 6
_DROPPED = FRACTION_BITS - NOISE_FRACTION_BITS


class GumbelTransform(wiring.Component):
    """Gumbel noise, FP32, of 64 random bits: `speq.model.gumbel.transform`, whose names it has.

    Latency `LATENCY` cycles, a value per cycle, no flow control.

    Members
    -------
    bits : In(64)
    noise : Out(32)
    """

    LATENCY = 22

    def __init__(self) -> None:
        super().__init__({"bits": In(_RANDOM_BITS), "noise": Out(32)})

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()

        # Stages 1 to 5: x with its leading one at the top, and what the tables need behind it.
        is_large = self.bits[-1]
        v = self.bits[:-1] ^ is_large.replicate(_RANDOM_BITS - 1)
        v, is_large = pipeline_stage(m, 1, v=v, is_large=is_large)
        x, zeros = Cat(Const(1, 1), v), Const(0, 0)
        doubled = x[-_ARGUMENT_BITS:]
        for stage, shifts in enumerate(((32,), (16,), (8, 4), (2, 1)), 2):
            for shift in shifts:
                moves = ~x[-shift:].any()
                x, zeros = Mux(moves, x << shift, x)[: len(x)], Cat(moves, zeros)
            x, zeros, doubled, is_large = pipeline_stage(
                m,
                stage,
                # The later shifts move it by less than the last one of this stage.
                x=x[-_ARGUMENT_BITS - shifts[-1] :],
                zeros=zeros,
                doubled=doubled,
                is_large=is_large,
            )

        # Stages 6 to 11: y = (65 - n) ln 2 - ln m.
        exponent_parts = [(count + 2) * LN_2 for count in range(_RANDOM_BITS)]
        # A table is faster than a product.
        base = _looked_up(m, exponent_parts, _MOST_PLACE + 1, zeros)
        y = _difference(m, 6, base, logarithm_table(), x[:_ARGUMENT_BITS])
        for stage in range(6, 12):
            doubled, is_large = pipeline_stage(m, stage, doubled=doubled, is_large=is_large)

        # Stage 12: what G is the difference of.
        exponent_part, fraction = Signal(_SUM), Signal(_ARGUMENT_BITS)
        for place in range(_LEAST_PLACE, _MOST_PLACE + 1):  # the highest one counts
            with m.If(y[place]):
                m.d.comb += [
                    exponent_part.eq((FRACTION_BITS - place) * LN_2),
                    fraction.eq(y[place - _ARGUMENT_BITS : place]),
                ]
        base, argument = pipeline_stage(
            m,
            12,
            base=Mux(is_large, exponent_part, y),
            argument=Mux(is_large, fraction, Cat(doubled, Const(1, 1))),
        )

        # Stages 13 to 18: G.
        (base,) = pipeline_stage(m, 13, base=base)
        tables = logarithm_table() + correction_table()
        g = _difference(m, 13, base, tables, argument)

        # Stages 19 to 22: rounded, its magnitude, and this as FP32.
        (noise,) = pipeline_stage(m, 19, noise=(g + (1 << _DROPPED - 1)) >> _DROPPED)
        negative = noise[-1]
        magnitude, negative = pipeline_stage(
            m, 20, magnitude=Mux(negative, -noise, noise)[:_NOISE_BITS], negative=negative
        )
        magnitude, zeros, negative = pipeline_stage(
            m, 21, magnitude=magnitude, zeros=leading_zeros(magnitude), negative=negative
        )
        exponent = FP32_BIAS + FP32_FRACTION - NOISE_FRACTION_BITS - zeros
        fraction = (magnitude << zeros)[:FP32_FRACTION]
        (noise,) = pipeline_stage(
            m, 22, fp32=Mux(magnitude.any(), Cat(fraction, exponent[:8], negative), 0)
        )
        m.d.comb += self.noise.eq(noise)
        return m


def _difference(m: Module, stage: int, base: Value, table: Table, argument: Value) -> Value:
    """`base`, which comes a stage later, less the polynomial of the argument's part at its place in
    it, six stages later."""
    segment, place = argument[PLACE_BITS:], argument[:PLACE_BITS]
    widths = (FRACTION_BITS, 18, 12)
    words = [
        c0 | c1 << widths[0] | (c2 & (1 << widths[2]) - 1) << sum(widths[:2])
        for c0, c1, c2 in table
    ]
    word = _looked_up(m, words, sum(widths), segment)
    (place,) = pipeline_stage(m, stage, place=place)
    # An FPGA's block RAM gives its word late in the cycle.
    c0, c1, c2, place, base = pipeline_stage(
        m,
        stage + 1,
        c0=word[: widths[0]],
        c1=word[widths[0] :][: widths[1]],
        c2=word[-widths[2] :].as_signed(),
        place=place,
        base=base,
    )
    square, c1, place, base = pipeline_stage(
        m, stage + 2, square=c2 * place, c1=c1, place=place, base=base - c0
    )
    slope, place, base = pipeline_stage(
        m, stage + 3, slope=(c1 + (square >> PLACE_BITS))[:18], place=place, base=base
    )
    linear, base = pipeline_stage(m, stage + 4, linear=slope * place, base=base)
    (difference,) = pipeline_stage(
        m, stage + 5, difference=(base - (linear >> PLACE_BITS))[: len(Const(0, _SUM))].as_signed()
    )
    return difference


def _looked_up(m: Module, values: Sequence[int], width: int, index: Value) -> Value:
    """The value at an index in the next cycle, `width` bits. Bits that are the same in all of them
    are not in the table: Yosys loses the driver of a ROM of which not all bits are registered."""
    differs = [bit for bit in range(width) if len({value >> bit & 1 for value in values}) > 1]
    table = Array(
        Const(sum((value >> bit & 1) << i for i, bit in enumerate(differs)), len(differs))
        for value in values
    )
    word = Signal(len(differs), reset_less=True)
    m.d.sync += word.eq(table[index])
    varying = dict(zip(differs, word, strict=True))
    return Cat(varying.get(bit, Const(values[0] >> bit & 1, 1)) for bit in range(width))
