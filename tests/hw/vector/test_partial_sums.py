# SPDX-License-Identifier: Apache-2.0
"""The order of the additions that leave the sum of a row, against the golden model's."""

from __future__ import annotations

import numpy as np
import pytest
from amaranth.sim import Simulator, SimulatorContext

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from speq.hw.vector.partial_sums import PARTIAL_SUMS, PartialSums
from speq.model import vector_ops
from speq.model.vector_ops import row_sum
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed

CONFIGS = {
    "usual": AcceleratorConfig(EngineConfig(rows=3, cols=32), lanes=8),
    "narrow": AcceleratorConfig(EngineConfig(rows=2, cols=4), lanes=4),
    "one_word": AcceleratorConfig(EngineConfig(rows=2, cols=64), lanes=64),
    "wide": AcceleratorConfig(EngineConfig(rows=2, cols=128), lanes=16),
}
OTHER_DELAY, PAUSE, SCALE_PAUSE = 3, 9, 14


@pytest.mark.parametrize(
    "name", ["usual", "narrow", "wide", pytest.param("one_word", marks=pytest.mark.slow)]
)
def test_the_sums_of_rows_of_any_length(name: str, simulable_ram: None) -> None:
    config = CONFIGS[name]
    rows, cols, lanes = config.engine.rows, config.engine.cols, config.lanes
    dut = PartialSums(config, OTHER_DELAY, PAUSE, SCALE_PAUSE)
    rng = np.random.default_rng(seed())

    def word(values: np.ndarray) -> list[int]:
        return [int(pattern) for pattern in values.view(np.uint32)]

    def numbers(patterns: list[int]) -> np.ndarray:
        return np.array(patterns, np.uint32).view(np.float32)

    async def run(ctx: SimulatorContext) -> None:
        for tiles in (1, 2, 3, -(-PARTIAL_SUMS // cols), 20):
            count = int(rng.integers(1, rows + 1))
            elements = rng.standard_normal((count, min(PARTIAL_SUMS, tiles * cols)))
            partials = elements.astype(np.float32)
            for row in range(count):
                for slot in range(partials.shape[1] // lanes):
                    ctx.set(dut.write_enable, 1)
                    ctx.set(dut.write_row, row)
                    ctx.set(dut.write_slot, slot)
                    ctx.set(dut.write_data, word(partials[row, slot * lanes : (slot + 1) * lanes]))
                    await ctx.tick()
            ctx.set(dut.write_enable, 0)
            ctx.set(dut.last_row, count - 1)
            ctx.set(dut.tiles, tiles)
            ctx.set(dut.start, 1)
            await ctx.tick()
            ctx.set(dut.start, 0)
            got: dict[int, int] = {}
            begun: dict[int, tuple[int, int, bool]] = {}
            firsts: dict[int, list[int]] = {}
            due: dict[int, tuple[int, int, np.ndarray]] = {}
            cycle = 0
            while ctx.get(dut.busy):
                if ctx.get(dut.adds):
                    begun[cycle] = ctx.get(dut.row), ctx.get(dut.slot), bool(ctx.get(dut.scales))
                if cycle - 1 in begun:
                    firsts[cycle - 1] = list(ctx.get(dut.first))
                start = cycle - 1 - OTHER_DELAY
                if start in begun:
                    row, slot, scales = begun[start]
                    if scales:
                        got[row] = firsts[start][0]
                    else:
                        total = numbers(firsts[start]) + numbers(list(ctx.get(dut.other)))
                        # As late as it may be.
                        due[start + PAUSE - 1] = row, slot, total
                ctx.set(dut.write_enable, cycle in due)
                if cycle in due:
                    row, slot, total = due[cycle]
                    ctx.set(dut.write_row, row)
                    ctx.set(dut.write_slot, slot)
                    ctx.set(dut.write_data, word(total))
                await ctx.tick()
                cycle += 1
            ctx.set(dut.write_enable, 0)
            assert cycle - max(begun) == SCALE_PAUSE
            assert list(got) == list(range(count))
            assert_equal_bits(
                f"PartialSums, seed {seed()}, {tiles} tiles",
                expected=row_sum(partials).view(np.uint32),
                got=np.array([got[row] for row in range(count)], np.uint32),
            )

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(run)
    simulator.run()


def test_they_are_as_many_as_in_the_golden_model() -> None:
    assert PARTIAL_SUMS == vector_ops.PARTIAL_SUMS
