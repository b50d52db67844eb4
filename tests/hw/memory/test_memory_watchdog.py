# SPDX-License-Identifier: Apache-2.0
"""MemoryWatchdog against a few lines of Python, on random transactions."""

from __future__ import annotations

import random

from amaranth.sim import Simulator, SimulatorContext

from speq.hw.memory.memory_watchdog import MemoryWatchdog
from speq.sim.runner import seed
from tests.hw.verilog_tools import lint, write_unit

CHANNELS = 3


def test_it_says_when_memory_is_silent() -> None:
    """Time-outs of all lengths, beats and offers at any time, an answer in the last cycle."""
    print(f"SPEQ_SEED={seed()}")
    rng = random.Random(seed())
    unit = MemoryWatchdog(CHANNELS)
    seen = {0: 0, 1: 0}

    async def testbench(ctx: SimulatorContext) -> None:
        outstanding, quiet, expected = [0] * CHANNELS, 0, 0
        for _ in range(300):
            timeout = rng.choice([0, 1, 2, rng.randint(3, 12), 2**32 - 1])
            activity = rng.choice([0.02, 0.2, 0.8])
            ctx.set(unit.timeout, timeout)
            for _ in range(20):
                requests = [rng.random() < activity / 4 for _ in outstanding]
                answers = [n > 0 and rng.random() < activity / 2 for n in outstanding]
                offer = any(requests) or rng.random() < activity / 8
                moves = any(requests) or any(answers) or rng.random() < activity / 8
                for name, bits in (("requests", requests), ("answers", answers)):
                    ctx.set(getattr(unit, name), sum(bit << i for i, bit in enumerate(bits)))
                ctx.set(unit.offer, offer)
                ctx.set(unit.transfer, moves)
                assert ctx.get(unit.silent) == expected, f"SPEQ_SEED={seed()}"
                seen[expected] += 1
                waits = any(outstanding) or offer
                quiet = quiet + 1 if waits and not moves else 0
                expected = int(0 < timeout <= quiet)
                changes = zip(outstanding, requests, answers, strict=True)
                outstanding = [n + more - less for n, more, less in changes]
                await ctx.tick()

    simulator = Simulator(unit)
    simulator.add_clock(1e-9)
    simulator.add_testbench(testbench)
    simulator.run()
    assert min(seen.values()) > 300, "the trials prove too little"


def test_verilator_lints_it_without_a_warning(tmp_path) -> None:
    name = "speq_memory_watchdog"
    assert lint(name, write_unit(MemoryWatchdog(CHANNELS), name, tmp_path)) == (0, "")
