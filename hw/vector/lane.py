# SPDX-License-Identifier: Apache-2.0
"""One lane of the vector unit: two multipliers, an adder and the functions, in fixed chains."""

from __future__ import annotations

from amaranth.hdl import Elaboratable, Module, Mux, unsigned
from amaranth.lib import enum, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.logic import delayed, pipeline_stage
from speq.hw.vector.fp32_adder import Fp32Adder
from speq.hw.vector.fp32_multiplier import Fp32Multiplier
from speq.hw.vector.sigmoid import Sigmoid


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


#: Cycles from operands to result.
LATENCIES = {
    LaneOperation.SCALE: Fp32Multiplier.LATENCY,
    LaneOperation.SCALE_TWICE: 2 * Fp32Multiplier.LATENCY,
    LaneOperation.ADD_SCALED: Fp32Multiplier.LATENCY + Fp32Adder.LATENCY,
    LaneOperation.ROTATE: Fp32Multiplier.LATENCY + Fp32Adder.LATENCY,
    LaneOperation.EXPONENTIAL: (
        Fp32Multiplier.LATENCY + Fp32Adder.LATENCY + 1 + Sigmoid.EXPONENTIAL_LATENCY
    ),
    LaneOperation.GATE: 1 + Sigmoid.LATENCY + Fp32Multiplier.LATENCY,
}


class Lane(wiring.Component):
    """The operations of `LaneOperation` on FP32 numbers, each step rounded as a unit of its own.

    Latency `LATENCIES[operation]` cycles, operands in each cycle, no flow control. `operation`
    must stay the same from the operands to their results: the chains share the units. But for
    ROTATE, `b` is taken `B_DELAY` cycles after the other operands, when it is needed: so a sum can
    be the next one's operand as soon as possible.

    Members
    -------
    operation : In(LaneOperation)
    subtract : In(1)
        Of ROTATE; constant.
    x, y, a, b : In(32)
    result : Out(32)
    """

    B_DELAY = Fp32Multiplier.LATENCY

    def __init__(self) -> None:
        operands = {name: In(32) for name in "xyab"}
        super().__init__(
            {"operation": In(LaneOperation), "subtract": In(1), **operands, "result": Out(32)}
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        m.submodules.first = first = Fp32Multiplier()
        m.submodules.second = second = Fp32Multiplier()
        m.submodules.adder = adder = Fp32Adder()
        m.submodules.functions = functions = Sigmoid()
        gates = self.operation == LaneOperation.GATE
        rotates = self.operation == LaneOperation.ROTATE
        exponential = self.operation == LaneOperation.EXPONENTIAL
        product = first.product
        late_product = delayed(m, product, 1 + Sigmoid.LATENCY - Fp32Multiplier.LATENCY)
        # The functions begin with a multiplication.
        (argument,) = pipeline_stage(m, 1, argument=Mux(exponential, adder.sum, self.y))
        m.d.comb += [
            first.a.eq(self.x),
            first.b.eq(self.a),
            second.a.eq(Mux(gates, late_product, Mux(rotates, self.y, product))),
            second.b.eq(Mux(gates, functions.sigmoid, self.b)),
            adder.a.eq(product),
            adder.b.eq(Mux(rotates, second.product, self.b)),
            adder.subtract.eq(Mux(rotates, self.subtract, exponential)),
            functions.x.eq(argument),
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
