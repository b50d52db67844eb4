# SPDX-License-Identifier: Apache-2.0
"""One lane of the vector unit: two multipliers, an adder and the exponential, in fixed chains."""

from __future__ import annotations

from amaranth.hdl import Elaboratable, Module, Mux, Signal, unsigned
from amaranth.lib import data, enum, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.logic import delayed, pipeline_stage
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
#: Cycles from operands x and a to the result.
LATENCIES = {
    LaneOperation.SCALE: Fp32Multiplier.LATENCY,
    LaneOperation.SCALE_TWICE: 2 * Fp32Multiplier.LATENCY + 1,
    LaneOperation.ADD_SCALED: Fp32Multiplier.LATENCY + Fp32Adder.LATENCY,
    LaneOperation.ROTATE: Fp32Multiplier.LATENCY + Fp32Adder.LATENCY,
    LaneOperation.EXPONENTIAL: (
        Fp32Multiplier.LATENCY + Fp32Adder.LATENCY + 1 + Exponential.LATENCY
    ),
    LaneOperation.GATE: (Exponential.LATENCY + Sigmoid.LATENCY + SHARING + Fp32Multiplier.LATENCY),
}


class Lane(wiring.Component):
    """The operations of `LaneOperation` on FP32 numbers, each step rounded as a unit of its own.

    Latency `LATENCIES[operation]` cycles, operands in each cycle, no flow control. `operation`
    must stay the same from the operands to their results: the chains share the units. y is taken a
    cycle before x and a, in ROTATE b as well. Otherwise b is taken `B_DELAY` cycles after x and a,
    when it is needed: so a sum can be the next one's operand as soon as possible.

    GATE takes operands only every `SHARING` cycles, and they must stay for so many. The sigmoid of
    `part` comes from outside, in the last `SHARING` cycles before it is needed.

    Members
    -------
    operation : In(LaneOperation)
    subtract : In(1)
        Of ROTATE; constant.
    x, y, a, b : In(32)
    part : Out(PART)
        Of y, `Exponential.LATENCY` cycles later than x and a.
    takes_sigmoid : In(1)
    sigmoid : In(32)
    result : Out(32)
    """

    B_DELAY = Fp32Multiplier.LATENCY - 1

    def __init__(self) -> None:
        operands = {name: In(32) for name in "xyab"}
        super().__init__(
            {
                "operation": In(LaneOperation),
                "subtract": In(1),
                **operands,
                "part": Out(PART),
                "takes_sigmoid": In(1),
                "sigmoid": In(32),
                "result": Out(32),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        m.submodules.first = first = Fp32Multiplier()
        m.submodules.second = second = Fp32Multiplier()
        m.submodules.adder = adder = Fp32Adder()
        m.submodules.functions = functions = Exponential()
        gates = self.operation == LaneOperation.GATE
        rotates = self.operation == LaneOperation.ROTATE
        exponential = self.operation == LaneOperation.EXPONENTIAL
        product = first.product
        late_product = delayed(
            m, product, Exponential.LATENCY + Sigmoid.LATENCY - Fp32Multiplier.LATENCY
        )
        # What the units take is chosen a cycle before: they begin with much logic.
        b, argument = pipeline_stage(m, 1, b=self.b, argument=Mux(exponential, adder.sum, self.y))
        (second_a,) = pipeline_stage(
            m, 2, second_a=Mux(gates, late_product, Mux(rotates, self.y, product))
        )
        second_b = Signal(32, reset_less=True)
        with m.If(~gates):
            m.d.sync += second_b.eq(Mux(rotates, self.b, b))
        with m.Elif(self.takes_sigmoid):
            m.d.sync += second_b.eq(self.sigmoid)
        m.d.comb += [
            first.a.eq(self.x),
            first.b.eq(self.a),
            second.a.eq(second_a),
            second.b.eq(second_b),
            adder.a.eq(product),
            adder.b.eq(Mux(rotates, second.product, b)),
            adder.subtract.eq(Mux(rotates, self.subtract, exponential)),
            functions.x.eq(argument),
            self.part.eq(functions.part),
        ]
        with m.Switch(self.operation):
            with m.Case(LaneOperation.SCALE):
                m.d.comb += self.result.eq(product)
            with m.Case(LaneOperation.ADD_SCALED, LaneOperation.ROTATE):
                m.d.comb += self.result.eq(adder.sum)
            with m.Case(LaneOperation.EXPONENTIAL):
                m.d.comb += self.result.eq(functions.exponential)
            with m.Default():
                m.d.comb += self.result.eq(second.product)
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
