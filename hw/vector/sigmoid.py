# SPDX-License-Identifier: Apache-2.0
"""Exponential and sigmoid of FP32 numbers."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.ieee754 import FP32, FP32_BIAS, FP32_FRACTION, FP32_NAN, is_nan, significand
from speq.hw.common.logic import delayed, pipeline_stage
from speq.hw.vector.parabola import Parabola
from speq.model.function_tables import LOG2_E, LOG2_E_BITS, LOGARITHM_BITS, POWER, SIGMOID

_HALF = (FP32_FRACTION + 1) // 2
#: Bits above the fraction of the logarithm: e^-127.. is below FP32's normal numbers.
_HALVINGS_BITS = 8
_ONE = SIGMOID.value_bits  # the bit of 1 in a reciprocal
_PRODUCT_BITS = 24


class Sigmoid(wiring.Component):
    """e^-|x| and 1 / (1 + e^-x), to the bit of `speq.model.vector_ops`.

    Formula: ``exponential = vector_ops.exponential(x)``, ``sigmoid = vector_ops.sigmoid(x)``; the
    sigmoid of a NaN is 0x7fc00000, its exponential 0.

    Latency `EXPONENTIAL_LATENCY` and `LATENCY` cycles, a number per cycle, no flow control.

    Members
    -------
    x : In(32)
    exponential, sigmoid : Out(32)
    """

    EXPONENTIAL_LATENCY = 4 + Parabola.LATENCY
    LATENCY = 6 + 2 * Parabola.LATENCY

    def __init__(self) -> None:
        super().__init__({"x": In(32), "exponential": Out(32), "sigmoid": Out(32)})

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        m.submodules.power = power = Parabola([POWER])
        m.submodules.inverse = inverse = Parabola([SIGMOID])
        x = data.View(FP32, self.x)

        # Stages 1 and 2: |x| log2(e), by halves of the significand.
        whole = significand(x)
        low, high, exponent, negative, nan = pipeline_stage(
            m,
            1,
            low=whole[:_HALF] * LOG2_E,
            high=whole[_HALF:] * LOG2_E,
            exponent=x.exponent,
            negative=x.negative,
            nan=is_nan(x),
        )
        product = low + (high << _HALF)
        product, exponent, negative, nan = pipeline_stage(
            m, 2, product=product, exponent=exponent, negative=negative, nan=nan
        )

        # Stage 3: in fixed point. From 128 on, n is larger than any exponent; what is shifted out
        # at the other end counts nothing.
        largest = FP32_BIAS + 6  # exponent of numbers from 64 to below 128
        unit = LOG2_E_BITS - LOGARITHM_BITS + FP32_FRACTION  # of the product, if x is from 1 to 2
        bits = LOGARITHM_BITS + _HALVINGS_BITS
        window = product[unit - 6 :]
        distance = (largest - exponent)[:8]
        logarithm = Signal(bits)
        with m.If(exponent > largest):
            m.d.comb += logarithm.eq((1 << bits) - (1 << LOGARITHM_BITS))
        with m.Elif(distance < bits):
            m.d.comb += logarithm.eq(window >> distance[:5])
        logarithm, negative, nan = pipeline_stage(
            m, 3, logarithm=logarithm, negative=negative, nan=nan
        )

        # Stages 4 to 7: p = 2^-fraction.
        m.d.comb += power.fraction.eq(logarithm[:LOGARITHM_BITS])
        p = power.value
        n, negative, nan = (
            delayed(m, value, Parabola.LATENCY)
            for value in (logarithm[LOGARITHM_BITS:], negative, nan)
        )

        # Stage 8: the exponential; 1 + e^-|x| without the 1.
        one = p[POWER.value_bits]
        fraction = Cat(Const(0, FP32_FRACTION + 1 - POWER.value_bits), p[: POWER.value_bits - 1])
        scaled = _scaled(Mux(one, 0, fraction), FP32_BIAS - 1 + one, n)
        shift = n + (POWER.value_bits - LOGARITHM_BITS)
        beyond = shift > POWER.value_bits
        t, exponential, p, n, negative, nan = pipeline_stage(
            m,
            8,
            t=Mux(beyond, 0, p >> shift[:5])[: LOGARITHM_BITS + 1],
            exponential=scaled,
            p=p[POWER.value_bits - _ONE :],
            n=n,
            negative=negative,
            nan=nan,
        )
        m.d.comb += self.exponential.eq(exponential)

        # Stages 9 to 12: r = 1 / (1 + t), which is 1/2 if t is 1.
        m.d.comb += inverse.fraction.eq(t[:LOGARITHM_BITS])
        is_one, p, n, negative, nan = (
            delayed(m, value, Parabola.LATENCY) for value in (t[-1], p, n, negative, nan)
        )
        r = Mux(is_one, 1 << _ONE - 1, inverse.value)

        # Stage 13: times e^-|x| if x is negative, otherwise times 1.
        factor = Mux(negative, p, 1 << _ONE)
        product, n, nan = pipeline_stage(m, 13, product=r * factor, n=Mux(negative, n, 0), nan=nan)

        # Stage 14: of the product, from 1/4 to 1, the first 24 bits.
        top = 2 * _ONE
        exponent = FP32_BIAS - 2 + Mux(product[top], 2, product[top - 1])
        aligned = Mux(
            product[top],
            product[:top][-FP32_FRACTION:],
            Mux(
                product[top - 1],
                product[: top - 1][-FP32_FRACTION:],
                product[: top - 2][-FP32_FRACTION:],
            ),
        )
        (sigmoid,) = pipeline_stage(
            m, 14, sigmoid=Mux(nan, FP32_NAN, _scaled(aligned, exponent, n))
        )
        m.d.comb += self.sigmoid.eq(sigmoid)
        return m


def _scaled(fraction: Value, exponent: Value, halvings: Value) -> Value:
    """The FP32 number of a fraction and an exponent field, halved so often; 0 if it would be
    subnormal."""
    field = exponent - halvings
    return Mux(field > 0, Cat(fraction, field[:8]), 0)
