# SPDX-License-Identifier: Apache-2.0
"""Reciprocals and reciprocal square roots of FP32 numbers."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.ieee754 import FP32, FP32_BIAS, FP32_NAN, is_infinite, is_nan
from speq.hw.common.logic import delayed, incremented, pipeline_stage
from speq.hw.vector.function_unit import FunctionUnit
from speq.model.function_tables import INVERSE, ROOTS

_EXTRA = INVERSE.value_bits - 24  # bits that are rounded away


class Reciprocal(wiring.Component):
    """1 / x and 1 / sqrt(x), to the bit of `speq.model.vector_ops`.

    Formula: ``result = vector_ops.reciprocal(x)``, with `root` ``vector_ops.rsqrt(x)``, for x as
    there; the result of a NaN is 0x7fc00000.

    Latency `LATENCY` cycles, a number per cycle, no flow control.

    Members
    -------
    x : In(32)
    root : In(1)
    result : Out(32)
    """

    LATENCY = 9

    def __init__(self) -> None:
        super().__init__({"x": In(32), "root": In(1), "result": Out(32)})

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        m.submodules.function = function = FunctionUnit([INVERSE, *ROOTS])
        x = data.View(FP32, self.x)
        exponent = x.exponent - FP32_BIAS
        odd = exponent[0]
        m.d.comb += [
            function.fraction.eq(x.fraction),
            function.table.eq(Mux(self.root, Mux(odd, 2, 1), 0)),
        ]
        # The exponent field of results just below a power of two.
        field = FP32_BIAS - 1 - Mux(self.root, exponent >> 1, exponent)
        field, nan, infinite = (
            delayed(m, value, function.latency + 1)
            for value in (field[:8], is_nan(x), is_infinite(x))
        )

        # Rounded to 24 bits, halves up; what is 1 has the next exponent.
        value = function.value
        (rounded,) = pipeline_stage(
            m,
            self.LATENCY - 1,
            rounded=incremented(value[_EXTRA:], value[_EXTRA - 1]),
        )
        one = rounded[-1]
        finite = Cat(Mux(one, 0, rounded[:-2]), (field + one)[:8])
        (result,) = pipeline_stage(
            m, self.LATENCY, result=Mux(nan, FP32_NAN, Mux(infinite, 0, finite))
        )
        m.d.comb += self.result.eq(result)
        return m
