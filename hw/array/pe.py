# SPDX-License-Identifier: Apache-2.0
"""The processing element: one exact multiply-accumulate per cycle, or four in draft mode."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.array.operands import multiples_layout, weight_layout
from speq.hw.common.logic import any_of
from speq.hw.engine_config import (
    BLOCK_MAGNITUDE_BITS,
    DRAFT_LANES,
    FP16_SIGNIFICAND_BITS,
    LANE_BITS,
    EngineConfig,
    odd_part,
)
from speq.model.number_format import SCALE_DENOMINATOR, SCALE_NUMERATORS

_PRODUCT_BITS = 2 * FP16_SIGNIFICAND_BITS
#: Digit magnitudes as multiples of the significand, each shifted, and of its triple.
_DIGITS = {1: 0, 2: 1, 4: 2}
_TRIPLE_DIGIT = 3
#: Exponent bits by which a term is shifted before it is registered. The others shift it on its way
#: into the accumulator, so that the register need not be as wide as that.
_NEAR_BITS = 4


class Pe(wiring.Component):
    """Exact multiply-accumulate unit.

    Formula, with the accumulator in units of ``2^config.accumulator_unit_exponent``:

    - verify: ``acc = (0 if first else acc) + w * x`` for the FP16 numbers w and x;
    - draft: ``acc = (0 if first else acc) + scale * sum(level[i] * x[i] for i in range(4))``
      times ``2^(weight.exponent + activation.exponent)``, for four draft weights and four block
      activations.

    Both are exact: nothing is rounded. Four lanes choose among the multiples of the activation
    that the row has computed: in verify mode a digit of the weight's significand says which
    (radix 8), in draft mode a draft code says which one and how far it is shifted. A lane's sign
    inverts it. In verify mode the lanes are joined to a product, in draft mode they are added up.
    The shifter and the accumulator are the same in both modes.

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
    activation : In(multiples_layout)
        Operand of the row for the weight in `weight_out`; its multiples are 0 in a cycle without
        work.
    draft : In(2)
        Only with draft hardware. Bit 0: the operand that is being multiplied is a draft operand.
        Bit 1: the same a cycle later, while it is scaled.
    first : In(1)
        The term that is being accumulated is the first of its sum.
    drain : In(1)
        Put the accumulator onto the column's result bus.
    drain_out : Out
        What the PE puts there: the accumulator, or 0 for another PE's.
    """

    def __init__(self, config: EngineConfig, *, draft: bool) -> None:
        self.config = config
        self.has_draft = draft
        self.ACCUMULATE = 4 if draft else 3
        self.LATENCY = self.ACCUMULATE + 1
        weight = weight_layout(draft=draft)
        members = {
            "weight_in": In(weight),
            "weight_out": Out(weight),
            "activation": In(multiples_layout(config, draft=draft)),
            "first": In(1),
            "drain": In(1),
            "drain_out": Out(config.accumulator_bits),
        }
        if draft:
            members["draft"] = In(2)
        super().__init__(members)

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        bits = self.config.accumulator_bits
        weight = Signal.like(self.weight_out, reset_less=True)
        m.d.sync += weight.eq(self.weight_in)
        m.d.comb += self.weight_out.eq(weight)

        exponent = Signal(range(2 * 31), reset_less=True)
        negative = Signal(reset_less=True)
        m.d.sync += [
            exponent.eq(weight.exponent + self.activation.exponent),
            negative.eq(weight.negative ^ self.activation.negative),
        ]
        product = self._product(m, weight)
        term = Cat(product, 0).as_signed() << self.config.verify_offset
        if self.has_draft:
            term = self._scaled_if_draft(m, weight, product, term)
            exponent, negative = _delay(m, exponent), _delay(m, negative)

        near = Signal(signed(len(term) + (1 << _NEAR_BITS) - 1), reset_less=True)
        shifted = Signal.like(near)
        m.d.comb += shifted.eq(term << exponent[:_NEAR_BITS])
        m.d.sync += near.eq(shifted ^ negative.replicate(len(near)).as_signed())
        far, negative = _delay(m, exponent[_NEAR_BITS:]), _delay(m, negative)
        addend = near
        for i, moves in enumerate(far):
            step = 1 << _NEAR_BITS + i
            wider = Signal(signed(min(len(addend) + step, bits)), name=f"addend_{step}")
            moved = Cat(negative.replicate(step), addend)[: len(wider)]
            m.d.comb += wider.eq(Mux(moves, moved.as_signed(), addend))
            addend = wider

        accumulator = Signal(bits, reset_less=True)
        addend_bits = Signal(signed(bits))
        kept = Signal(bits)
        m.d.comb += [
            addend_bits.eq(addend),
            kept.eq(Mux(self.first, 0, accumulator)),
            self.drain_out.eq(Mux(self.drain, accumulator, 0)),
        ]
        # The low bit of the sum of {kept, 1} and {addend, negative} carries the +1 of a
        # subtraction into a single adder.
        total = Cat(1, kept) + Cat(negative, addend_bits)
        m.d.sync += accumulator.eq(total[1:])
        return m

    def _product(self, m: Module, weight: data.View) -> Signal:
        """What the lanes give together, a cycle later: a product of significands, or in draft mode,
        in the low `_lane_sum_bits`, the signed sum of four draft products."""
        lanes = [self._lane(m, i, weight.codes[i]) for i in range(DRAFT_LANES)]
        invert = Signal(DRAFT_LANES - 1)
        m.d.comb += invert.eq(weight.invert)
        if self.has_draft:
            m.d.comb += invert.eq(weight.invert ^ self.activation.invert)
        for i in range(DRAFT_LANES - 1):
            lanes[i] = lanes[i] ^ invert[i].replicate(len(lanes[i])).as_signed()
        # x - y = x + ~y + 1; each of the three adders takes one of the three +1.
        low, high = (Signal(signed(max(map(len, lanes)) + 1), name=n) for n in ("low", "high"))
        m.d.comb += [
            low.eq(_add(lanes[0], lanes[1], invert[0])),
            high.eq(_add(lanes[2], lanes[3], invert[2])),
        ]
        placed = high << 2 * LANE_BITS
        if self.has_draft:
            placed = Mux(self.draft[0], high, placed)
        product = Signal(_PRODUCT_BITS, reset_less=True)
        m.d.sync += product.eq(_add(low, placed, invert[1]))
        return product

    def _lane(self, m: Module, index: int, code: Value) -> Value:
        """The multiple of the activation that a lane's code chooses, before its sign.

        In verify mode that of an odd lane is shifted by `LANE_BITS`, as the lanes are joined in
        pairs.
        """
        activation = self.activation
        offset = LANE_BITS * (index % 2)
        choices = [
            (digit, activation.significand << shift + offset) for digit, shift in _DIGITS.items()
        ]
        choices.append((_TRIPLE_DIGIT, activation.triple << offset))
        chosen = [(code == digit, value) for digit, value in choices]
        if self.has_draft:
            is_draft = self.draft[0]
            multiples = self.config.draft_multiples
            chosen = [(select & ~is_draft, value) for select, value in chosen]
            for q, (multiple, shift) in enumerate(self.config.draft_products):
                value = activation.lanes[index][multiples.index(multiple)] << shift
                chosen.append(((code == q) & is_draft, value))
        bits = max(len(value) for _, value in chosen)
        select = Signal(len(chosen), name=f"select_{index}")
        lane = Signal(bits, name=f"lane_{index}")
        m.d.comb += [
            select.eq(Cat(condition for condition, _ in chosen)),
            lane.eq(
                any_of(
                    bit.replicate(bits) & value
                    for bit, (_, value) in zip(select, chosen, strict=True)
                )
            ),
        ]
        return Cat(lane, 0).as_signed()

    def _scaled_if_draft(
        self, m: Module, weight: data.View, product: Signal, verify_term: Value
    ) -> Signal:
        """A signed term in accumulator units, a cycle later: that of verify mode, or in draft mode
        the lanes' sum times the group's scale."""
        lane_sum = product[: self._lane_sum_bits].as_signed()
        scaled = _multiply_by_scale(m, lane_sum, _delay(m, weight.scale))
        draft_term = scaled << self.config.draft_offset
        term = Signal(signed(max(len(verify_term), len(draft_term))), reset_less=True)
        m.d.sync += term.eq(Mux(self.draft[1], draft_term, verify_term))
        return term

    @property
    def _lane_sum_bits(self) -> int:
        largest = max(multiple << shift for multiple, shift in self.config.draft_products)
        return (DRAFT_LANES * largest * (2**BLOCK_MAGNITUDE_BITS - 1)).bit_length() + 1


def _delay(m: Module, value: Value) -> Signal:
    register = Signal(len(value), reset_less=True)
    m.d.sync += register.eq(value)
    return register


def _add(a: Value, b: Value, carry: Value) -> Value:
    """a + b + carry as one adder (the carry enters below the lowest bit)."""
    a, b = (Cat(bit, value).as_signed() for bit, value in ((1, a), (carry, b)))
    return (a + b)[1:].as_signed()


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
                odd, shift = odd_part(abs(difference))
                source = {0: 0, 1: value, 3: triple}[odd]
                m.d.comb += [multiple.eq(source << shift), invert.eq(difference < 0)]
    inverted = (multiple.as_unsigned() ^ invert.replicate(len(multiple))).as_signed()
    return _add(value << 4, inverted, invert)[:bits].as_signed()
