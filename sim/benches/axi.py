# SPDX-License-Identifier: Apache-2.0
"""The other side of an AXI4 master in cocotb: memory, and a monitor of the bus.

Two kinds of slaves serve a memory: cocotbext-axi's, which were written independently, with random
pauses on all channels; and responders, for exact timing and bad responses.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
from cocotbext.axi import AxiReadBus, AxiSlaveRead, AxiSlaveWrite, AxiWriteBus

from speq.hw.memory.axi import BURST_INCR, CACHE, PAGE_BYTES, AxiConfig
from speq.sim.benches.world import Ports, pauses

#: Cycles from a request, or a burst's last beat of write data, to a responder's first response.
LATENCY = 20

_ADDRESS_FIELDS = ("id", "addr", "len", "size", "burst", "cache", "prot")

#: Byte address and number of beats of a transfer or a burst.
Transfer = tuple[int, int]


def expected_bursts(config: AxiConfig, transfers: Iterable[Transfer]) -> list[Transfer]:
    """The bursts that transfers are split into."""
    bursts = []
    for address, beats in transfers:
        while beats:
            place = address // config.beat_bytes % config.burst_beats
            length = min(beats, config.burst_beats - place)
            bursts.append((address, length))
            address += length * config.beat_bytes
            beats -= length
    return bursts


class Memory:
    """Bytes of a region of the address space, also for cocotbext-axi's slaves.

    Parameters
    ----------
    content : bytes
    base : int
        Address of the first byte.

    Attributes
    ----------
    bad : set of int
        Addresses that the slaves answer with an error.
    """

    def __init__(self, content: bytes | bytearray, base: int) -> None:
        self.content = bytearray(content)
        self.base = base
        self.bad: set[int] = set()

    def copy(self) -> Memory:
        """A memory with the same bytes."""
        return Memory(self.content, self.base)

    def load(self, address: int, size: int) -> bytes:
        """Some bytes. Raises ValueError if they are not all in the region."""
        first = self._place(address, size)
        return bytes(self.content[first : first + size])

    def load_beat(self, address: int, size: int) -> int:
        """A beat of `size` bytes."""
        return int.from_bytes(self.load(address, size), "little")

    def store_beat(self, address: int, size: int, data: int, strobe: int) -> None:
        """Write the bytes of a beat that the strobe marks. Raises ValueError outside the region."""
        first = self._place(address, size)
        for i, byte in enumerate(data.to_bytes(size, "little")):
            if strobe >> i & 1:
                self.content[first + i] = byte

    async def read(self, address: int, length: int) -> bytes:
        """A slave's read; a ValueError becomes an error response."""
        self._refuse_bad(address, length)
        return self.load(address, length)

    async def write(self, address: int, data: bytes) -> None:
        """A slave's write; a ValueError becomes an error response."""
        self._refuse_bad(address, len(data))
        first = self._place(address, len(data))
        self.content[first : first + len(data)] = data

    def _place(self, address: int, size: int) -> int:
        first = address - self.base
        if not 0 <= first <= len(self.content) - size:
            raise ValueError(f"{size} bytes at {address:#x} are not in the region")
        return first

    def _refuse_bad(self, address: int, size: int) -> None:
        if not self.bad.isdisjoint(range(address, address + size)):
            raise ValueError(f"{address:#x} is a bad address")


def serve_reads(
    ports: Ports, memory: Memory, rng: np.random.Generator, pause: float
) -> AxiSlaveRead:
    """cocotbext-axi's slave on the reading half of the bus `axi`."""
    bus = AxiReadBus.from_prefix(ports.dut, f"{ports.unit}__axi_")
    slave = AxiSlaveRead(bus, ports.dut.clk, ports.dut.rst, target=memory)
    _prepare(slave, (slave.ar_channel, slave.r_channel), rng, pause)
    return slave


def serve_writes(
    ports: Ports, memory: Memory, rng: np.random.Generator, pause: float
) -> AxiSlaveWrite:
    """cocotbext-axi's slave on the writing half of the bus `axi`."""
    bus = AxiWriteBus.from_prefix(ports.dut, f"{ports.unit}__axi_")
    slave = AxiSlaveWrite(bus, ports.dut.clk, ports.dut.rst, target=memory)
    _prepare(slave, (slave.aw_channel, slave.w_channel, slave.b_channel), rng, pause)
    return slave


def _prepare(
    slave: AxiSlaveRead | AxiSlaveWrite,
    channels: tuple[Any, ...],
    rng: np.random.Generator,
    pause: float,
) -> None:
    slave.log.setLevel(logging.ERROR)  # else it tells of every burst
    if pause:
        for channel in channels:
            channel.set_pause_generator(pauses(rng, pause))


class Responder:
    """Memory on one half of the bus `axi`: a latency, then one response per cycle, in order.

    Parameters
    ----------
    ports : Ports
    config : AxiConfig
    memory : Memory

    Attributes
    ----------
    responses : dict
        Response of the beat (read) or burst (write) at an address, where it is not OKAY.
    answers : bool
        Whether there are responses at all.
    """

    CHANNEL: str
    FIELDS: tuple[str, ...]

    def __init__(self, ports: Ports, config: AxiConfig, memory: Memory) -> None:
        self.config, self.memory = config, memory
        self.responses: dict[int, int] = {}
        self.answers = True
        # Cycle from which it may be given, and its fields.
        self.pending: deque[tuple[int, dict[str, int]]] = deque()
        self.valid, self.ready, *fields = (
            ports[f"axi__{self.CHANNEL}{name}"] for name in ("valid", "ready", *self.FIELDS)
        )
        self.fields = dict(zip(self.FIELDS, fields, strict=True))
        self.gives = False
        self.valid.value = 0

    def step(self, cycle: int) -> None:
        """After the edge that begins a cycle."""
        self.accept(cycle)
        assert int(self.ready.value), f"cycle {cycle}: channel {self.CHANNEL} is not ready"
        gave = self.gives
        self.gives = self.answers and bool(self.pending) and self.pending[0][0] <= cycle + 1
        if self.gives != gave:
            self.valid.value = self.gives
        if self.gives:
            for name, value in self.pending.popleft()[1].items():
                self.fields[name].value = value

    def accept(self, cycle: int) -> None:
        """Take what is on the other channels."""
        raise NotImplementedError


class ReadResponder(Responder):
    """The reading half."""

    CHANNEL = "r"
    FIELDS = ("id", "data", "resp", "last")

    def __init__(self, ports: Ports, config: AxiConfig, memory: Memory) -> None:
        super().__init__(ports, config, memory)
        self.request = [ports[f"axi__ar{name}"] for name in ("id", "addr", "len")]
        self.is_requested = ports["axi__arvalid"]
        ports["axi__arready"].value = 1

    def accept(self, cycle: int) -> None:
        if not int(self.is_requested.value):
            return
        identity, address, length = (int(handle.value) for handle in self.request)
        size = self.config.beat_bytes
        for i in range(length + 1):
            place = address + i * size
            beat = {
                "id": identity,
                "data": self.memory.load_beat(place, size),
                "resp": self.responses.get(place, 0),
                "last": i == length,
            }
            self.pending.append((cycle + LATENCY, beat))


class WriteResponder(Responder):
    """The writing half; memory changes as soon as a burst's address and last beat are there."""

    CHANNEL = "b"
    FIELDS = ("id", "resp")

    def __init__(self, ports: Ports, config: AxiConfig, memory: Memory) -> None:
        super().__init__(ports, config, memory)
        self.request = [ports[f"axi__aw{name}"] for name in ("id", "addr", "len")]
        self.is_requested = ports["axi__awvalid"]
        self.beat = [ports[f"axi__w{name}"] for name in ("data", "strb", "last")]
        self.is_beat = ports["axi__wvalid"]
        self.bursts: deque[list[int]] = deque()
        self.beats: deque[list[int]] = deque()
        for name in ("awready", "wready"):
            ports[f"axi__{name}"].value = 1

    def accept(self, cycle: int) -> None:
        if int(self.is_requested.value):
            self.bursts.append([int(handle.value) for handle in self.request])
        if int(self.is_beat.value):
            self.beats.append([int(handle.value) for handle in self.beat])
        while self.bursts and len(self.beats) > self.bursts[0][2]:
            identity, address, length = self.bursts.popleft()
            size = self.config.beat_bytes
            for i in range(length + 1):
                data, strobe, last = self.beats.popleft()
                assert last == (i == length), f"wlast in beat {i} of {length + 1}"
                self.memory.store_beat(address + i * size, size, data, strobe)
            response = {"id": identity, "resp": self.responses.get(address, 0)}
            self.pending.append((cycle + LATENCY, response))


class Channel:
    """Watches an AXI channel: what is valid stays until it is ready.

    Parameters
    ----------
    ports : Ports
    prefix : str
        Of the channel's signals, for example "axi__ar".
    fields : tuple of str
        Signals that are looked at.
    """

    def __init__(self, ports: Ports, prefix: str, fields: tuple[str, ...]) -> None:
        self.name = f"{ports.unit}.{prefix}"
        self.valid, self.ready = (ports[f"{prefix}{name}"] for name in ("valid", "ready"))
        self.fields = {name: ports[f"{prefix}{name}"] for name in fields}
        self.waiting: dict[str, int] | None = None

    def sample(self, cycle: int) -> tuple[dict[str, int] | None, bool]:
        """What is on the channel, if anything, and whether it is taken in this cycle."""
        if not int(self.valid.value):
            assert self.waiting is None, f"{self.name}: cycle {cycle}: valid fell without ready"
            return None, False
        beat = {name: int(handle.value) for name, handle in self.fields.items()}
        if self.waiting is not None:
            for name, value in self.waiting.items():
                assert beat[name] == value, (
                    f"{self.name}: cycle {cycle}: {name} changed: "
                    f"expected {value:#x}, got {beat[name]:#x}"
                )
        taken = bool(int(self.ready.value))
        self.waiting = None if taken else beat
        return beat, taken


class Monitor:
    """Checks the rules of AXI4 on one half of the bus `axi`, and keeps its bursts.

    Parameters
    ----------
    ports : Ports
    config : AxiConfig
    memory : Memory
        The region that no burst may leave.
    writes : bool
        Whether it is the writing half.

    Attributes
    ----------
    bursts : list of Transfer
    requested, answered : list of int
        Cycles of the first valid of each burst's address, and of its (last) response.
    lasts : list of int
        Beats of the bursts of write data.
    """

    def __init__(self, ports: Ports, config: AxiConfig, memory: Memory, *, writes: bool) -> None:
        self.unit, self.config, self.memory, self.writes = ports.unit, config, memory, writes
        self.address = Channel(ports, "axi__aw" if writes else "axi__ar", _ADDRESS_FIELDS)
        if writes:
            self.data = Channel(ports, "axi__w", ("data", "strb", "last"))
            self.response = Channel(ports, "axi__b", ())
        else:
            self.response = Channel(ports, "axi__r", ("last",))
        self.bursts: list[Transfer] = []
        self.requested: list[int] = []
        self.answered: list[int] = []
        self.lasts: list[int] = []
        self.beats = 0

    def step(self, cycle: int) -> None:
        """After the edge that begins a cycle."""
        at = f"{self.unit}: cycle {cycle}"
        was_waiting = self.address.waiting is not None
        request, taken = self.address.sample(cycle)
        if request is not None and not was_waiting:
            self.requested.append(cycle)
        if request is not None and taken:
            self._check_burst(at, request)
        if self.writes:
            beat, taken = self.data.sample(cycle)
            if beat is not None and taken:
                self.beats += 1
                if beat["last"]:
                    self.lasts.append(self.beats)
                    self.beats = 0
        assert int(self.response.ready.value), f"{at}: the response channel is not ready"
        response, taken = self.response.sample(cycle)
        if response is not None and taken and (self.writes or response["last"]):
            self.answered.append(cycle)
        outstanding = len(self.requested) - len(self.answered)
        assert 0 <= outstanding <= self.config.outstanding, f"{at}: {outstanding} outstanding"

    def _check_burst(self, at: str, request: dict[str, int]) -> None:
        config = self.config
        constant = {
            "id": 0,
            "size": config.beat_bytes.bit_length() - 1,
            "burst": BURST_INCR,
            "cache": CACHE,
            "prot": 0,
        }
        for name, value in constant.items():
            assert request[name] == value, (
                f"{at}: {name}: expected {value:#x}, got {request[name]:#x}"
            )
        address, beats = request["addr"], request["len"] + 1
        last = address + beats * config.beat_bytes - 1
        base, size = self.memory.base, len(self.memory.content)
        assert beats <= config.burst, f"{at}: a burst of {beats} beats"
        assert base <= address and last < base + size, f"{at}: {address:#x} leaves the region"
        assert address % config.beat_bytes == 0, f"{at}: misaligned burst {address:#x}"
        assert address // PAGE_BYTES == last // PAGE_BYTES, f"{at}: {address:#x} crosses a page"
        self.bursts.append((address, beats))
