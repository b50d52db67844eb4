# SPDX-License-Identifier: Apache-2.0
"""Both ends of a stream in cocotb, with random pauses."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from speq.sim.benches.world import Ports
from speq.sim.compare import assert_equal_bits


class Source:
    """Offers the items of `queue` on a stream, in random cycles if `pause` is not 0.

    Parameters
    ----------
    ports : Ports
    stream : str
    rng : numpy.random.Generator

    Attributes
    ----------
    queue : deque of int
        Payloads that have not been taken.
    taken : list of int
        Cycles in which payloads were taken.
    """

    def __init__(self, ports: Ports, stream: str, rng: np.random.Generator) -> None:
        self.valid, self.ready, self.payload = _ports(ports, stream)
        self.rng = rng
        self.pause = 0.0
        self.queue: deque[int] = deque()
        self.taken: list[int] = []
        self.offered = False
        self.valid.value = 0

    def step(self, cycle: int) -> None:
        """After the edge that begins a cycle."""
        was_offered = self.offered
        if self.offered and int(self.ready.value):
            self.queue.popleft()
            self.taken.append(cycle)
            self.offered = False
        if not self.offered and self.queue and self.rng.random() >= self.pause:
            self.payload.value = self.queue[0]
            self.offered = True
        if self.offered != was_offered:
            self.valid.value = self.offered

    def is_done(self, cycle: int) -> bool:
        """Whether everything was taken before this cycle."""
        return not self.queue and self.taken[-1:] != [cycle]

    def withdraw(self) -> None:
        """Forget what has not been taken."""
        self.queue.clear()
        self.offered = False
        self.valid.value = 0


class Sink:
    """Takes a stream, in random cycles if `pause` is not 0, and sees that offers stay.

    Parameters
    ----------
    ports : Ports
    stream : str
    rng : numpy.random.Generator

    Attributes
    ----------
    items, cycles : list of int
        Payloads, and the cycles in which they were taken.
    """

    def __init__(self, ports: Ports, stream: str, rng: np.random.Generator) -> None:
        self.valid, self.ready, self.payload = _ports(ports, stream)
        self.name = f"{ports.unit}.{stream}"
        self.rng = rng
        self.pause = 0.0
        self.items: list[int] = []
        self.cycles: list[int] = []
        self.is_ready = False
        self.offer: int | None = None
        self.ready.value = 0

    def step(self, cycle: int) -> None:
        """After the edge that begins a cycle."""
        valid = int(self.valid.value)
        if valid or self.offer is not None:
            payload = int(self.payload.value)
            if self.offer is not None:
                assert valid, f"{self.name}: cycle {cycle}: an offer was withdrawn"
                assert payload == self.offer, (
                    f"{self.name}: cycle {cycle}: an offer changed: "
                    f"expected {self.offer:#x}, got {payload:#x}"
                )
            self.offer = None if self.is_ready else payload
            if self.is_ready:
                self.items.append(payload)
                self.cycles.append(cycle)
        was_ready, self.is_ready = self.is_ready, self.rng.random() >= self.pause
        if self.is_ready != was_ready:
            self.ready.value = self.is_ready

    def forget_offer(self) -> None:
        """Allow what is on offer to be withdrawn, as a clear does."""
        self.offer = None

    def check(self, expected: Sequence[int], first: int = 0) -> None:
        """Compare the items from number `first` on with what they should be."""
        got = self.items[first:]
        assert len(got) == len(expected), f"{self.name}: {len(got)} items, expected {len(expected)}"
        assert_equal_bits(
            self.name,
            expected=np.array(expected, dtype=object),
            got=np.array(got, dtype=object),
            cycles=np.array(self.cycles[first:]),
        )


def _ports(ports: Ports, stream: str) -> tuple[Any, ...]:
    """`valid`, `ready` and `payload` of a stream."""
    return tuple(ports[f"{stream}__{part}"] for part in ("valid", "ready", "payload"))
