# SPDX-License-Identifier: Apache-2.0
"""Rounding of an exact sum to FP32 and FP16."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.ieee754 import (
    FP16_NAN,
    FP32_BIAS,
    FP32_FRACTION,
    FP32_NAN,
    fp16_rounded,
    fp16_significand,
)
from speq.hw.engine_config import EngineConfig


class Rounder(wiring.Component):
    """Exact sum to FP32, or on to FP16, each by one rounding to nearest even.

    Formula: ``result = fp32(sum * 2^accumulator_unit_exponent)``, and with `half` ``result =
    fp16(fp32(...))`` zero-extended to 32 bits. A sum of zero gives +0. FP32 can neither overflow
    nor become subnormal here; FP16 does both as IEEE 754 says. `nan` gives the quiet NaN
    0x7fc00000 (FP16: 0x7e00) whatever the sum.

    Latency `LATENCY` cycles, one sum per cycle, no flow control. Sits once per column.

    Parameters
    ----------
    config : EngineConfig

    Members
    -------
    sum : In(accumulator_bits)
        Two's complement.
    nan, half : In(1)
        With the sum.
    result : Out(32)
    """

    LATENCY = 4

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        super().__init__(
            {
                "sum": In(config.accumulator_bits),
                "nan": In(1),
                "half": In(1),
                "result": Out(32),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        bits = self.config.accumulator_bits

        # Stage 1: take the sum from the column's bus.
        total = _registers(m, self.sum, 1)
        flags = _registers(m, Cat(self.nan, self.half), self.LATENCY - 1)

        # Stage 2: move the leading one to the top. The magnitude of a negative sum x is ~x + 1;
        # the 1 is left to the rounding, so that no adder as wide as the sum is needed, and ones
        # follow ~x from the right until then.
        negative = total[-1]
        zeros, aligned = _normalize(m, total ^ negative.replicate(bits), negative)
        exponent = Signal(8, reset_less=True)
        significand = Signal(FP32_FRACTION + 1, reset_less=True)
        up = Signal(reset_less=True)
        negative_2 = Signal(reset_less=True)
        highest = FP32_BIAS + self.config.accumulator_unit_exponent + bits - 1
        split = bits - len(significand)
        kept, guard, rest = aligned[split:], aligned[split - 1], aligned[: split - 1]
        odd = kept[0]
        # Behind `kept` stand guard and rest; for a negative sum 1 is added there. If rest is all
        # ones, that gives a tie (guard 0) or carries into `kept` and leaves nothing (guard 1).
        up_if_negative = Mux(rest.all(), guard | odd, guard)
        up_if_positive = guard & (rest.any() | odd)
        m.d.sync += [
            negative_2.eq(negative),
            exponent.eq(highest - zeros),
            significand.eq(kept),
            up.eq(Mux(negative, up_if_negative, up_if_positive)),
        ]

        # Stage 3: round to FP32. A carry out of the fraction moves on into the exponent.
        fp32 = Signal(32, reset_less=True)
        rounded = Signal(31)
        zero = ~significand[-1]
        m.d.comb += rounded.eq(Cat(significand[:-1], exponent) + up)
        m.d.sync += fp32.eq(Mux(zero, 0, Cat(rounded, negative_2)))

        # Stage 4: on to FP16 if asked.
        nan, half = flags
        fp16 = Mux(nan, FP16_NAN, fp16_rounded(m, fp32[31], *fp16_significand(m, fp32)))
        result = Signal(32, reset_less=True)
        m.d.sync += result.eq(Mux(half, fp16, Mux(nan, FP32_NAN, fp32)))
        m.d.comb += self.result.eq(result)
        return m


def _registers(m: Module, value: Value, count: int) -> Value:
    """`value` delayed by `count` cycles."""
    for _ in range(count):
        register = Signal(len(value), reset_less=True)
        m.d.sync += register.eq(value)
        value = register
    return value


def _normalize(m: Module, value: Value, fill: Value) -> tuple[Value, Value]:
    """Leading zeros of `value`, and `value` shifted left by them with `fill` coming in."""
    count = []
    for stage in reversed(range((len(value) - 1).bit_length())):
        amount = 1 << stage
        empty = Signal(name=f"empty_{amount}")
        shifted = Signal(len(value), name=f"shifted_{amount}")
        m.d.comb += [
            empty.eq(~value[-amount:].any()),
            shifted.eq(Mux(empty, Cat(fill.replicate(amount), value), value)),
        ]
        value = shifted
        count.append(empty)
    return Cat(*reversed(count)), value
