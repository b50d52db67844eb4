# SPDX-License-Identifier: Apache-2.0
"""What benches of units with flow control have in common: units side by side, and their world.

A simulation holds the same unit with several configurations; each test looks at one of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from amaranth.hdl import Elaboratable, Module
from amaranth.lib import wiring
from amaranth.lib.wiring import Out
from cocotb.clock import Clock
from cocotb.triggers import RisingEdge

from speq.sim.runner import seed

_CLOCK_NS = 2


class SideBySide(wiring.Component):
    """Units side by side, each with its own ports, which begin with its name.

    Parameters
    ----------
    units : dict
        Components by name.
    """

    def __init__(self, units: Mapping[str, wiring.Component]) -> None:
        self.units = units
        super().__init__({name: Out(unit.signature) for name, unit in units.items()})

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        for name, unit in self.units.items():
            m.submodules[name] = unit
            wiring.connect(m, wiring.flipped(getattr(self, name)), unit)
        return m


class Ports:
    """The ports of one of the units side by side, by their names without the unit's.

    Parameters
    ----------
    dut : cocotb handle
        The module of `SideBySide`.
    unit : str
    """

    def __init__(self, dut: Any, unit: str) -> None:
        self.dut, self.unit = dut, unit

    def __getitem__(self, name: str) -> Any:
        return getattr(self.dut, f"{self.unit}__{name}")

    def get(self, name: str) -> int:
        """Value of a port."""
        return int(self[name].value)

    def check(self, cycle: int, **expected: int) -> None:
        """Compare outputs with what they should be."""
        for name, value in expected.items():
            got = self.get(name)
            assert got == value, (
                f"{self.unit}.{name}: cycle {cycle}: expected {value:#x}, got {got:#x}"
            )


class World:
    """A unit under test and what is around it, cycle by cycle.

    Parameters
    ----------
    dut : cocotb handle
    name : str
        For messages.
    rng : numpy.random.Generator
        Of all that is random.
    patience : int
        Cycles after which `until` gives up.

    Attributes
    ----------
    cycle : int
        Clock cycles since the first reset.
    agents : list of functions
        Called with `cycle` after each clock edge, in this order; see `connect`.
    """

    def __init__(
        self, dut: Any, name: str, rng: np.random.Generator, patience: int = 10_000
    ) -> None:
        self.dut, self.name, self.rng, self.patience = dut, name, rng, patience
        self.cycle = 0
        self.agents: list[Callable[[int], None]] = []
        dut._log.info(f"seed {seed()}, {name}")

    def connect(self) -> list[Callable[[int], None]]:
        """New agents, as after each reset."""
        return []

    def start_clock(self) -> None:
        """Start the clock."""
        Clock(self.dut.clk, _CLOCK_NS, "ns").start()

    async def reset(self, cycles: int = 3) -> None:
        """Reset everything; what was on its way is forgotten."""
        self.dut.rst.value = 1
        for _ in range(cycles):
            await RisingEdge(self.dut.clk)
        self.dut.rst.value = 0
        self.agents = self.connect()
        await RisingEdge(self.dut.clk)

    async def step(self, cycles: int = 1) -> None:
        """Let clock cycles pass."""
        for _ in range(cycles):
            await RisingEdge(self.dut.clk)
            self.cycle += 1
            for agent in self.agents:
                agent(self.cycle)

    async def until(self, what: str | Callable[[], str], condition: Callable[[], bool]) -> None:
        """Let clock cycles pass until something is so, which `what` describes for the message."""
        for _ in range(self.patience):
            if condition():
                return
            await self.step()
        raise AssertionError(
            f"{self.name}: cycle {self.cycle}: seed {seed()}: not within {self.patience} cycles: "
            f"{what if isinstance(what, str) else what()}"
        )


def pauses(rng: np.random.Generator, share: float) -> Iterator[bool]:
    """Whether to pause, cycle by cycle, with random numbers of its own."""
    own = np.random.default_rng(rng.integers(1 << 32))
    return (bool(own.random() < share) for _ in itertools.count())
