# SPDX-License-Identifier: Apache-2.0
"""Operands as they travel through the array, decoded once per row or column and not per PE.

An FP16 number is ``significand * 2^(exponent - 24)`` with the hidden bit in `significand` and
`exponent` the exponent field less one (0 for subnormals). A block activation is its 7-bit
magnitude.

A PE multiplies by choosing among multiples of the activation, which are computed once per row. A
weight therefore comes as one *code* for each of the PE's lanes: in verify mode a digit of its
significand, in draft mode the draft codes of four weights.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data

from speq.hw.engine_config import (
    BLOCK_MAGNITUDE_BITS,
    DRAFT_LANES,
    EXPONENT_BITS,
    FP16_SIGNIFICAND_BITS,
    LANE_BITS,
    EngineConfig,
)
from speq.model.number_format import SCALE_BITS

#: Bits of three times a significand, and of a draft multiple of a block activation.
_TRIPLE_BITS = FP16_SIGNIFICAND_BITS + 2
_MULTIPLE_BITS = BLOCK_MAGNITUDE_BITS + LANE_BITS


def weight_layout(*, draft: bool) -> data.StructLayout:
    """A column's operand.

    `codes` has a code for each lane: in verify mode the magnitude, 0 to 4, of a digit of the
    weight's significand (`significand_digits`), in draft mode a draft code without its sign.
    `negative` is the sign of the weight (draft: of the last lane's) and `invert` says which of the
    other lanes differ from the last one in sign.
    """
    members = {
        "codes": data.ArrayLayout(LANE_BITS, DRAFT_LANES),
        "invert": DRAFT_LANES - 1,
        "exponent": EXPONENT_BITS,
        "negative": 1,
    }
    if draft:
        members["scale"] = SCALE_BITS
    return data.StructLayout(members)


def activation_layout(*, draft: bool) -> data.StructLayout:
    """A row's operand at the array's edge, where it waits for its weights.

    In verify mode `significand` counts, in draft mode (only in rows that can draft) `magnitudes`,
    of four block activations; the other one is 0. `negative` and `invert` are as for weights.
    """
    members = {"significand": FP16_SIGNIFICAND_BITS, "exponent": EXPONENT_BITS, "negative": 1}
    if draft:
        members["magnitudes"] = data.ArrayLayout(BLOCK_MAGNITUDE_BITS, DRAFT_LANES)
        members["invert"] = DRAFT_LANES - 1
    return data.StructLayout(members)


def multiples_layout(config: EngineConfig, *, draft: bool) -> data.StructLayout:
    """A row's operand as its PEs take it: with three times `significand` as `triple`, and instead
    of each lane's magnitude its multiples by `config.draft_multiples`."""
    members = {
        "significand": FP16_SIGNIFICAND_BITS,
        "triple": _TRIPLE_BITS,
        "exponent": EXPONENT_BITS,
        "negative": 1,
    }
    if draft:
        lane = data.ArrayLayout(_MULTIPLE_BITS, len(config.draft_multiples))
        members["lanes"] = data.ArrayLayout(lane, DRAFT_LANES)
        members["invert"] = DRAFT_LANES - 1
    return data.StructLayout(members)


def multiples(m: Module, config: EngineConfig, activation: data.View, name: str) -> data.View:
    """The operand of `multiples_layout` of one of `activation_layout`, in the same cycle."""
    draft = "magnitudes" in dict(activation.shape())
    operand = Signal(multiples_layout(config, draft=draft), name=name)
    m.d.comb += [
        operand.significand.eq(activation.significand),
        operand.triple.eq(_multiple(activation.significand, 3)),
        operand.exponent.eq(activation.exponent),
        operand.negative.eq(activation.negative),
    ]
    if draft:
        m.d.comb += operand.invert.eq(activation.invert)
        for lane, magnitude in zip(operand.lanes, activation.magnitudes, strict=True):
            for multiple, factor in zip(lane, config.draft_multiples, strict=True):
                m.d.comb += multiple.eq(_multiple(magnitude, factor))
    return operand


def _multiple(value: Value, factor: int) -> Value:
    """value * factor, for 3, 5 or 7, by one adder."""
    return (value << 3) - value if factor == 7 else (value << (factor >> 1)) + value


def significand_digits(significand: Value) -> tuple[Value, Value]:
    """Digits of base 8, -4 to 4, whose sum ``digit[i] * 8^i`` is the significand.

    Returns the `codes` and `invert` of `weight_layout`: magnitudes, and which of the digits but the
    last one are negative. The last one never is.
    """
    codes, negatives = [], []
    bits = Cat(0, significand, 0)  # a digit takes the top bit of the one below as its carry
    for lane in range(DRAFT_LANES):
        carry, low, high, negative = bits[LANE_BITS * lane :][: LANE_BITS + 1]
        positive = (Cat(low, high) + carry)[:LANE_BITS]
        codes.append(Mux(negative, (4 - positive)[:LANE_BITS], positive))
        negatives.append(negative)
    return Cat(codes), Cat(negatives[:-1])
