# SPDX-License-Identifier: Apache-2.0
"""The random bits of sampled decoding: Philox4x32-10."""

from __future__ import annotations

from amaranth.hdl import Array, Cat, Const, Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.logic import pipeline_stage
from speq.model.noise_format import KEY_STEPS, MULTIPLIERS, ROUNDS

_WORD_BITS = 32
_HALF = _WORD_BITS // 2
_INDEX_BITS = ROUNDS.bit_length()
_ROUND_CYCLES = 3

#: A counter, or the four random words that it becomes.
WORDS = data.ArrayLayout(_WORD_BITS, 4)
#: A call on its way: the rounds that it has behind it, and its words.
_CALL = data.StructLayout({"index": _INDEX_BITS, "words": WORDS})


class Philox(wiring.Component):
    """Philox4x32-10 (`speq.model.gumbel.philox`) of a stream of counters.

    The rounds are a ring of `rounds` that a call passes 10 / `rounds` times, each in three cycles:
    halves of words are multiplied, the two products in the middle added, and everything put
    together. With its entry the ring has an odd number of cycles, so that those who call in every
    second cycle at most, as often as they can, meet all its places.

    Latency `LATENCY` cycles, in the order of the calls. A call waits where another one is passing
    the ring's entry; on average there can be one in 10 / `rounds` cycles. The words cannot be made
    to wait.

    Parameters
    ----------
    rounds : int
        A divisor of 10.

    Members
    -------
    key : In(64)
        The first word below the second; constant while a call is under way.
    counters : In(stream of WORDS)
    valid : Out(1)
    words : Out(WORDS)
        If `valid`.
    """

    def __init__(self, rounds: int) -> None:
        if rounds < 1 or ROUNDS % rounds:
            raise ValueError(f"rounds is {rounds}; expected a divisor of {ROUNDS}")
        self.rounds = rounds
        self._entry_cycles = 1 + rounds % 2
        self.LATENCY = ROUNDS * _ROUND_CYCLES + ROUNDS // rounds * self._entry_cycles
        super().__init__(
            {
                "key": In(2 * _WORD_BITS),
                "counters": In(stream.Signature(WORDS)),
                "valid": Out(1),
                "words": Out(WORDS),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        last, last_valid = Signal(_CALL), Signal()
        is_complete = last.index == ROUNDS
        returns = last_valid & ~is_complete
        m.d.comb += [
            self.counters.ready.eq(~returns),
            self.valid.eq(last_valid & is_complete),
            self.words.eq(last.words),
        ]
        call, valid = Signal(_CALL), Signal()
        m.d.comb += [
            call.eq(Mux(returns, last, Cat(Const(0, _INDEX_BITS), self.counters.payload))),
            valid.eq(returns | self.counters.valid),
        ]
        for stage in range(self._entry_cycles):
            following = Signal(name=f"entered_{stage}")
            m.d.sync += following.eq(valid)
            (call,) = pipeline_stage(m, stage, entry=call)
            call, valid = data.View(_CALL, call), following
        for number in range(self.rounds):
            call, valid = self._round(m, number, call, valid)
        m.d.comb += [last.eq(call), last_valid.eq(valid)]
        return m

    def _round(
        self, m: Module, number: int, call: data.View, valid: Signal
    ) -> tuple[data.View, Signal]:
        """The call behind one more round, `_ROUND_CYCLES` cycles later."""
        first, *others = (_ROUND_CYCLES * number + i for i in range(_ROUND_CYCLES))
        for stage in (first, *others):
            following = Signal(name=f"valid_{stage}")
            m.d.sync += following.eq(valid)
            valid = following

        # Multipliers of FPGAs take halves.
        words = call.words
        halves = [
            (word[:_HALF] * low, word[_HALF:] * low, word[:_HALF] * high, word[_HALF:] * high)
            for word, low, high in (
                (words[i], Const(factor & 0xFFFF, _HALF), Const(factor >> _HALF, _HALF))
                for i, factor in zip((0, 2), MULTIPLIERS, strict=True)
            )
        ]
        names = ("low", "middle", "other_middle", "high")
        products = {
            f"{name}_{i}": value
            for i, product in enumerate(halves)
            for name, value in zip(names, product, strict=True)
        }
        *products, one, three, index = pipeline_stage(
            m, first, **products, one=words[1], three=words[3], index=call.index
        )

        steps = [
            Array(Const(i * step & (1 << _WORD_BITS) - 1, _WORD_BITS) for i in range(ROUNDS))
            for step in KEY_STEPS
        ]
        keys = [
            (self.key.word_select(i, _WORD_BITS) + steps[i][index])[:_WORD_BITS] for i in (0, 1)
        ]
        outer_0, middle_0, outer_1, middle_1, with_one, with_three, index = pipeline_stage(
            m,
            others[0],
            outer_0=Cat(products[0], products[3]),
            middle_0=products[1] + products[2],
            outer_1=Cat(products[4], products[7]),
            middle_1=products[5] + products[6],
            with_one=one ^ keys[0],
            with_three=three ^ keys[1],
            index=(index + 1)[:_INDEX_BITS],
        )

        left, right = _sum(outer_0, middle_0), _sum(outer_1, middle_1)
        following = Cat(
            index,
            right[_WORD_BITS:] ^ with_one,
            right[:_WORD_BITS],
            left[_WORD_BITS:] ^ with_three,
            left[:_WORD_BITS],
        )
        (result,) = pipeline_stage(m, others[1], call=following)
        return data.View(_CALL, result), valid


def _sum(outer: Value, middle: Value) -> Value:
    """A product of two words from those of their halves."""
    return Cat(outer[:_HALF], (outer[_HALF:] + middle)[: 2 * _WORD_BITS - _HALF])
