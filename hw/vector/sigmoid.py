# SPDX-License-Identifier: Apache-2.0
"""Exponential and sigmoid of FP32 numbers, in two units of which the second may be shared."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.ieee754 import FP32, FP32_BIAS, FP32_FRACTION, FP32_NAN, is_nan
from speq.hw.common.logic import delayed, pipeline_stage
from speq.hw.vector.function_unit import FunctionUnit
from speq.model.function_tables import (
    LOG2_E,
    LOG2_E_BITS,
    LOGARITHM_BITS,
    LOGARITHM_SIGNIFICAND,
    POWER,
    SIGMOID,
)

#: Bits above the fraction of the logarithm: e^-127.. is below FP32's normal numbers.
_HALVINGS_BITS = 8
_PRODUCT_BITS = POWER.value_bits + SIGMOID.value_bits + 1


#: What of e^-|x| the sigmoid of x is computed from: t = e^-|x| without its last bits, and a factor
#: of 1 / (1 + t) that is halved `halvings` times.
PART = data.StructLayout(
    {
        "t": LOGARITHM_BITS,
        "factor": POWER.value_bits + 1,
        "halvings": _HALVINGS_BITS,
        "nan": 1,
    }
)


class Exponential(wiring.Component):
    """e^-|x|, to the bit of `speq.model.vector_ops`, and what a `Sigmoid` needs of it.

    Formula: ``exponential = vector_ops.exponential(x)``; that of a NaN is 0.

    Latency `LATENCY` cycles, a number per cycle, no flow control.

    Members
    -------
    x : In(32)
    exponential : Out(32)
    part : Out(PART)
    """

    LATENCY = 6

    def __init__(self) -> None:
        super().__init__({"x": In(32), "exponential": Out(32), "part": Out(PART)})

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        m.submodules.power = power = FunctionUnit([POWER])
        x = data.View(FP32, self.x)

        # Stage 1: |x| log2(e). Subnormal numbers, whose hidden bit is wrong here, are too small to
        # leave anything of it.
        product, exponent, negative, nan = pipeline_stage(
            m,
            1,
            product=Cat(x.fraction, Const(1, 1))[-LOGARITHM_SIGNIFICAND:] * LOG2_E,
            exponent=x.exponent,
            negative=x.negative,
            nan=is_nan(x),
        )

        # Stage 2: in fixed point. From 128 on, n is larger than any exponent; what is shifted out
        # at the other end counts nothing.
        largest = FP32_BIAS + 6  # exponent field of numbers from 64 to below 128
        unit = LOG2_E_BITS - LOGARITHM_BITS + LOGARITHM_SIGNIFICAND - 1  # if x is from 1 to 2
        window = product[unit - 6 :]
        distance = (largest - exponent)[:8]
        logarithm = Signal(LOGARITHM_BITS + _HALVINGS_BITS)
        with m.If(exponent > largest):
            m.d.comb += logarithm.eq(((1 << _HALVINGS_BITS) - 1) << LOGARITHM_BITS)
        with m.Elif(distance < len(logarithm)):
            m.d.comb += logarithm.eq(window >> distance[:5])
        logarithm, negative, nan = pipeline_stage(
            m, 2, logarithm=logarithm, negative=negative, nan=nan
        )

        # Stages 3 to 5: p = 2^-fraction.
        m.d.comb += power.fraction.eq(logarithm[:LOGARITHM_BITS])
        p = power.value
        n, negative, nan = (
            delayed(m, value, power.latency)
            for value in (logarithm[LOGARITHM_BITS:], negative, nan)
        )

        # Stage 6: the exponential; 1 + e^-|x| without the 1.
        one = p[-1]
        fraction = Cat(Const(0, FP32_FRACTION - POWER.value_bits + 1), p[: POWER.value_bits - 1])
        # The sigmoid is r = 1 / (1 + t) times e^-|x| if x is negative, otherwise times 1. If t is
        # 1, whose fraction is that of 0, r is twice as large as it should be.
        halves = one & (n == 0)
        factor = Mux(halves, 1 << POWER.value_bits - 1, Mux(negative, p, 1 << POWER.value_bits))
        shift = n + (POWER.value_bits - LOGARITHM_BITS)
        t, exponential, factor, n, nan = pipeline_stage(
            m,
            6,
            t=Mux(shift < len(p), p >> shift[:5], 0)[:LOGARITHM_BITS],
            exponential=_scaled(Mux(one, 0, fraction), FP32_BIAS - 1 + one, n),
            factor=factor[: len(p)],
            n=Mux(negative, n, 0),
            nan=nan,
        )
        m.d.comb += [
            self.exponential.eq(exponential),
            self.part.t.eq(t),
            self.part.factor.eq(factor),
            self.part.halvings.eq(n),
            self.part.nan.eq(nan),
        ]
        return m


class Sigmoid(wiring.Component):
    """1 / (1 + e^-x), to the bit of `speq.model.vector_ops`, from what an `Exponential` gives.

    Formula: ``sigmoid = vector_ops.sigmoid(x)``; that of a NaN is 0x7fc00000.

    Latency `LATENCY` cycles, a number per cycle, no flow control.

    Members
    -------
    part : In(PART)
    sigmoid : Out(32)
    """

    LATENCY = 7

    def __init__(self) -> None:
        super().__init__({"part": In(PART), "sigmoid": Out(32)})

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        m.submodules.inverse = inverse = FunctionUnit([SIGMOID])
        part = self.part

        # Stages 1 to 3: r = 1 / (1 + t).
        m.d.comb += inverse.fraction.eq(part.t)
        factor, n, nan = (
            delayed(m, value, inverse.latency) for value in (part.factor, part.halvings, part.nan)
        )

        # Stages 4 and 5: the product, first in two parts.
        half = len(factor) // 2
        low, high, n, nan = pipeline_stage(
            m,
            4,
            low=inverse.value * factor[:half],
            high=inverse.value * factor[half:],
            n=n,
            nan=nan,
        )
        product = (low + (high << half))[:_PRODUCT_BITS]
        product, n, nan = pipeline_stage(m, 5, product=product, n=n, nan=nan)

        # Stage 6: the product is from 1/4 to 1; its first 24 bits.
        tops = [Cat(product)[: _PRODUCT_BITS - i] for i in range(3)]
        fractions = [top[-1 - FP32_FRACTION : -1] for top in tops]
        whole, half = (top[-1] for top in tops[:2])
        fraction, exponent, n, nan = pipeline_stage(
            m,
            6,
            fraction=Mux(whole, fractions[0], Mux(half, fractions[1], fractions[2])),
            exponent=FP32_BIAS - 2 + Mux(whole, 2, half),
            n=n,
            nan=nan,
        )

        # Stage 7: halved.
        (sigmoid,) = pipeline_stage(
            m, 7, sigmoid=Mux(nan, FP32_NAN, _scaled(fraction, exponent, n))
        )
        m.d.comb += self.sigmoid.eq(sigmoid)
        return m


def _scaled(fraction: Value, exponent: Value, halvings: Value) -> Value:
    """The FP32 number of a fraction and an exponent field, halved so often; 0 if it would be
    subnormal."""
    return Mux(halvings < exponent, Cat(fraction, (exponent - halvings)[:8]), 0)
