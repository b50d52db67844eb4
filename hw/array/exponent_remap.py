# SPDX-License-Identifier: Apache-2.0
"""The exponent-remap unit: stored words back to FP16 weights, or to draft levels."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.engine_config import DRAFT_LANES, FP16_BITS, LANE_BITS, EngineConfig
from speq.model.number_format import BASE_BITS, draft_levels, remap_table, smallest_owned

_NIBBLE_BITS = FP16_BITS // DRAFT_LANES


class ExponentRemap(wiring.Component):
    """Decoder of one column's weight words. Sits once per column, in front of the array.

    Formula:

    - verify, word = {sign, q, r, m[8:0]}: ``fp16 = {sign, base - t, half, m[8:0]}`` with (t,
      half) the half-exponent that `remap_table` maps to (q, r): a 64-entry table and one 5-bit
      subtraction (modulo 32). Where base is larger than `smallest_owned`, zero and the power of two
      with t = `smallest_owned` have changed places;
    - draft, word = four draft codes, the first in the low bits: ``levels[i]`` is the sign and the
      level of code i from `draft_levels`.

    Both are computed from every word; the array takes the one that its mode asks for. Purely
    combinational: latency 0, no flow control.

    Parameters
    ----------
    config : EngineConfig

    Members
    -------
    word : In(16)
    base : In(5)
        Base exponent of the word's group.
    fp16 : Out(16)
    levels : Out(ArrayLayout of {significand: 3, shift, negative: 1}, 4)
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        level = data.StructLayout(
            {"significand": LANE_BITS, "shift": config.level_shift_bits, "negative": 1}
        )
        super().__init__(
            {
                "word": In(FP16_BITS),
                "base": In(BASE_BITS),
                "fp16": Out(FP16_BITS),
                "levels": Out(data.ArrayLayout(level, DRAFT_LANES)),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        sign, code, mantissa = self.word[15], self.word[9:15], self.word[:9]
        half = Signal()
        offset = Signal(BASE_BITS)  # t, how far the weight's exponent is below the base
        exponent = (self.base - offset)[:BASE_BITS]
        owned = smallest_owned(self.config.format.split)
        is_power = Signal()  # of two: half and mantissa are 0
        swapped = Signal(BASE_BITS)
        m.d.comb += [
            is_power.eq(Cat(mantissa, half) == 0),
            swapped.eq(exponent),
            self.fp16.eq(Cat(mantissa, half, swapped, sign)),
        ]
        with m.If(is_power & (self.base > owned)):
            with m.If(offset == owned):
                m.d.comb += swapped.eq(0)
            with m.Elif(exponent == 0):
                m.d.comb += swapped.eq(self.base - owned)
        with m.Switch(code):
            for half_exponent, stored in enumerate(remap_table(self.config.format.split)):
                with m.Case(stored):
                    m.d.comb += Cat(half, offset).eq(half_exponent)
        for i, level in enumerate(self.levels):
            nibble = self.word.word_select(i, _NIBBLE_BITS)
            m.d.comb += level.negative.eq(nibble[3])
            with m.Switch(nibble[:3]):
                for q, entry in enumerate(draft_levels(self.config.format)):
                    with m.Case(q):
                        m.d.comb += Cat(level.significand, level.shift).eq(
                            entry.significand | entry.shift << LANE_BITS
                        )
        return m
