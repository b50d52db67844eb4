# SPDX-License-Identifier: Apache-2.0
"""Streams in Amaranth's simulator: both ends, with random pauses."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from amaranth.hdl import Value
from amaranth.sim import SimulatorContext


class Source:
    """Offers items on a stream, in random cycles if `pause` is not 0.

    `taken` are the cycles in which they were taken.
    """

    def __init__(self, stream: Any, items: Iterable, rng: random.Random, pause: float = 0) -> None:
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

    `items` are the payloads, `cycles` those in which they were taken.
    """

    def __init__(self, stream: Any, rng: random.Random, pause: float = 0) -> None:
        self.stream, self.rng, self.pause = stream, rng, pause
        self.items: list = []
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
                self.cycles.append(cycle)
            cycle += 1
