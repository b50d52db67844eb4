# SPDX-License-Identifier: Apache-2.0
"""Rounding of an exact sum to FP32 and FP16."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.ieee754 import (
    FP16_BIAS,
    FP16_FRACTION,
    FP16_INFINITY,
    FP16_NAN,
    FP16_SPECIAL,
    FP32_BIAS,
    FP32_FRACTION,
    FP32_NAN,
)
from speq.hw.common.logic import any_of, delayed, pipeline_stage, shift_right_sticky
from speq.hw.engine_config import EngineConfig

_DROPPED = FP32_FRACTION - FP16_FRACTION
#: FP32 exponent field of FP16's smallest normal exponent (field 1), less one.
_REBIAS = FP32_BIAS - FP16_BIAS
#: The leading one is moved to the top by a multiple of so many places, and then by fewer.
_GROUP = 8
#: Groups from the leading one's down in which bits of the significand can be.
_GROUPS = 4
_WINDOW = _GROUP * _GROUPS


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

    LATENCY = 6

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
        nan, half = delayed(m, self.nan, 4), delayed(m, self.half, 4)

        # Stage 2: find the window that begins with the leading one's group. The magnitude of a
        # negative sum x is ~x + 1; the 1 is left to the rounding, so that no adder as wide as the
        # sum is needed. Zeros below x become ones of ~x, among them a leading one if ~x itself has
        # none.
        negative = total[-1]
        padding = _GROUP - (bits - 1) % _GROUP
        value = Cat(Const(0, padding), total[:-1])
        window, groups, sticky = _leading_window(m, value, negative)
        window, groups, sticky, negative = pipeline_stage(
            m, 2, window=window, groups=groups, sticky=sticky, negative=negative
        )

        # Stage 3: the last group, and then move the leading one to the top.
        window = Mux(groups[0], window[:_WINDOW], window[_GROUP:])
        magnitude = Signal(_WINDOW)
        m.d.comb += magnitude.eq(window ^ negative.replicate(_WINDOW))
        split = _WINDOW - FP32_FRACTION - 1
        # How many of the window's low bits remain below the guard bit.
        remaining = [window[:i].any() for i in range(split)]
        places, aligned, below = _normalize(m, magnitude, remaining)
        kept, guard, sticky, zeros, negative = pipeline_stage(
            m,
            3,
            kept=aligned[1:],
            guard=aligned[0],
            sticky=sticky | below,
            zeros=Cat(places, groups),
            negative=negative,
        )

        # Stage 4: round to FP32. For a negative sum 1 is added behind the guard bit; where nothing
        # of x is left there, that gives a tie (guard 0) or carries into `kept` and leaves nothing
        # (guard 1). A carry out of `kept` has nothing but zeros behind it.
        highest = FP32_BIAS + self.config.accumulator_unit_exponent + bits - 2
        odd = kept[0]
        up = Mux(negative, guard | (~sticky & odd), guard & (sticky | odd))
        lowest_normal = highest - _REBIAS - 1  # zeros of FP16's smallest normal number
        significand, distance, zeros, is_zero, negative = pipeline_stage(
            m,
            4,
            significand=kept + up,
            distance=_excess(zeros, lowest_normal),
            zeros=zeros,
            is_zero=~kept[-1],
            negative=negative,
        )

        # Stage 5: choose what becomes of it, FP32 or FP16. Below FP16's normal range the
        # significand is shifted right until its exponent fits; the rounding that follows is the
        # last stage's.
        carry = significand[-1]
        exponent = (highest - zeros + carry)[:8]
        fp32 = Cat(significand[:FP32_FRACTION], exponent & ~is_zero.replicate(8), negative)
        rest = significand[: _DROPPED - 1].any()
        shifted = shift_right_sticky(Cat(rest, significand[_DROPPED - 1 :]), distance)
        sticky, guard, fraction = shifted[0], shifted[1], shifted[2 : 2 + FP16_FRACTION]
        normal = (distance == 0) | ((distance == 1) & carry)
        field = (exponent - _REBIAS)[:5] & normal.replicate(5)
        infinite = zeros <= highest - _REBIAS - FP16_SPECIAL
        fp16 = Mux(infinite, FP16_INFINITY, Cat(fraction, field))
        special = Mux(half, FP16_NAN, FP32_NAN)
        result, up = pipeline_stage(
            m,
            5,
            result=Mux(nan, special, Mux(half, Cat(fp16[:15], negative), fp32)),
            up=guard & (sticky | fraction[0]) & half & ~nan & ~infinite,
        )

        # Stage 6: round to FP16. A carry out of the fraction moves on into the exponent, up to
        # infinity; an FP32 result has no such rounding.
        magnitude = (result[:15] + up)[:15]
        (result,) = pipeline_stage(m, 6, result=Cat(magnitude, result[15:]))
        m.d.comb += self.result.eq(result)
        return m


def _leading_window(m: Module, value: Value, negative: Value) -> tuple[Value, Value, Value]:
    """Find the window that begins with the highest group in which a bit differs from the sign.

    `value` is a whole number of groups, and zeros follow it. Returns a part of it that begins with
    the window if the number of groups above this is even, and one group higher if it is odd; that
    number; and whether there is a one below the window. Of a value of zero the number is one of the
    last groups'.
    """
    count = len(value) // _GROUP
    # From the highest on.
    groups = [value[i * _GROUP : (i + 1) * _GROUP] for i in reversed(range(count))]
    starts = range(0, count, _GROUPS)
    ones = Signal(count)
    differs = Signal(_GROUPS * len(starts))
    for i, group in enumerate(groups):
        m.d.comb += [
            ones[i].eq(group.any()),
            differs[i].eq(Mux(negative, ~group.all(), ones[i])),
        ]

    # By whole windows first, which leaves what moves by two groups and by one can reach.
    reach = _GROUP * (2 * _GROUPS - 1)
    padded = Cat(Const(0, reach), value)
    first = Signal(len(starts))
    second = Signal(range(_GROUPS))
    near = Signal(reach)
    m.d.comb += first.eq(_first([differs[i : i + _GROUPS].any() for i in starts]))
    m.d.comb += [
        second.eq(_choose(first, [_place(differs[i : i + _GROUPS]) for i in starts])),
        near.eq(_choose(first, [padded[: len(padded) - i * _GROUP][-reach:] for i in starts])),
    ]
    window = Mux(second[1], near, near[2 * _GROUP :])[: _WINDOW + _GROUP]
    # A group is below the window if a group as far above it, or one further above, differs.
    sticky = Cat(ones[i + _GROUPS] & differs[: i + 1].any() for i in range(count - _GROUPS)).any()
    return window, Cat(second, _number(first)), sticky


def _first(flags: list[Value]) -> Value:
    """Which flag is the first one that is set; the last one if none before it is."""
    return Cat(
        ~Cat(flags[:i]).any() & (flag if i + 1 < len(flags) else 1) for i, flag in enumerate(flags)
    )


def _place(flags: Value) -> Value:
    """The number of the first of four flags that is set, 3 if none of the others is."""
    a, b, c = flags[:3]
    return Cat(~a & (b | ~c), ~(a | b))


def _choose(selects: Value, values: list[Value]) -> Value:
    """The value whose select is set."""
    bits = max(map(len, values))
    return any_of(
        select.replicate(bits) & value for select, value in zip(selects, values, strict=True)
    )


def _number(selects: Value) -> Value:
    """The number of the select that is set."""
    bits = (len(selects) - 1).bit_length()
    return any_of(select.replicate(bits) & i for i, select in enumerate(selects))[:bits]


def _normalize(m: Module, value: Value, below: list[Value]) -> tuple[Value, Value, Value]:
    """Leading zeros of `value`, at most `_GROUP` - 1; the bits from the leading one on down to the
    guard bit; and that one of `below` whose number is that of the bits behind them."""
    count = []
    bits = len(value)
    for stage in reversed(range((_GROUP - 1).bit_length())):
        amount = 1 << stage
        bits -= amount
        empty = Signal(name=f"empty_{amount}")
        shifted = Signal(bits, name=f"shifted_{amount}")
        m.d.comb += [
            empty.eq(~value[-amount:].any()),
            shifted.eq(Mux(empty, value[:bits], value[-bits:])),
        ]
        below = [Mux(empty, *pair) for pair in zip(below, below[amount:], strict=False)]
        value = shifted
        count.append(empty)
    return Cat(*reversed(count)), value, below[0]


def _excess(value: Value, base: int) -> Value:
    """By how much a value exceeds another one, at most 15."""
    excess = value - base
    return Mux(value <= base, 0, Mux(excess > 15, 15, excess))[:4]
