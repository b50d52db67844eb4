# SPDX-License-Identifier: Apache-2.0
"""Streams in Amaranth's simulator: both ends, with random pauses, and a unit between them."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import numpy as np
from amaranth.hdl import Value
from amaranth.sim import Simulator, SimulatorContext

from speq.sim.runner import seed

Rng = random.Random | np.random.Generator


class Source:
    """Offers items on a stream, in random cycles if `pause` is not 0.

    `taken` are the cycles in which they were taken.
    """

    def __init__(self, stream: Any, items: Iterable, rng: Rng, pause: float = 0) -> None:
        self.stream, self.items, self.rng, self.pause = stream, list(items), rng, pause
        self.taken: list[int] = []

    async def run(self, ctx: SimulatorContext) -> None:
        """The testbench."""
        cycle = 0
        for item in self.items:
            while self.rng.random() < self.pause:
                await ctx.tick()
                cycle += 1
            ctx.set(self.stream.payload, item)
            ctx.set(self.stream.valid, 1)
            ready = False
            while not ready:
                *_, ready = await ctx.tick().sample(self.stream.ready)
                cycle += 1
            self.taken.append(cycle - 1)
            ctx.set(self.stream.valid, 0)


class Sink:
    """Takes a stream, in random cycles if `pause` is not 0, and sees that offers stay.

    `items` are the payloads, `bits` the same as numbers, `cycles` those in which they were taken.
    """

    def __init__(self, stream: Any, rng: Rng, pause: float = 0) -> None:
        self.stream, self.rng, self.pause = stream, rng, pause
        self.items: list = []
        self.bits: list[int] = []
        self.cycles: list[int] = []

    async def run(self, ctx: SimulatorContext) -> None:
        """The testbench, to run in the background."""
        cycle, offer, ready = 0, None, False
        while True:
            ready = self.rng.random() >= self.pause
            ctx.set(self.stream.ready, ready)
            *_, valid, payload, bits = await ctx.tick().sample(
                self.stream.valid, self.stream.payload, Value.cast(self.stream.payload)
            )
            if offer is not None:
                assert valid, f"cycle {cycle}: an offer was withdrawn"
                assert bits == offer, f"cycle {cycle}: an offer changed: {offer:#x} to {bits:#x}"
            offer = bits if valid and not ready else None
            if valid and ready:
                self.items.append(payload)
                self.bits.append(bits)
                self.cycles.append(cycle)
            cycle += 1


class Pulses:
    """The cycles in which a signal is high."""

    def __init__(self, signal: Any) -> None:
        self.signal = signal
        self.cycles: list[int] = []

    async def run(self, ctx: SimulatorContext) -> None:
        """The testbench, to run in the background."""
        cycle = 0
        async for *_, value in ctx.tick().sample(self.signal):
            if value:
                self.cycles.append(cycle)
            cycle += 1


def simulate(
    dut: Any,
    sources: Iterable[Source],
    sinks: Iterable[Sink],
    finished: Callable[[], bool],
    *more: Callable[[SimulatorContext], Coroutine],
    patience: int = 100_000,
) -> None:
    """Run until all sources are empty and `finished`, and some cycles longer.

    Further testbenches, `more`, run in the background.
    """

    async def wait(ctx: SimulatorContext) -> None:
        for _ in range(patience):
            if all(len(s.taken) == len(s.items) for s in sources) and finished():
                await ctx.tick().repeat(20)
                return
            await ctx.tick()
        raise AssertionError(f"seed {seed()}: not within {patience} cycles")

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    for agent in (*sources, *sinks):
        simulator.add_testbench(agent.run, background=True)
    for testbench in more:
        simulator.add_testbench(testbench, background=True)
    simulator.add_testbench(wait)
    simulator.run()
