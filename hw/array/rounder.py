# SPDX-License-Identifier: Apache-2.0
"""Rounding of an exact sum to FP32 and FP16."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.ieee754 import (
    FP16_BIAS,
    FP16_FRACTION,
    FP16_NAN,
    FP32_BIAS,
    FP32_FRACTION,
    FP32_NAN,
)
from speq.hw.common.logic import delayed
from speq.hw.engine_config import EngineConfig

_DROPPED = FP32_FRACTION - FP16_FRACTION
#: FP32 exponent field of FP16's smallest normal exponent (field 1), less one.
_EXPONENT_REBIAS = FP32_BIAS - FP16_BIAS


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
        total = delayed(m, self.sum, 1)
        flags = delayed(m, Cat(self.nan, self.half), self.LATENCY - 1)

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
        fp16 = Mux(nan, FP16_NAN, _fp32_to_fp16(m, fp32))
        result = Signal(32, reset_less=True)
        m.d.sync += result.eq(Mux(half, fp16, Mux(nan, FP32_NAN, fp32)))
        m.d.comb += self.result.eq(result)
        return m


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


def _fp32_to_fp16(m: Module, fp32: Value) -> Value:
    """Round a finite FP32 value that is not subnormal to FP16."""
    sign, exponent, fraction = fp32[31], fp32[23:31], fp32[:23]
    # Below FP16's normal range the significand is shifted right until its exponent fits.
    subnormal = exponent <= _EXPONENT_REBIAS
    distance = Signal(range(FP16_FRACTION + 3))
    excess = _EXPONENT_REBIAS + 1 - exponent
    largest = FP16_FRACTION + 2  # everything is behind the rounding bit
    m.d.comb += distance.eq(Mux(subnormal, Mux(excess > largest, largest, excess), 0))
    significand = Cat(Const(0, largest), fraction, exponent != 0)
    shifted = Signal(len(significand))
    m.d.comb += shifted.eq(significand >> distance)
    kept = shifted[largest + _DROPPED :]
    guard = shifted[largest + _DROPPED - 1]
    sticky = shifted[: largest + _DROPPED - 1].any()
    up = guard & (sticky | kept[0])
    # Normal: the hidden bit in `kept` adds the last 1 to the exponent.
    field = Mux(subnormal, 0, exponent - _EXPONENT_REBIAS - 1)[:8]
    rounded = Signal(FP16_FRACTION + 8)
    m.d.comb += rounded.eq((field << FP16_FRACTION) + kept + up)
    overflow = rounded >= 31 << FP16_FRACTION
    return Cat(Mux(overflow, 31 << FP16_FRACTION, rounded)[:15], sign)
