# SPDX-License-Identifier: Apache-2.0
"""The masks of the attention against the rules, row by row and entry by entry."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from amaranth.sim import Simulator, SimulatorContext

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from speq.hw.vector.attention_mask import AttentionMask
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed

CONFIGS = {
    "usual": AcceleratorConfig(EngineConfig(rows=8, cols=32, max_k=100), lanes=8),
    "odd_rows": AcceleratorConfig(EngineConfig(rows=5, cols=16, max_k=63), lanes=4),
    "wide": AcceleratorConfig(EngineConfig(rows=3, cols=16, max_k=200), lanes=16),
    "one_row": AcceleratorConfig(EngineConfig(rows=1, cols=4, max_k=9), lanes=4),
    "smallest": AcceleratorConfig(EngineConfig(rows=1, cols=4, max_k=1), lanes=4),
}


@dataclass(frozen=True)
class Pass:
    """A pass: the rows' parents, entries before it, the window or 0."""

    parents: tuple[int, ...]
    position: int
    window: int

    @property
    def depths(self) -> list[int]:
        depths: list[int] = []
        for row, parent in enumerate(self.parents):
            depths.append(depths[parent] + 1 if row else 0)
        return depths

    def seen(self, entries: int) -> np.ndarray:
        """bool [rows, entries]: from the rules, an entry at a time."""
        seen = np.zeros((len(self.parents), entries), bool)
        for row, depth in enumerate(self.depths):
            path = {row}
            ancestor = row
            while ancestor:
                ancestor = self.parents[ancestor]
                path.add(ancestor)
            place = self.position + depth
            for entry in range(self.position):
                seen[row, entry] = not self.window or place - entry < self.window
            for other in path:
                near = not self.window or depth - self.depths[other] < self.window
                seen[row, self.position + other] = near
        return seen


def passes(config: AcceleratorConfig) -> list[Pass]:
    rng = np.random.default_rng(seed())
    rows, most = config.engine.rows, config.engine.max_k
    chain = tuple(max(0, row - 1) for row in range(rows))
    found = [Pass(chain, 0, 0), Pass(chain, most - rows, 0), Pass((0,), most - 1, 0)]
    found += [Pass(chain, most - rows, window) for window in (1, 2, rows, most, 2**32 - 1)]
    for _ in range(30):
        count = int(rng.integers(1, rows + 1))
        parents = tuple(int(rng.integers(max(1, row))) for row in range(count))
        position = int(rng.integers(0, most - count + 1))
        windows = rng.integers(1, (most + 1, 2**32)).tolist()
        window = int(rng.choice([0, 1, 2, *windows]))
        found.append(Pass(parents, position, window))
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_every_entry_of_every_row(name: str, simulable_ram: None) -> None:
    config = CONFIGS[name]
    lanes, cols = config.lanes, config.engine.cols
    entries = -(-config.engine.max_k // cols) * cols
    dut = AttentionMask(config)
    rng = np.random.default_rng(seed())

    async def run(ctx: SimulatorContext) -> None:
        for case in passes(config):
            depths = case.depths
            # What is behind the rows of the pass may be anything.
            for row in range(config.engine.rows):
                is_row = row < len(depths)
                any_row = int(rng.integers(config.engine.rows))
                ctx.set(dut.rows[row].depth, depths[row] if is_row else any_row)
                ctx.set(dut.rows[row].parent, case.parents[row] if is_row else any_row)
            ctx.set(dut.start, 1)
            ctx.set(dut.count, len(depths))
            ctx.set(dut.position, case.position)
            ctx.set(dut.window, case.window)
            await ctx.tick()
            ctx.set(dut.start, 0)
            ctx.set(dut.position, int(rng.integers(config.engine.max_k)))
            cycles = 0
            while ctx.get(dut.busy):
                await ctx.tick()
                cycles += 1
            assert cycles == 4 * len(depths)
            words = entries // lanes
            places = [(row, word) for row in range(len(depths)) for word in range(words)]
            got = []
            for row, word in places + [(0, 0)] * dut.LATENCY:
                ctx.set(dut.row, row)
                ctx.set(dut.word, word)
                got.append(ctx.get(dut.seen))
                await ctx.tick()
            weights = 1 << np.arange(lanes, dtype=np.uint64)
            assert_equal_bits(
                f"AttentionMask.seen, seed {seed()}, {case}",
                expected=(case.seen(entries).reshape(-1, lanes) * weights).sum(axis=1),
                got=np.array(got[dut.LATENCY :], np.uint64),
                operands=dict(zip(("row", "word"), np.array(places).T, strict=True)),
            )

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(run)
    simulator.run()


def test_it_needs_lanes() -> None:
    with pytest.raises(ValueError, match="lanes is 0"):
        AttentionMask(AcceleratorConfig(lanes=0))
