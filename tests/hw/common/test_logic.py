# SPDX-License-Identifier: Apache-2.0
"""Counting in pieces, against Python's integers."""

from __future__ import annotations

import random

import pytest
from amaranth.hdl import Module, Signal
from amaranth.sim import Simulator, SimulatorContext

from speq.hw.common.logic import decremented, incremented
from speq.sim.runner import seed


@pytest.mark.parametrize("bits", [1, 8, 9, 35])
def test_counting_by_one(bits: int) -> None:
    m = Module()
    value, carry, up, down = Signal(bits), Signal(), Signal(bits), Signal(bits)
    m.d.comb += [up.eq(incremented(value, carry)), down.eq(decremented(value))]
    rng = random.Random(seed())
    ends = [(1 << place) - less for place in range(bits + 1) for less in (0, 1) if place or less]
    values = [number % (1 << bits) for number in ends] + [rng.getrandbits(bits) for _ in range(200)]

    async def check(context: SimulatorContext) -> None:
        for number in values:
            context.set(value, number)
            for added in (0, 1):
                context.set(carry, added)
                assert context.get(up) == (number + added) % (1 << bits), f"seed {seed()}, {number}"
            assert context.get(down) == (number - 1) % (1 << bits), f"seed {seed()}, {number}"

    simulator = Simulator(m)
    simulator.add_testbench(check)
    simulator.run()
