# SPDX-License-Identifier: Apache-2.0
"""The exponent-remap unit: stored words back to FP16 weights."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from speq.hw.engine_config import FP16_BITS, EngineConfig
from speq.model.number_format import BASE_BITS, remap_table, smallest_owned


class ExponentRemap(wiring.Component):
    """Decoder of one column's weight words. Sits once per column, in front of the array.

    Formula, for a word {sign, q, r, m[8:0]}: ``fp16 = {sign, base - t, half, m[8:0]}`` with (t,
    half) the half-exponent that `remap_table` maps to (q, r): a 64-entry table and one 5-bit
    subtraction (modulo 32). Where base is larger than `smallest_owned`, zero and the power of two
    with t = `smallest_owned` have changed places.

    In draft mode a word is four draft codes, which the PEs take as they are. Purely combinational:
    latency 0, no flow control.

    Parameters
    ----------
    config : EngineConfig

    Members
    -------
    word : In(16)
    base : In(5)
        Base exponent of the word's group.
    fp16 : Out(16)
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        super().__init__({"word": In(FP16_BITS), "base": In(BASE_BITS), "fp16": Out(FP16_BITS)})

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
        return m
