# SPDX-License-Identifier: Apache-2.0
"""A reader of memory under test, and its surroundings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.memory.axi import AxiConfig, Fault
from speq.sim.benches.axi import Memory, ReadResponder, Transfer, expected_bursts, serve_reads
from speq.sim.benches.streams import Sink, Source
from speq.sim.benches.world import Ports, World

#: Bytes of the memory, which fills a region that begins at a multiple of its size.
MEMORY_SIZE = 1 << 17
#: Cycles after which a test gives up waiting.
_PATIENCE = 30_000


@dataclass(frozen=True)
class ReaderJob:
    """A reader's command, the words that it asks for, and the transfers (address and beats) that
    it leads to, by plane."""

    command: int
    words: list[int]
    transfers: dict[str, list[Transfer]]


class ReaderWorld(World):
    """The reader under test and its surroundings.

    Parameters
    ----------
    dut : cocotb handle
    unit : str
        Name of the reader among the units side by side.
    stream : str
        Its stream of words.
    config : AcceleratorConfig
    port_config : AxiConfig
        Of the port that it reads.
    rng : numpy.random.Generator
    independent : bool
        Whether memory is cocotbext-axi's model, otherwise it is a responder.
    """

    def __init__(
        self,
        dut: Any,
        unit: str,
        stream: str,
        config: AcceleratorConfig,
        port_config: AxiConfig,
        rng: np.random.Generator,
        *,
        independent: bool,
    ) -> None:
        self.config, self.port_config = config, port_config
        self.ports, self.stream = Ports(dut, unit), stream
        self.independent = independent
        super().__init__(dut, f"{unit}, {config}", rng, _PATIENCE)
        content = self.rng.integers(0, 256, MEMORY_SIZE, np.uint8).tobytes()
        regions = (1 << config.address_bits) // MEMORY_SIZE
        self.memory = Memory(content, int(self.rng.integers(1, regions - 1)) * MEMORY_SIZE)

    async def begin(self, pause: float) -> None:
        """Start the clock and reset the reader; all channels pause in such a share of cycles."""
        self.start_clock()
        for name in ("clear", "axi__arready", "axi__rvalid"):
            self.ports[name].value = 0
        self.ports["base"].value = self.memory.base
        self.set_limit(self.memory.base + MEMORY_SIZE - 1)
        if self.independent:
            serve_reads(self.ports, self.memory, self.rng, pause)
        await self.reset()
        self.command.pause = self.words.pause = pause

    def connect(self) -> list[Callable[[int], None]]:
        self.command = Source(self.ports, "command", self.rng)
        self.words = Sink(self.ports, self.stream, self.rng)
        agents = [self._check_busy, self.command.step, self.words.step]
        if not self.independent:
            self.responder = ReadResponder(self.ports, self.port_config, self.memory)
            agents.append(self.responder.step)
        return agents

    def _check_busy(self, cycle: int) -> None:
        if self.words.valid.value:
            assert self.ports.get("busy"), f"{self.name}: cycle {cycle}: a word, but not busy"

    def set_limit(self, limit: int) -> None:
        """Set the region's last address."""
        self.ports["limit"].value = limit

    def idle(self) -> bool:
        """Whether the reader has nothing to do."""
        return self.command.is_done(self.cycle) and not self.ports.get("busy")

    def has_error(self) -> bool:
        """Whether the reader reports an error."""
        return self.ports.get("error") != Fault.NONE.value

    async def clear(self, cycles: int = 1) -> None:
        """Clear the reader and wait until it is idle; no word of before may come any more."""
        self.command.withdraw()
        self.ports["clear"].value = 1
        await self.step()
        self.words.forget_offer()
        received = len(self.words.items)
        await self.step(cycles - 1)
        self.ports["clear"].value = 0
        await self.step()
        await self.until("cleared", self.idle)
        assert len(self.words.items) == received, f"{self.name}: words behind a clear"
        self.ports.check(self.cycle, error=Fault.NONE.value)

    def place(self, size: int) -> int:
        """A random address of a buffer of `size` bytes."""
        alignment = self.config.alignment
        places = (MEMORY_SIZE - size) // alignment + 1
        return self.memory.base + int(self.rng.integers(0, places)) * alignment

    async def do(self, jobs: Sequence[ReaderJob]) -> None:
        """Let the reader do jobs, and compare the words."""
        first = len(self.words.items)
        self.command.queue.extend(job.command for job in jobs)
        await self.until("the jobs are finished", self.idle)
        self.ports.check(self.cycle, error=Fault.NONE.value)
        self.words.check([word for job in jobs for word in job.words], first)

    async def rate(self, jobs: Sequence[ReaderJob]) -> float:
        """Words per cycle of jobs, from the first word to the last."""
        first = len(self.words.items)
        await self.do(jobs)
        cycles = self.words.cycles[first:]
        return len(cycles) / (cycles[-1] - cycles[0] + 1)

    def check_error(self, error: Fault, address: int) -> None:
        """Compare the report of an error with what it should be."""
        self.ports.check(self.cycle, error=error.value, error_address=address)

    def spoil(self, transfer: Transfer, response: int) -> int:
        """Let a random beat of a transfer have a bad response; the address of its burst."""
        address, beats = transfer
        bad = address + int(self.rng.integers(0, beats)) * self.port_config.beat_bytes
        self.responder.responses[bad] = response
        bursts = expected_bursts(self.port_config, [transfer])
        return max(first for first, _ in bursts if first <= bad)
