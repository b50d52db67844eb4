# SPDX-License-Identifier: Apache-2.0
"""The larger of two FP32 numbers."""

from __future__ import annotations

from amaranth.hdl import Elaboratable, Module, Mux
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.ieee754 import FP32, is_infinite, is_nan
from speq.hw.common.logic import pipeline_stage


class Fp32Maximum(wiring.Component):
    """The larger of two FP32 numbers.

    Formula: ``maximum = b if b > a else a``. The two zeros are equal. A NaN counts as minus
    infinity and ties with it, as in the ranking of logits.

    Latency `LATENCY` cycle, a pair per cycle, no flow control.

    Members
    -------
    a, b : In(32)
    maximum : Out(32)
    """

    LATENCY = 1

    def __init__(self) -> None:
        super().__init__({"a": In(32), "b": In(32), "maximum": Out(32)})

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        a, b = data.View(FP32, self.a), data.View(FP32, self.b)
        a_magnitude, b_magnitude = self.a[:31], self.b[:31]
        both_zero = ~(a_magnitude.any() | b_magnitude.any())
        farther, nearer = a_magnitude < b_magnitude, b_magnitude < a_magnitude
        larger = Mux(
            a.negative,
            Mux(b.negative, nearer, ~both_zero),
            ~b.negative & farther,
        )
        # Only minus infinity is not larger than what a NaN counts as.
        least = b.negative & is_infinite(b)
        larger = ~is_nan(b) & Mux(is_nan(a), ~least, larger)
        (maximum,) = pipeline_stage(m, 1, maximum=Mux(larger, self.b, self.a))
        m.d.comb += self.maximum.eq(maximum)
        return m
