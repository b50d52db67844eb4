# SPDX-License-Identifier: Apache-2.0
"""Testbench of the data port with scratch memory: readers and a writer on what is one memory.

Memory itself is unruly: it pauses on all channels, answers bursts of different IDs in any order,
beats of reads among one another, and may take no request to write before its first beat. Units with
a planted bug have to be found out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import cocotb
import numpy as np
from amaranth.hdl import Elaboratable, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import Flow, In, Out

from speq.hw.common.ram import RAM_VERILOG
from speq.hw.common.ram_fifo import RamFifo
from speq.hw.memory.axi import AxiConfig, Fault
from speq.hw.memory.data_port import DataPort
from speq.hw.memory.memory_reader import MemoryReader
from speq.hw.memory.memory_writer import MemoryWriter
from speq.hw.memory.read_router import ReadRouter
from speq.hw.memory.scratch_memory import ScratchMemory
from speq.hw.memory.write_router import WriteRouter
from speq.hw.verilog import convert_unit
from speq.sim.benches.axi import LATENCY, Memory, Transfer, expected_bursts
from speq.sim.benches.streams import Sink, Source
from speq.sim.benches.world import Ports, SideBySide, World
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed, simulate

_TOP = "data_port_tb"
_CONFIGS = (
    AxiConfig(data_bits=128, burst=8, outstanding=4, depth=32),
    AxiConfig(data_bits=64, address_bits=32, burst=16, outstanding=9, depth=64),
)
_READERS = 3
_PAGE = 4096
#: Bytes of the scratch memory, of the region of addresses, and where the window begins in it: at no
#: multiple of its size.
_SCRATCH = 2 * _PAGE
_SIZE = 4 * _PAGE
_WINDOW = _PAGE
_MIDDLE = _WINDOW + _SCRATCH // 2
_PATIENCE = 4_000
_PAUSE = 0.3
_ROUNDS = 4
#: Commands of each master in a round.
_COMMANDS = 12
_SLAVE_ERROR = 2


class _Broken(DataPort):
    """A port with one of several bugs, which `bug` chooses, or none."""

    BUGS = ("reads overtake", "responses overtake", "strobes are ignored")

    def __init__(self, config: AxiConfig, readers: int, size: int) -> None:
        super().__init__(config, readers, size)
        self.bug = Signal(range(len(self.BUGS) + 1), init=len(self.BUGS))

    def _parts(self) -> tuple[type[ScratchMemory], type[ReadRouter], type[WriteRouter]]:
        bug = self.bug

        class Overtaking(ReadRouter):
            def _is_allowed(self, idle: Value, same: Value) -> Value:
                return super()._is_allowed(idle, same) | (bug == 0)

        class AnyAnswer(WriteRouter):
            def _answer(self, m: Module, waits: Value, is_scratch: Value) -> None:
                super()._answer(m, waits, Mux(bug == 1, self.scratch.bvalid, is_scratch))

        class AllBytes(ScratchMemory):
            def _is_marked(self, strobe: Value, byte: int) -> Value:
                return super()._is_marked(strobe, byte) | (bug == 2)

        return AllBytes, Overtaking, AnyAnswer


class _Bench(wiring.Component):
    """Readers and a writer on the port."""

    def __init__(self, port: DataPort) -> None:
        self.port = port
        self.units = {f"reader_{i}": MemoryReader(port.config) for i in range(_READERS)}
        self.units["writer"] = MemoryWriter(port.config)
        members = {}
        for name, unit in self.units.items():
            inner = {key: each for key, each in unit.signature.members.items() if key != "axi"}
            members[name] = Out(wiring.Signature(inner))
        config = port.config
        bus = {**config.read_signature.members, **config.write_signature.members}
        super().__init__(
            {
                **members,
                "axi": Out(wiring.Signature(bus)),
                "window": port.signature.members["base"],
                "bug": In(range(len(_Broken.BUGS))),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        m.submodules.port = port = self.port
        m.d.comb += port.base.eq(self.window)
        if isinstance(port, _Broken):
            m.d.comb += port.bug.eq(self.bug)
        for name, unit in self.units.items():
            m.submodules[name] = unit
            self._pass(m, getattr(self, name), unit)
        for half in (port.read, port.write):
            self._pass(m, self.axi, half)
        for i in range(_READERS):
            wiring.connect(m, self.units[f"reader_{i}"].axi, port.readers[i])
        wiring.connect(m, self.units["writer"].axi, port.writer)
        return m

    def _pass(self, m: Module, outer: Any, inner: Any) -> None:
        """Connect ports with those of the same names inside, as far as both have them."""
        for name, member in inner.signature.members.items():
            if name not in outer.signature.members:
                continue
            out, within = getattr(outer, name), getattr(inner, name)
            if member.is_signature:
                wiring.connect(m, wiring.flipped(out), within)
            else:
                target, source = (out, within) if member.flow is Flow.Out else (within, out)
                m.d.comb += target.eq(source)


def run() -> None:
    """Check ports with several parameters, and that bugs are found."""
    ports = {f"port_{i}": DataPort(each, _READERS, _SCRATCH) for i, each in enumerate(_CONFIGS)}
    ports["broken"] = _Broken(_CONFIGS[0], _READERS, _SCRATCH)
    units = {name: _Bench(port) for name, port in ports.items()}
    simulate(convert_unit(SideBySide(units), _TOP) + RAM_VERILOG, _TOP, __name__)


class _Slave:
    """Memory on the bus, as unruly as AXI4 allows if `pause` is not 0, else with `LATENCY`.

    Attributes
    ----------
    bad : set of int
        Addresses of bursts that are answered with SLVERR.
    answered : int
        Bursts of writes that have been.
    """

    def __init__(
        self, ports: Ports, config: AxiConfig, memory: Memory, rng: np.random.Generator
    ) -> None:
        self.ports, self.config, self.memory, self.rng = ports, config, memory, rng
        self.pause = 0.0
        self.bad: set[int] = set()
        self.reads: dict[int, deque[tuple[int, int, int]]] = {}  # due, address, beats left
        self.failing: dict[int, bool] = {}
        self.bursts: deque[Transfer] = deque()
        self.beats: deque[tuple[int, int, int]] = deque()
        self.answers: deque[tuple[int, int]] = deque()
        self.ready = dict.fromkeys(("ar", "aw", "w"), False)
        self.answers_now = False
        self.answered = 0
        for name in ("arready", "awready", "wready", "rvalid", "bvalid", "rid", "bid"):
            ports[f"axi__{name}"].value = 0

    def _get(self, name: str) -> int:
        return self.ports.get(f"axi__{name}")

    def _due(self, cycle: int) -> int:
        return cycle + (int(self.rng.integers(1, 2 * LATENCY)) if self.pause else LATENCY)

    def step(self, cycle: int) -> None:
        """After the edge that begins a cycle."""
        self._read(cycle)
        self._write(cycle)
        for name, ready in self.ready.items():
            now = self.rng.random() >= self.pause
            if name == "aw" and self.pause:  # it may wait for a beat
                now = now and bool(self.beats or self._get("wvalid"))
            if now != ready:
                self.ports[f"axi__{name}ready"].value = now
                self.ready[name] = now

    def _read(self, cycle: int) -> None:
        assert self._get("rready"), f"cycle {cycle}: read data are not taken"
        if self.ready["ar"] and self._get("arvalid"):
            burst = (self._due(cycle), self._get("araddr"), self._get("arlen") + 1)
            self.reads.setdefault(self._get("arid"), deque()).append(burst)
        due = [
            identity
            for identity, bursts in self.reads.items()
            if bursts and bursts[0][0] <= cycle + 1
        ]
        gives = bool(due) and self.rng.random() >= self.pause
        self.ports["axi__rvalid"].value = gives
        if not gives:
            return
        identity = int(self.rng.choice(due))
        bursts = self.reads[identity]
        since, address, left = bursts.popleft()
        failing = self.failing.pop(identity, False) or address in self.bad
        fields = {
            "id": identity,
            "data": self.memory.load_beat(address, self.config.beat_bytes),
            "resp": _SLAVE_ERROR if failing else 0,
            "last": left == 1,
        }
        if left > 1:
            bursts.appendleft((since, address + self.config.beat_bytes, left - 1))
            self.failing[identity] = failing
        for name, value in fields.items():
            self.ports[f"axi__r{name}"].value = value

    def _write(self, cycle: int) -> None:
        if self.ready["aw"] and self._get("awvalid"):
            self.bursts.append((self._get("awaddr"), self._get("awlen") + 1))
        if self.ready["w"] and self._get("wvalid"):
            self.beats.append((self._get("wdata"), self._get("wstrb"), self._get("wlast")))
        while self.bursts and len(self.beats) >= self.bursts[0][1]:
            start, count = self.bursts.popleft()
            for i in range(count):
                data, strobe, last = self.beats.popleft()
                assert last == (i == count - 1), f"wlast in beat {i} of {count}"
                size = self.config.beat_bytes
                self.memory.store_beat(start + i * size, size, data, strobe)
            self.answers.append((self._due(cycle), _SLAVE_ERROR if start in self.bad else 0))
        if self.answers_now and self._get("bready"):
            self.answers.popleft()
            self.answers_now = False
            self.answered += 1
        if not self.answers_now and self.answers and self.answers[0][0] <= cycle + 1:
            self.answers_now = True
        self.ports["axi__bvalid"].value = self.answers_now
        if self.answers_now:
            self.ports["axi__bresp"].value = self.answers[0][1]


class _World(World):
    """A port with its masters and memory, and the one memory that it is to its masters."""

    def __init__(self, dut: Any, name: str, config: AxiConfig) -> None:
        super().__init__(dut, f"{name}, {config}", np.random.default_rng(seed()), _PATIENCE)
        self.config = config
        self.ports = {
            key: Ports(dut, f"{name}__{key}")
            for key in (*(f"reader_{i}" for i in range(_READERS)), "writer")
        }
        self.outside = Ports(dut, name)
        self.pause = 0.0
        pages = (1 << config.address_bits) // _PAGE
        # An even one, so that the window begins at no multiple of its size.
        self.base = int(self.rng.integers(1, (pages - _SIZE // _PAGE) // 2)) * 2 * _PAGE
        self.memory = Memory(self.rng.bytes(_SIZE), self.base)
        self.golden = self.memory.copy()

    @classmethod
    async def start(cls, dut: Any, name: str, index: int = 0, *, pause: float = 0.0) -> _World:
        """After a reset; memory, commands and streams pause in such a share of cycles."""
        world = cls(dut, name, _CONFIGS[index])
        world.start_clock()
        world.set_window(world.base + _WINDOW)
        for ports in world.ports.values():
            ports["base"].value = world.base
            ports["limit"].value = world.base + _SIZE - 1
            ports["clear"].value = 0
        world.pause = pause
        await world.reset()
        return world

    def set_window(self, base: int) -> None:
        """Let the window begin at an address."""
        self.window = base
        self.outside["window"].value = base

    def connect(self) -> list[Callable[[int], None]]:
        self.commands = {
            name: Source(ports, "command", self.rng) for name, ports in self.ports.items()
        }
        self.sinks = {
            name: Sink(ports, "data", self.rng)
            for name, ports in self.ports.items()
            if name != "writer"
        }
        self.beats = Source(self.ports["writer"], "data", self.rng)
        self.slave = _Slave(self.outside, self.config, self.memory, self.rng)
        streams = [*self.commands.values(), *self.sinks.values(), self.beats]
        for each in (*streams, self.slave):
            each.pause = self.pause
        # Bursts of memory up to the end of each command of the writer that is not done.
        self.ends: deque[int] = deque()
        self.asked = 0
        return [*(each.step for each in streams), self.slave.step, self._watch_done]

    def _watch_done(self, cycle: int) -> None:
        if self.ports["writer"].get("done"):
            end, answered = self.ends.popleft(), self.slave.answered
            assert answered >= end, f"{self.name}: cycle {cycle}: done before memory has answered"

    def idle(self) -> bool:
        """Whether all masters have nothing to do."""
        return all(
            self.commands[name].is_done(self.cycle) and not ports.get("busy")
            for name, ports in self.ports.items()
        )

    def transfers(self, half: int, number: int = _COMMANDS) -> list[Transfer]:
        """Random ones in one of the halves before and behind the middle of the window, many of them
        over one of its edges."""
        size = self.config.beat_bytes
        start, stop = ((0, _MIDDLE), (_MIDDLE, _SIZE))[half]
        edge = (_WINDOW, _WINDOW + _SCRATCH)[half]
        found = []
        for _ in range(number):
            beats = int(self.rng.integers(1, self.rng.choice([2, 8, 3 * self.config.burst_beats])))
            low, high = start, stop - beats * size
            if self.rng.random() < 0.5:
                low, high = max(low, edge - beats * size), min(high, edge + size)
            first = int(self.rng.integers(low // size, high // size + 1)) * size
            found.append((self.base + first, beats))
        return found

    def read(self, name: str, transfers: list[Transfer]) -> list[int]:
        """Give a reader commands; the beats that it is to give."""
        size = self.config.beat_bytes
        self.commands[name].queue.extend(map(self._pack, transfers))
        return [
            self.golden.load_beat(address + i * size, size)
            for address, beats in transfers
            for i in range(beats)
        ]

    def write(self, transfers: list[Transfer], *, whole: bool = False) -> None:
        """Give the writer commands and random beats, some bytes of which it is to leave out."""
        size = self.config.beat_bytes
        for address, beats in transfers:
            self.commands["writer"].queue.append(self._pack((address, beats)))
            bursts = expected_bursts(self.config, [(address, beats)])
            self.asked += sum(not self._is_scratch(start) for start, _ in bursts)
            self.ends.append(self.asked)
            for i in range(beats):
                data = int.from_bytes(self.rng.bytes(size), "little")
                strobe = int.from_bytes(self.rng.bytes(size // 8), "little")
                if whole or self.rng.random() < 0.5:
                    strobe = (1 << size) - 1
                self.golden.store_beat(address + i * size, size, data, strobe)
                self.beats.queue.append(strobe << self.config.data_bits | data)

    def _is_scratch(self, address: int) -> bool:
        return self.window > 0 and self.window <= address < self.window + _SCRATCH

    def _pack(self, transfer: Transfer) -> int:
        address, beats = transfer
        return beats << self.config.address_bits | address

    async def fill(self) -> None:
        """Write everything once."""
        self.write([(self.base, _SIZE // self.config.beat_bytes)], whole=True)
        await self.until("everything is written", self.idle)

    async def round(self) -> None:
        """Reads from one half and writes to the other one at once, all random."""
        half = int(self.rng.integers(2))
        first = {name: len(sink.items) for name, sink in self.sinks.items()}
        expected = {name: self.read(name, self.transfers(half)) for name in self.sinks}
        self.write(self.transfers(1 - half))
        await self.until("transfers are finished", self.idle)
        for name, ports in self.ports.items():
            ports.check(self.cycle, error=Fault.NONE.value)
            if name in expected:
                self.sinks[name].check(expected[name], first[name])

    async def rounds(self, number: int = _ROUNDS) -> None:
        """Several of them, between which memory is compared as the masters see it."""
        for _ in range(number):
            await self.round()
        first = len(self.sinks["reader_0"].items)
        everything = self.read("reader_0", [(self.base, _SIZE // self.config.beat_bytes)])
        await self.until("everything is read", self.idle)
        self.sinks["reader_0"].check(everything, first)

    def check_memory(self, before: bytes, *, window: bool = True) -> None:
        """Compare memory with what it should hold: what was there behind the window."""
        expected = bytearray(self.golden.content)
        if window:
            expected[_WINDOW : _WINDOW + _SCRATCH] = before[_WINDOW : _WINDOW + _SCRATCH]
        assert_equal_bits(
            f"{self.name}: memory (by byte)",
            expected=np.frombuffer(bytes(expected), np.uint8),
            got=np.frombuffer(bytes(self.memory.content), np.uint8),
        )


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)), pause=[0.0, _PAUSE])
async def one_memory(dut: Any, index: int, pause: float) -> None:
    """Reads and writes are those of one memory, of which the window is not in memory."""
    world = await _World.start(dut, f"port_{index}", index, pause=pause)
    before = bytes(world.memory.content)
    await world.fill()
    await world.rounds()
    world.check_memory(before)


@cocotb.test()
async def no_window(dut: Any) -> None:
    """With a base of 0 everything is in memory; then a window is at another place."""
    world = await _World.start(dut, "port_0", pause=_PAUSE)
    world.set_window(0)
    await world.fill()
    await world.rounds()
    before = bytes(world.memory.content)
    world.check_memory(before, window=False)
    world.set_window(world.base + _WINDOW)
    await world.fill()
    await world.rounds(1)
    world.check_memory(before)


@cocotb.test()
async def latencies_and_throughput(dut: Any) -> None:
    """First beats come when the port says. One reader gets a beat from scratch memory in each
    cycle, another one from memory, while a beat is written to scratch memory in each cycle."""
    world = await _World.start(dut, "port_0")
    await world.fill()
    size, beats = world.config.beat_bytes, _PAGE // world.config.beat_bytes
    window = world.base + _WINDOW
    latencies = {
        "reader_0": (window, DataPort.SCRATCH_LATENCY),
        "reader_1": (world.base, DataPort.LATENCY + LATENCY),
    }
    expected = {name: world.read(name, [(at, beats)]) for name, (at, _) in latencies.items()}
    first = {name: len(world.sinks[name].items) for name in latencies}
    world.write([(window + _PAGE, beats)])
    start = world.cycle
    await world.until("transfers are finished", world.idle)
    for name, (_, latency) in latencies.items():
        world.sinks[name].check(expected[name], first[name])
        cycles = world.sinks[name].cycles[first[name] :]
        taken = world.commands[name].taken[-1]
        assert cycles[0] - taken == MemoryReader.LATENCY + latency + RamFifo.LATENCY, name
        if name == "reader_0":
            assert cycles[-1] - cycles[0] == beats - 1
        else:  # as many as are outstanding, then those
            assert cycles[-1] - cycles[0] < 2 * beats
    assert world.beats.taken[-1] - start <= beats + 2
    assert size * beats == _PAGE


@cocotb.test()
async def errors_of_memory(dut: Any) -> None:
    """Bad responses reach whom they are for, with their addresses, and nobody else."""
    world = await _World.start(dut, "port_0", pause=_PAUSE)
    await world.fill()
    block = world.config.burst_beats * world.config.beat_bytes
    bad = world.base + _WINDOW - block
    world.slave.bad.add(bad)
    expected = world.read("reader_1", world.transfers(1))
    first = len(world.sinks["reader_1"].items)
    world.read("reader_0", [(bad - block, 4 * world.config.burst_beats)])
    world.write([(bad, 2 * world.config.burst_beats)])
    await world.until(
        "the error is reported",
        lambda: all(world.ports[name].get("error") for name in ("reader_0", "writer")),
    )
    for name in ("reader_0", "writer"):
        world.ports[name].check(world.cycle, error=Fault.SLAVE.value, error_address=bad)
    await world.until("reader 1 is idle", lambda: not world.ports["reader_1"].get("busy"))
    world.sinks["reader_1"].check(expected, first)
    world.slave.bad.clear()
    await _clear(world, "reader_0", "writer")
    await world.fill()
    await world.rounds(1)


async def _clear(world: _World, *names: str) -> None:
    """Let masters drop what they have to do."""
    for name in names:
        world.commands[name].withdraw()
        world.ports[name]["clear"].value = 1
    if "writer" in names:
        world.beats.withdraw()
    await world.step()
    world.ends.clear()
    for name in names:
        world.ports[name]["clear"].value = 0
        if name in world.sinks:
            world.sinks[name].forget_offer()
    await world.step()
    await world.until("they are cleared", world.idle)
    if "writer" in names:
        world.asked = world.slave.answered


@cocotb.test()
async def clears_and_resets(dut: Any) -> None:
    """Masters that are cleared, and resets, in the middle of transfers leave nothing behind."""
    world = await _World.start(dut, "port_0", pause=_PAUSE)
    await world.fill()
    for _ in range(2):
        for name in world.sinks:
            world.read(name, world.transfers(0))
        world.write(world.transfers(1))
        await world.step(int(world.rng.integers(5, 120)))
        await _clear(world, *world.ports)
        await world.fill()
        await world.rounds(1)
        for name in world.sinks:
            world.read(name, world.transfers(0))
        world.write(world.transfers(1))
        await world.step(int(world.rng.integers(5, 120)))
        await world.reset()
        await world.fill()
        await world.rounds(1)


@cocotb.test()
@cocotb.parametrize(bug=range(len(_Broken.BUGS)))
async def planted_bugs_are_found(dut: Any, bug: int) -> None:
    """The same traffic fails with each of them."""
    world = await _World.start(dut, "broken", pause=_PAUSE)
    world.outside["bug"].value = bug
    try:
        await world.fill()
        await world.rounds()
    except AssertionError:
        return
    raise AssertionError(f"not found: {_Broken.BUGS[bug]}")
