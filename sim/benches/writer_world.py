# SPDX-License-Identifier: Apache-2.0
"""A writer of memory under test, and its surroundings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
from amaranth.lib import data

from speq.hw.accelerator_config import AcceleratorConfig
from speq.sim.benches.axi import Memory, serve_writes
from speq.sim.benches.streams import Source
from speq.sim.benches.world import Ports, World
from speq.sim.runner import seed

#: Bytes of the memory, which fills a region that begins at a multiple of its size.
MEMORY_SIZE = 1 << 16
MEMORY_BASE = 5 * MEMORY_SIZE
#: Cycles after which a test gives up waiting.
_PATIENCE = 50_000


class WriterWorld(World):
    """The units of one of the configurations side by side, their memory and their streams.

    Parameters
    ----------
    dut : cocotb handle
    index : int
        Of the configuration.
    name : str
        What is tested.
    config : AcceleratorConfig
    layouts : layouts of the streams that go in, by name
    pause : float
        Share of cycles in which a stream or channel pauses.
    """

    def __init__(
        self,
        dut: Any,
        index: int,
        name: str,
        config: AcceleratorConfig,
        layouts: Mapping[str, data.Layout],
        pause: float,
    ) -> None:
        self.config = config
        rng = np.random.default_rng([seed(), index])
        super().__init__(dut, f"{name}, {config}", rng, _PATIENCE)
        self.ports = Ports(dut, f"u{index}")
        self.pause = pause
        self.layouts = layouts
        self.memory = Memory(self.rng.bytes(MEMORY_SIZE), MEMORY_BASE)

    @classmethod
    async def start(cls, *arguments: Any) -> Self:
        """After a reset."""
        world = cls(*arguments)
        world.start_clock()
        world.ports["base"].value = MEMORY_BASE
        world.ports["limit"].value = MEMORY_BASE + MEMORY_SIZE - 1
        world.ports["clear"].value = 0
        serve_writes(world.ports, world.memory, world.rng, world.pause)
        await world.reset()
        return world

    def connect(self) -> list[Callable[[int], None]]:
        self.sources = {name: Source(self.ports, name, self.rng) for name in self.layouts}
        for source in self.sources.values():
            source.pause = self.pause
        return [source.step for source in self.sources.values()]

    def add(self, stream: str, **fields: object) -> None:
        """Queue an item of a stream."""
        self.sources[stream].queue.append(self.layouts[stream].const(fields).as_bits())
