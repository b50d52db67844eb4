# SPDX-License-Identifier: Apache-2.0
"""FP32 to FP16, rounded once."""

from __future__ import annotations

from amaranth.hdl import Elaboratable, Module, Mux
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.ieee754 import FP16_NAN, FP32, fp16_rounded, fp16_significand, is_nan
from speq.hw.common.logic import pipeline_stage


class Fp32ToFp16(wiring.Component):
    """An FP32 number as FP16, rounded to nearest even.

    Formula: ``fp16 = fp16(fp32)``. What is too large becomes an infinity, what is small subnormal
    or zero. Every NaN gives the quiet NaN 0x7e00.

    Latency `LATENCY` cycles, a number per cycle, no flow control.

    Members
    -------
    fp32 : In(32)
    fp16 : Out(16)
    """

    LATENCY = 2

    def __init__(self) -> None:
        super().__init__({"fp32": In(32), "fp16": Out(16)})

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        number = data.View(FP32, self.fp32)
        field, significand = fp16_significand(m, self.fp32)
        field, significand, negative, nan = pipeline_stage(
            m,
            1,
            field=field,
            significand=significand,
            negative=number.negative,
            nan=is_nan(number),
        )
        rounded = fp16_rounded(m, negative, field, significand)
        (fp16,) = pipeline_stage(m, 2, fp16=Mux(nan, FP16_NAN, rounded))
        m.d.comb += self.fp16.eq(fp16)
        return m
