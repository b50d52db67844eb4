# SPDX-License-Identifier: Apache-2.0
"""The larger of two FP32 numbers."""

from __future__ import annotations

from amaranth.hdl import Elaboratable, Module, Mux
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.ieee754 import order_key
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
        larger = order_key(self.b) > order_key(self.a)
        (maximum,) = pipeline_stage(m, 1, maximum=Mux(larger, self.b, self.a))
        m.d.comb += self.maximum.eq(maximum)
        return m
