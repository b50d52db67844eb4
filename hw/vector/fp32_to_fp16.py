# SPDX-License-Identifier: Apache-2.0
"""FP32 to FP16, rounded once."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.ieee754 import (
    FP16_BIAS,
    FP16_FRACTION,
    FP16_INFINITY,
    FP16_NAN,
    FP16_SPECIAL,
    FP32,
    FP32_BIAS,
    FP32_FRACTION,
    is_nan,
    significand,
)
from speq.hw.common.logic import incremented, pipeline_stage, shift_right_sticky

_REBIAS = FP32_BIAS - FP16_BIAS
_DROPPED = FP32_FRACTION - FP16_FRACTION


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

        # Stage 1: below FP16's normal range the significand is shifted right until its exponent
        # fits. From 16 places on, all of it is far behind the rounding bit.
        normal = number.exponent > _REBIAS
        far = number.exponent <= _REBIAS + 1 - 16
        distance = (_REBIAS + 1 - number.exponent)[:4] & (~normal).replicate(4)
        whole = significand(number)
        value, exponent, negative, nan, infinite = pipeline_stage(
            m,
            1,
            value=Mux(far, whole.any(), shift_right_sticky(whole, distance)),
            # Of a subnormal number it may become 1 by rounding, like every carry of a fraction.
            exponent=Mux(normal, number.exponent - _REBIAS, 0)[:5],
            negative=number.negative,
            nan=is_nan(number),
            infinite=number.exponent >= _REBIAS + FP16_SPECIAL,
        )

        # Stage 2: round. A carry out of the fraction moves on into the exponent, up to infinity.
        fraction, guard, rest = value[_DROPPED:-1], value[_DROPPED - 1], value[: _DROPPED - 1]
        up = guard & (rest.any() | fraction[0])
        rounded = incremented(Cat(fraction, exponent), up)
        magnitude = Mux(infinite, FP16_INFINITY, rounded)[:15]
        (fp16,) = pipeline_stage(m, 2, fp16=Mux(nan, FP16_NAN, Cat(magnitude, negative)))
        m.d.comb += self.fp16.eq(fp16)
        return m
