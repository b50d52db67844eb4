# SPDX-License-Identifier: Apache-2.0
"""Testbench of the sampling noise's transform, against the golden function.

It takes new bits in every cycle: on both sides of every place at which a table's next polynomial
begins, and random ones of every magnitude.
"""

from __future__ import annotations

from typing import Any

import cocotb
import numpy as np
from amaranth.hdl import Elaboratable, Module
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.common.unit import Unit
from speq.hw.sampling.gumbel_transform import GumbelTransform
from speq.hw.verilog import convert_unit
from speq.model.gumbel import transform
from speq.model.noise_format import SEGMENTS
from speq.sim.benches.stimulus import WORD_BITS, file_bench_verilog, play_files
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed, simulate

#: Transforms side by side: accesses to signals are what a simulation's time goes to.
_TRANSFORMS = 16
_CYCLES = 32_000


class _Transforms(wiring.Component):
    """Transforms side by side, two results in each word of what is observed."""

    def __init__(self, transform: GumbelTransform) -> None:
        self.transform = transform
        super().__init__(
            {
                "stimulus": In(data.ArrayLayout(WORD_BITS, _TRANSFORMS)),
                "observed": Out(data.ArrayLayout(32, _TRANSFORMS)),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        for i in range(_TRANSFORMS):
            m.submodules[f"transform_{i}"] = unit = Unit("gumbel_transform", self.transform)
            m.d.comb += [unit.bits.eq(self.stimulus[i]), self.observed[i].eq(unit.noise)]
        return m


def run() -> None:
    """Check the transform."""
    unit = GumbelTransform()
    verilog = file_bench_verilog(_Transforms(unit), "transform_tb")
    verilog += convert_unit(unit, "gumbel_transform", reset=False)
    simulate(verilog, "transform_tb", __name__)


@cocotb.test()
async def every_value(dut: Any) -> None:
    """Directed and random bits, each value exactly `LATENCY` cycles after its bits."""
    bits = _bits(np.random.default_rng(seed()))
    dut._log.info(f"seed {seed()}: {bits.size:,} values")
    idle = np.zeros((GumbelTransform.LATENCY, _TRANSFORMS), np.uint64)
    observed = await play_files(dut, np.concatenate([bits, idle]))
    got = observed.view(np.uint32)[GumbelTransform.LATENCY :]
    assert_equal_bits(
        "GumbelTransform.noise",
        expected=transform(bits).view(np.uint32),
        got=got,
        operands={"bits": bits},
        cycles=np.arange(len(bits))[:, None],
    )


def _bits(rng: np.random.Generator) -> np.ndarray:
    """Random and directed bits in random order, uint64 [cycles, transforms]."""
    edges = {SEGMENTS + part << shift for part in range(SEGMENTS) for shift in range(57)}
    edges |= {part << 57 for part in range(2 * SEGMENTS)}
    parts = np.exp2(np.arange(-SEGMENTS, 6 * SEGMENTS) / SEGMENTS)
    edges |= {int(x * 2.0**64) for x in np.exp(-parts)}
    near = {edge + i for edge in edges for i in (-2, -1, 0, 1)} | {0, 1, 2**63 - 1, 2**63}
    near = np.array([edge for edge in near if 0 <= edge < 2**64], np.uint64)
    directed = np.concatenate([near, ~near])
    count = _CYCLES * _TRANSFORMS - len(directed)
    random = rng.integers(0, 2**64, count, np.uint64, endpoint=False)
    random[::2] >>= rng.integers(0, 64, len(random[::2])).astype(np.uint64)
    random[::4] = ~random[::4]
    return rng.permutation(np.concatenate([directed, random])).reshape(-1, _TRANSFORMS)
