# SPDX-License-Identifier: Apache-2.0
"""Testbench of a lane of the vector unit: every operation, and the vector operations made of them.

The design under test holds lanes side by side, which share sigmoids; each takes new operands as
often as it can.
"""

from __future__ import annotations

from typing import Any

import cocotb
import numpy as np
from amaranth.hdl import Elaboratable, Module
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.ieee754 import FP32_NAN
from speq.hw.common.unit import Unit
from speq.hw.vector.lane import LATENCIES, PACES, SHARING, Lane, LaneOperation, SharedSigmoid
from speq.hw.vector.sigmoid import Exponential
from speq.hw.verilog import convert_unit
from speq.model.vector_ops import exponential, sigmoid
from speq.sim.benches.stimulus import WORD_BITS, file_bench_verilog, play_files
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed, simulate

_LANES = 8
_CYCLES = 10_000  # of each operation
_DRAIN = max(LATENCIES.values()) + 1
_UNITS = {"lane": Lane(), "shared_sigmoid": SharedSigmoid()}
#: The turn of the sigmoids in phase 0.
_TURNS = -(1 + Exponential.LATENCY)


class _Bench(wiring.Component):
    """Lanes side by side. Two words of stimulus are a lane's operands; a last one holds the
    operation, above it the bits `subtract`, the turn of the sigmoids and the phase."""

    def __init__(self) -> None:
        super().__init__(
            {
                "stimulus": In(data.ArrayLayout(WORD_BITS, 2 * _LANES + 1)),
                "observed": Out(data.ArrayLayout(32, _LANES)),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        flags = self.stimulus[2 * _LANES]
        sigmoids = []
        for i in range(_LANES // SHARING):
            sigmoids.append(Unit("shared_sigmoid", _UNITS["shared_sigmoid"]))
            m.submodules[f"sigmoid_{i}"] = sigmoids[i]
            m.d.comb += sigmoids[i].turn.eq(flags[8 + _LANES :][:2])
        for i in range(_LANES):
            m.submodules[f"lane_{i}"] = lane = Unit("lane", _UNITS["lane"])
            shared, place = sigmoids[i // SHARING], i % SHARING
            words = self.stimulus[2 * i], self.stimulus[2 * i + 1]
            m.d.comb += [
                lane.operation.eq(flags[:8]),
                lane.subtract.eq(flags[8 + i]),
                lane.phase.eq(flags[16 + _LANES :][:2]),
                lane.x.eq(words[0][:32]),
                lane.y.eq(words[0][32:]),
                lane.a.eq(words[1][:32]),
                lane.b.eq(words[1][32:]),
                shared.parts[place].eq(lane.part),
                lane.takes_sigmoid.eq(shared.takes[place]),
                lane.sigmoid.eq(shared.sigmoid),
                self.observed[i].eq(lane.result),
            ]
        return m


def run() -> None:
    """Check the lane."""
    verilog = file_bench_verilog(_Bench(), "lane_tb")
    modules = [convert_unit(unit, name, reset=False) for name, unit in _UNITS.items()]
    simulate(verilog + "".join(modules), "lane_tb", __name__)


@cocotb.test()
async def every_operation(dut: Any) -> None:
    """Operands of every magnitude and sign, infinities and NaNs among them, one operation after the
    other; each result exactly as many cycles later as `LATENCIES` says."""
    rng = np.random.default_rng(seed())
    dut._log.info(f"seed {seed()}")
    subtract = rng.integers(0, 2, _LANES)
    flags = int((subtract << np.arange(_LANES)).sum()) << 8
    operands, stimulus = {}, []
    for operation in LaneOperation:
        values = _operands(rng)
        pace = PACES[operation]
        values = values[np.arange(_CYCLES) // pace * pace]
        operands[operation] = values
        words = np.zeros((_CYCLES + _DRAIN, 2 * _LANES + 1), np.uint64)
        patterns = np.pad(values, ((0, _DRAIN), (0, 0), (0, 0)))
        if operation is LaneOperation.ROTATE:
            patterns[:_CYCLES:2, :, [0, 2]] = values[::2, :, [1, 3]]
        patterns[..., 3] = np.roll(patterns[..., 3], Lane.B_DELAY, axis=0)
        words[:, :-1] = patterns.view(np.uint64).reshape(len(words), -1)
        phases = np.arange(len(words)) % SHARING
        turns = (phases + _TURNS) % SHARING
        words[:, -1] = phases << 16 + _LANES | turns << 8 + _LANES | flags | operation.value
        stimulus.append(words)
    observed = await play_files(dut, np.concatenate(stimulus))
    parts = np.split(observed.view(np.uint32), len(LaneOperation))
    for (operation, values), got in zip(operands.items(), parts, strict=True):
        step = PACES[operation]
        x, y, a, b = (values[::step, :, i] for i in range(4))
        latency = LATENCIES[operation]
        assert_equal_bits(
            f"Lane.result, {operation.name}",
            expected=_expected(operation, subtract, x, y, a, b),
            got=got[latency:][:_CYCLES:step],
            operands={"x": x, "y": y, "a": a, "b": b},
            cycles=latency + np.arange(_CYCLES)[::step, None],
        )


def _operands(rng: np.random.Generator) -> np.ndarray:
    """FP32 patterns x, y, a, b, uint32 [cycles, lanes, 4]: most of magnitudes that meet in a model,
    so that sums cancel and functions are neither 0 nor 1."""
    shape = (_CYCLES, _LANES, 4)
    usual = (rng.standard_normal(shape) * 4).astype(np.float32).view(np.uint32)
    wild = rng.integers(0, 1 << 32, shape, np.uint32)
    return np.where(rng.random(shape) < 0.9, usual, wild)


def _expected(operation: LaneOperation, subtract: np.ndarray, *operands: np.ndarray) -> np.ndarray:
    """Result bits, uint32 [cycles, lanes], with NumPy's float32 and the golden functions."""
    x, y, a, b = (np.ascontiguousarray(operand).view(np.float32) for operand in operands)
    with np.errstate(all="ignore"):
        match operation:
            case LaneOperation.SCALE:
                result = x * a
            case LaneOperation.SCALE_TWICE:
                result = (x * a) * b
            case LaneOperation.ADD_SCALED:
                result = x * a + b
            case LaneOperation.ROTATE:
                result = np.where(subtract, x * a - y * b, x * a + y * b)
            case LaneOperation.EXPONENTIAL:
                result = exponential(x * a - b)
            case LaneOperation.GATE:
                result = (x * a) * sigmoid(y)
    return np.where(np.isnan(result), np.uint32(FP32_NAN), result.view(np.uint32))
