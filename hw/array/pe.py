# SPDX-License-Identifier: Apache-2.0
"""The processing element: one exact multiply-accumulate per cycle, or four in draft mode."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.array.operands import activation_layout, weight_layout
from speq.hw.engine_config import (
    BLOCK_MAGNITUDE_BITS,
    DRAFT_LANES,
    FP16_SIGNIFICAND_BITS,
    LANE_BITS,
    EngineConfig,
)
from speq.model.number_format import SCALE_DENOMINATOR, SCALE_NUMERATORS, draft_levels

_PRODUCT_BITS = 2 * FP16_SIGNIFICAND_BITS
_LANE_PRODUCT_BITS = LANE_BITS + FP16_SIGNIFICAND_BITS
_BLOCK_PRODUCT_BITS = LANE_BITS + BLOCK_MAGNITUDE_BITS


class Pe(wiring.Component):
    """Exact multiply-accumulate unit.

    Formula, with the accumulator in units of ``2^config.accumulator_unit_exponent``:

    - verify: ``acc = (0 if first else acc) + w * x`` for the FP16 numbers w and x;
    - draft: ``acc = (0 if first else acc) + scale * sum(level[i] * x[i] for i in range(4))``
      times ``2^(weight.exponent + activation.exponent)``, for four draft weights and four block
      activations.

    Both are exact: nothing is rounded. The 11 x 11 bit multiplier is four lanes of 3 x 11 bits;
    verify mode joins their products, draft mode shifts, signs and adds them. The shifter and the
    accumulator are the same in both modes.

    A PE has no flow control and no bubbles: it takes an operand pair in every cycle, in any
    order of modes. A cycle without work is an activation of 0, which leaves `acc` as it is if
    `draft` fits the weight operand.
    Operands that are not finite are handled outside.

    Latency, counted from the cycle in which an operand is at `weight_in`: it is in the weight
    register (`weight_out`, and multiplied with `activation`) 1 cycle later, added to the
    accumulator `ACCUMULATE` cycles later, and in `drain_out` `LATENCY` cycles later. `first`
    and `draft` are taken when the operand is in the stage that needs them, so that the row keeps
    one delayed copy of them for all its PEs.

    Parameters
    ----------
    config : EngineConfig
    draft : bool
        Build the draft hardware. Without it the PE is the FP16-only baseline, whose latency is a
        cycle shorter, since it does not multiply by group scales.

    Members
    -------
    weight_in : In(weight_layout)
        Operand from the column, or from the PE above.
    weight_out : Out(weight_layout)
        The same a cycle later, for the PE below.
    activation : In(activation_layout)
        Operand of the row for the weight in `weight_out`; significand 0 in a cycle without work.
    draft : In(2)
        Only with draft hardware. Bit 0: the operand that is being multiplied is a draft operand.
        Bit 1: the same a cycle later, while it is scaled.
    first : In(1)
        The term that is being accumulated is the first of its sum.
    drain : In(1)
        Put the accumulator onto the column's result bus.
    drain_in, drain_out : In(signed), Out(signed)
        The column's result bus, an OR chain: ``drain_out = drain_in | (acc if drain else 0)``.
    """

    def __init__(self, config: EngineConfig, *, draft: bool) -> None:
        self.config = config
        self.has_draft = draft
        self.ACCUMULATE = 4 if draft else 3
        self.LATENCY = self.ACCUMULATE + 1
        weight = weight_layout(config, draft=draft)
        accumulator = config.accumulator_bits
        members = {
            "weight_in": In(weight),
            "weight_out": Out(weight),
            "activation": In(activation_layout(draft=draft)),
            "first": In(1),
            "drain": In(1),
            "drain_in": In(accumulator),
            "drain_out": Out(accumulator),
        }
        if draft:
            members["draft"] = In(2)
        super().__init__(members)

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        weight = Signal.like(self.weight_out, reset_less=True)
        m.d.sync += weight.eq(self.weight_in)
        m.d.comb += self.weight_out.eq(weight)

        exponent = Signal(range(2 * 31), reset_less=True)
        negative = Signal(reset_less=True)
        m.d.sync += [
            exponent.eq(weight.exponent + self.activation.exponent),
            negative.eq(weight.negative ^ self.activation.negative),
        ]
        if self.has_draft:
            term = self._draft_or_verify_term(m, weight)
            exponent, negative = _delay(m, exponent), _delay(m, negative)
        else:
            product = Signal(_PRODUCT_BITS, reset_less=True)
            m.d.sync += product.eq(weight.significand * self.activation.significand)
            term = product << self.config.verify_offset

        accumulator = Signal(self.config.accumulator_bits, reset_less=True)
        addend = Signal.like(accumulator)
        m.d.sync += addend.eq((term << exponent) ^ negative.replicate(len(addend)))
        negative = _delay(m, negative)

        kept = Signal.like(accumulator)
        m.d.comb += [
            kept.eq(Mux(self.first, 0, accumulator)),
            self.drain_out.eq(self.drain_in | Mux(self.drain, accumulator, 0)),
        ]
        # The low bit of the sum of {kept, 1} and {addend, negative} carries the +1 of a
        # subtraction into a single adder.
        total = Cat(1, kept) + Cat(negative, addend)
        m.d.sync += accumulator.eq(total[1:])
        return m

    def _draft_or_verify_term(self, m: Module, weight: data.View) -> Value:
        """Multiply and scale: two pipeline stages, a signed term in accumulator units."""
        config = self.config
        multiply_draft, scale_draft = self.draft
        largest_shift = max(level.shift for level in draft_levels(config.format))
        lanes = []
        for i in range(DRAFT_LANES):
            slice_ = weight.significand.word_select(i, LANE_BITS)
            product = Signal(_LANE_PRODUCT_BITS, name=f"product_{i}")
            m.d.comb += product.eq(slice_ * self.activation.magnitudes[i])
            lane = _shift_lane(m, i, product, weight.shift[i], largest_shift)
            if i > 0:
                invert = weight.invert[i - 1] ^ self.activation.invert[i - 1]
                lane = Cat(lane, 0) ^ invert.replicate(len(lane) + 1)
            lanes.append((Cat(lane, 0) if i == 0 else lane).as_signed())
        inverts = weight.invert ^ self.activation.invert
        # x - y = x + ~y + 1; each of the three adders takes one of the three +1.
        low = Signal(signed(len(lanes[0]) + 1))
        high = Signal.like(low)
        joined = Signal(signed(_PRODUCT_BITS + 1), reset_less=True)
        m.d.comb += [
            low.eq(_add(lanes[0], lanes[1], inverts[0])),
            high.eq(_add(lanes[2], lanes[3], inverts[1])),
        ]
        high_placed = Mux(multiply_draft, high, high << 2 * LANE_BITS)
        m.d.sync += joined.eq(_add(low, high_placed, inverts[2]))

        scale = _delay(m, weight.scale)
        # Only in draft mode is the sum that is scaled as narrow as this.
        lane_sum = joined[: self._lane_sum_bits].as_signed()
        scaled = _multiply_by_scale(m, lane_sum, scale)
        term_bits = max(len(joined) + config.verify_offset, len(scaled) + config.draft_offset)
        term = Signal(signed(term_bits), reset_less=True)
        m.d.sync += term.eq(
            Mux(scale_draft, scaled << config.draft_offset, joined << config.verify_offset)
        )
        return term

    @property
    def _lane_sum_bits(self) -> int:
        largest = max(level.value for level in draft_levels(self.config.format))
        return (DRAFT_LANES * largest * (2**BLOCK_MAGNITUDE_BITS - 1)).bit_length() + 1


def _delay(m: Module, value: Value) -> Signal:
    register = Signal(len(value), reset_less=True)
    m.d.sync += register.eq(value)
    return register


def _add(a: Value, b: Value, carry: Value) -> Value:
    """a + b + carry as one adder (the carry enters below the lowest bit)."""
    a, b = (Cat(bit, value).as_signed() for bit, value in ((1, a), (carry, b)))
    return (a + b)[1:].as_signed()


def _shift_lane(m: Module, index: int, product: Value, shift: Value, largest: int) -> Value:
    """``product << shift`` for a lane: shifts of 4 and more only move a draft product.

    Verify mode needs shifts 0 and 3 of a full lane product; a draft product has 7-bit
    activations and is shifted by at most `largest`.
    """
    value = product
    width = _BLOCK_PRODUCT_BITS
    for stage in reversed(range(len(shift))):
        amount = 1 << stage
        if amount > 2 * LANE_BITS - 3:
            moved = value[:width] << amount
        else:
            moved = value << amount
        width = min(width + amount, _BLOCK_PRODUCT_BITS + largest)
        limit = max(width, _LANE_PRODUCT_BITS + LANE_BITS)
        shifted = Signal(limit, name=f"lane_{index}_shift_{amount}")
        m.d.comb += shifted.eq(Mux(shift[stage], moved, value))
        value = shifted
    return value


def _multiply_by_scale(m: Module, value: Value, code: Value) -> Value:
    """value * SCALE_NUMERATORS[code], as 16 * value plus a small multiple of it."""
    bits = len(value) + max(SCALE_NUMERATORS).bit_length()
    triple = Signal(signed(len(value) + 2))
    multiple = Signal(signed(len(value) + 3))
    invert = Signal()
    m.d.comb += triple.eq(value + (value << 1))
    with m.Switch(code):
        for index, numerator in enumerate(SCALE_NUMERATORS):
            with m.Case(index):
                difference = numerator - SCALE_DENOMINATOR
                odd, shift = _odd_part(abs(difference))
                source = {0: 0, 1: value, 3: triple}[odd]
                m.d.comb += [multiple.eq(source << shift), invert.eq(difference < 0)]
    inverted = (multiple.as_unsigned() ^ invert.replicate(len(multiple))).as_signed()
    return _add(value << 4, inverted, invert)[:bits].as_signed()


def _odd_part(number: int) -> tuple[int, int]:
    """number = odd << shift."""
    shift = 0
    while number and number % 2 == 0:
        number //= 2
        shift += 1
    return number, shift
