# SPDX-License-Identifier: Apache-2.0
"""FP16 to FP32, exactly."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.ieee754 import (
    FP16,
    FP16_BIAS,
    FP16_FRACTION,
    FP32_BIAS,
    FP32_FRACTION,
    FP32_NAN,
    FP32_SPECIAL,
    is_nan,
)
from speq.hw.common.logic import leading_zeros


class Fp16ToFp32(wiring.Component):
    """The FP32 number that an FP16 number is.

    Formula: ``fp32 = fp16``, exact; subnormal numbers become normal ones. Every NaN gives the
    quiet NaN 0x7fc00000.

    Combinational.

    Members
    -------
    fp16 : In(16)
    fp32 : Out(32)
    """

    LATENCY = 0

    def __init__(self) -> None:
        super().__init__({"fp16": In(16), "fp32": Out(32)})

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        number = data.View(FP16, self.fp16)
        subnormal = number.exponent == 0
        zeros = leading_zeros(number.fraction)
        # The highest one of a subnormal number becomes the hidden bit.
        fraction = (number.fraction << (zeros + 1))[:FP16_FRACTION]
        rebias = FP32_BIAS - FP16_BIAS
        exponent = Mux(subnormal, rebias - zeros, number.exponent + rebias)[:8]
        special = number.exponent.all()
        zero = subnormal & ~number.fraction.any()
        magnitude = Cat(
            Const(0, FP32_FRACTION - FP16_FRACTION),
            Mux(subnormal, fraction, number.fraction),
            Mux(special, FP32_SPECIAL, Mux(zero, 0, exponent))[:8],
        )
        finite = Cat(magnitude, number.negative)
        m.d.comb += self.fp32.eq(Mux(is_nan(number), FP32_NAN, finite))
        return m
