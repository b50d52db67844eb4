# SPDX-License-Identifier: Apache-2.0
"""One lane of the vector unit: a multiplier, an adder and the exponential, in fixed chains."""

from __future__ import annotations

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal, unsigned
from amaranth.lib import data, enum, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.logic import pipeline_stage
from speq.hw.vector.fp32_adder import Fp32Adder
from speq.hw.vector.fp32_multiplier import Fp32Multiplier
from speq.hw.vector.sigmoid import PART, Exponential, Sigmoid


class LaneOperation(enum.Enum, shape=unsigned(3)):
    """What a lane computes of its operands; `speq.model.vector_ops` is made of these."""

    #: x * a
    SCALE = 0
    #: (x * a) * b
    SCALE_TWICE = 1
    #: x * a + b
    ADD_SCALED = 2
    #: x * a + y * b, in lanes with `subtract` x * a - y * b
    ROTATE = 3
    #: e^-|x * a - b|
    EXPONENTIAL = 4
    #: (x * a) * sigmoid(y)
    GATE = 5


#: Lanes that share a `SharedSigmoid`, hence cycles from one GATE to the next.
SHARING = 4
#: Cycles from the operands of one element to those of the next: others take the multiplier twice.
PACES = {operation: 1 for operation in LaneOperation} | {
    LaneOperation.SCALE_TWICE: 2,
    LaneOperation.ROTATE: 2,
    LaneOperation.GATE: SHARING,
}

# From operands to their product, a register before the multiplier included; then to a product that
# has been kept until it can be multiplied again, and to that.
_PRODUCT = 1 + Fp32Multiplier.LATENCY
_AGAIN = _PRODUCT + 1
_GATED = 1 + Exponential.LATENCY + Sigmoid.LATENCY + SHARING
# Products of gates that are kept, as one comes every `SHARING` cycles.
_KEPT = (_GATED - _PRODUCT) // SHARING
#: Cycles from operands x and a to the result.
LATENCIES = {
    LaneOperation.SCALE: _PRODUCT,
    LaneOperation.SCALE_TWICE: _AGAIN + _PRODUCT,
    LaneOperation.ADD_SCALED: _PRODUCT + Fp32Adder.LATENCY,
    LaneOperation.ROTATE: 1 + _PRODUCT + Fp32Adder.LATENCY,
    LaneOperation.EXPONENTIAL: _PRODUCT + Fp32Adder.LATENCY + 1 + Exponential.LATENCY,
    LaneOperation.GATE: _GATED + _PRODUCT,
}


class Lane(wiring.Component):
    """The operations of `LaneOperation` on FP32 numbers, each step rounded as a unit of its own.

    Latency `LATENCIES[operation]` cycles, no flow control. Operands may come every
    `PACES[operation]` cycles, always in a cycle of `phase` 0, or 2 if the pace is 2. `operation`
    must stay the same from the operands to their results: the chains share the units. b is taken
    `B_DELAY` cycles after x and a, when it is needed: so a sum can be the next one's operand as
    soon as possible.

    ROTATE takes y and b in place of x and a, and x and a in the cycle behind them. Operands of GATE
    must stay for `SHARING` cycles. The sigmoid of `part` comes from outside, in the last `SHARING`
    cycles before it is needed.

    Members
    -------
    operation : In(LaneOperation)
    subtract : In(1)
        Of ROTATE; constant.
    phase : In(range(SHARING))
        One more in each cycle.
    x, a, b : In(32)
    y : In(32)
        Of GATE.
    part : Out(PART)
        Of y, `Exponential.LATENCY + 1` cycles later.
    takes_sigmoid : In(1)
    sigmoid : In(32)
    result : Out(32)
    """

    B_DELAY = Fp32Multiplier.LATENCY

    def __init__(self) -> None:
        operands = {name: In(32) for name in "xyab"}
        super().__init__(
            {
                "operation": In(LaneOperation),
                "subtract": In(1),
                "phase": In(range(SHARING)),
                **operands,
                "part": Out(PART),
                "takes_sigmoid": In(1),
                "sigmoid": In(32),
                "result": Out(32),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        m.submodules.multiplier = multiplier = Fp32Multiplier()
        m.submodules.adder = adder = Fp32Adder()
        m.submodules.functions = functions = Exponential()
        gates = self.operation == LaneOperation.GATE
        rotates = self.operation == LaneOperation.ROTATE
        exponential = self.operation == LaneOperation.EXPONENTIAL
        product = multiplier.product

        # A product is multiplied again, in a cycle in which no operands come, by b or, when all
        # lanes have theirs, by the sigmoid. Until then it is kept, with others that come meanwhile.
        b, argument = pipeline_stage(m, 1, b=self.b, argument=Mux(exponential, adder.sum, self.y))
        factor = Signal(32, reset_less=True)
        with m.If(~gates):
            m.d.sync += factor.eq(b)
        with m.Elif(self.takes_sigmoid):
            m.d.sync += factor.eq(self.sigmoid)
        kept = [Signal(32, name=f"kept_{i}", reset_less=True) for i in range(_KEPT)]
        with m.If(~gates | (self.phase == _PRODUCT % SHARING)):
            m.d.sync += Cat(kept).eq(Cat(product, *kept[:-1]))
        twice = self.operation == LaneOperation.SCALE_TWICE
        again = Mux(gates, self.phase[1], twice & self.phase[0])
        x, a = pipeline_stage(
            m,
            1,
            x=Mux(again, Mux(gates, kept[-1], kept[0]), self.x),
            a=Mux(again, factor, self.a),
        )
        m.d.comb += [
            multiplier.a.eq(x),
            multiplier.b.eq(a),
            adder.a.eq(product),
            adder.b.eq(Mux(rotates, kept[0], b)),
            adder.subtract.eq(Mux(rotates, self.subtract, exponential)),
            functions.x.eq(argument),
            self.part.eq(functions.part),
        ]
        with m.Switch(self.operation):
            with m.Case(LaneOperation.ADD_SCALED, LaneOperation.ROTATE):
                m.d.comb += self.result.eq(adder.sum)
            with m.Case(LaneOperation.EXPONENTIAL):
                m.d.comb += self.result.eq(functions.exponential)
            with m.Default():
                m.d.comb += self.result.eq(product)
        return m


class SharedSigmoid(wiring.Component):
    """The sigmoid of `SHARING` lanes, one after the other.

    Members
    -------
    turn : In(range(SHARING))
        The lane whose part is taken; one more in each cycle.
    parts : In(ArrayLayout(PART, SHARING))
    takes : Out(SHARING)
        The lane whose sigmoid this is.
    sigmoid : Out(32)
    """

    def __init__(self) -> None:
        super().__init__(
            {
                "turn": In(range(SHARING)),
                "parts": In(data.ArrayLayout(PART, SHARING)),
                "takes": Out(SHARING),
                "sigmoid": Out(32),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        m.submodules.unit = unit = Sigmoid()
        m.d.comb += [
            unit.part.eq(self.parts[self.turn]),
            self.sigmoid.eq(unit.sigmoid),
            *(
                self.takes[i].eq(self.turn == (i + Sigmoid.LATENCY) % SHARING)
                for i in range(SHARING)
            ),
        ]
        return m
