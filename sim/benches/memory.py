# SPDX-License-Identifier: Apache-2.0
"""Testbench of the memory reader and writer.

Transfers run against cocotbext-axi's memory models, which were written independently, with random
pauses on all channels; exact timing and bad responses come from the small responder below. In all
tests a monitor checks the rules of AXI4, and that the bursts on the bus are the expected ones.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cocotb
import numpy as np
from amaranth.hdl import Elaboratable, Module
from amaranth.lib import wiring
from amaranth.lib.wiring import Out
from cocotb.clock import Clock
from cocotb.triggers import RisingEdge
from cocotbext.axi import AxiReadBus, AxiSlaveRead, AxiSlaveWrite, AxiWriteBus

from speq.hw.common.ram import RAM_VERILOG
from speq.hw.common.ram_fifo import RamFifo
from speq.hw.memory.axi import BEATS_BITS, BURST_INCR, CACHE, PAGE_BYTES, AxiConfig, Fault
from speq.hw.memory.memory_reader import MemoryReader
from speq.hw.memory.memory_writer import MemoryWriter
from speq.hw.verilog import convert_unit
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed, simulate

_TOP = "memory_tb"
#: Those under test, from narrow beats in long bursts to wide ones, and the smallest of all.
_CONFIGS = (
    AxiConfig(),
    AxiConfig(data_bits=64, address_bits=20, burst=256, depth=512),
    AxiConfig(data_bits=1024, address_bits=64, burst=4, outstanding=9, depth=32),
    AxiConfig(data_bits=512, address_bits=32, burst=1, outstanding=2, depth=2),
)
#: Indices of those whose buffer is large enough for a beat per cycle.
_SUSTAINING = (0, 1, 2)
#: Bytes of the memory, which fills a region that begins at a multiple of its size.
_SIZE = 1 << 15
#: Latency of the responder, in cycles.
_LATENCY = 20
#: Cycles after which a test gives up waiting.
_PATIENCE = 20_000
#: Share of cycles in which a paused channel pauses.
_PAUSE = 0.4
#: Rounds of tests of faults, each with other commands.
_ROUNDS = 3
_THROUGHPUT_BEATS = 4096
_MIN_THROUGHPUT = 0.98


class _Bench(wiring.Component):
    """Readers and writers side by side: reader_0, writer_0, reader_1, ..."""

    def __init__(self) -> None:
        self.units = {}
        for i, config in enumerate(_CONFIGS):
            self.units |= {f"reader_{i}": MemoryReader(config), f"writer_{i}": MemoryWriter(config)}
        super().__init__({name: Out(unit.signature) for name, unit in self.units.items()})

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        for name, unit in self.units.items():
            m.submodules[name] = unit
            wiring.connect(m, wiring.flipped(getattr(self, name)), unit)
        return m


def run() -> None:
    """Check readers and writers with several parameters."""
    simulate(convert_unit(_Bench(), _TOP) + RAM_VERILOG, _TOP, __name__)


def expected_bursts(config: AxiConfig, commands: list[_Command]) -> list[tuple[int, int]]:
    """Address and beats of the bursts that commands are split into."""
    bursts = []
    for address, beats in commands:
        while beats:
            place = address // config.beat_bytes % config.burst_beats
            length = min(beats, config.burst_beats - place)
            bursts.append((address, length))
            address += length * config.beat_bytes
            beats -= length
    return bursts


#: Byte address and number of beats.
_Command = tuple[int, int]


class _Failing:
    """Memory of cocotbext-axi's slaves; accesses of the addresses in `bad` raise an error."""

    def __init__(self, memory: bytearray) -> None:
        self.memory = memory
        self.bad: set[int] = set()

    async def read(self, address: int, length: int) -> bytes:
        if address in self.bad:
            raise ValueError("bad address")
        return bytes(_load(self.memory, address, length))

    async def write(self, address: int, data: bytes) -> None:
        if self.bad & set(range(address, address + len(data))):
            raise ValueError("bad address")
        self.memory[address % _SIZE : address % _SIZE + len(data)] = data


class Source:
    """Offers the items of `queue` on a stream, in random cycles if `pause` is not 0."""

    def __init__(self, ports: tuple[object, object, object], rng: np.random.Generator) -> None:
        self.valid, self.ready, self.payload = ports
        self.rng = rng
        self.pause = 0.0
        self.queue: deque[int] = deque()
        self.taken: list[int] = []  # cycles
        self.offered = False
        self.valid.value = 0

    def step(self, cycle: int) -> None:
        if self.offered and int(self.ready.value):
            self.queue.popleft()
            self.taken.append(cycle)
            self.offered = False
        if not self.offered and self.queue and self.rng.random() >= self.pause:
            self.payload.value = self.queue[0]
            self.offered = True
        self.valid.value = self.offered

    def withdraw(self) -> None:
        """Forget what has not been taken."""
        self.queue.clear()
        self.offered = False
        self.valid.value = 0


class Sink:
    """Takes a stream, in random cycles if `pause` is not 0, and sees that offers stay."""

    def __init__(self, ports: tuple[object, object, object], rng: np.random.Generator) -> None:
        self.valid, self.ready, self.payload = ports
        self.name = self.payload._name
        self.rng = rng
        self.pause = 0.0
        self.items: list[int] = []
        self.cycles: list[int] = []
        self.is_ready = False
        self.offer: int | None = None
        self.ready.value = 0

    def step(self, cycle: int) -> None:
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
        self.is_ready = self.rng.random() >= self.pause
        self.ready.value = self.is_ready


class _Channel:
    """Watches an AXI4 channel: what is valid stays until it is ready."""

    def __init__(self, world: _World, unit: str, channel: str, fields: tuple[str, ...]) -> None:
        self.name = f"{unit} {channel}"
        self.valid, self.ready = (
            world.port(unit, f"axi__{channel}{name}") for name in ("valid", "ready")
        )
        self.fields = {name: world.port(unit, f"axi__{channel}{name}") for name in fields}
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


_ADDRESS_FIELDS = ("id", "addr", "len", "size", "burst", "cache", "prot")


class _Monitor:
    """Checks the rules of AXI4 on the bus of a reader or writer, and keeps its bursts."""

    def __init__(self, world: _World, unit: str) -> None:
        self.world = world
        self.config = world.config
        self.unit = unit
        self.is_reader = unit == "reader"
        self.address = _Channel(world, unit, "ar" if self.is_reader else "aw", _ADDRESS_FIELDS)
        if self.is_reader:
            self.response = _Channel(world, unit, "r", ("last",))
        else:
            self.data = _Channel(world, unit, "w", ("data", "strb", "last"))
            self.response = _Channel(world, unit, "b", ())
        self.bursts: list[tuple[int, int]] = []
        self.requested: list[int] = []  # cycles of the first valid
        self.answered: list[int] = []  # cycles of the (last) responses
        self.lasts: list[int] = []  # beats of the bursts of write data
        self.beats = 0

    def step(self, cycle: int) -> None:
        at = f"{self.unit}: cycle {cycle}"
        was_waiting = self.address.waiting is not None
        request, taken = self.address.sample(cycle)
        if request is not None and not was_waiting:
            self.requested.append(cycle)
        if taken:
            self._check_burst(at, request)
        if not self.is_reader:
            beat, taken = self.data.sample(cycle)
            if taken:
                self.beats += 1
                if beat["last"]:
                    self.lasts.append(self.beats)
                    self.beats = 0
        assert int(self.response.ready.value), f"{at}: the response channel is not ready"
        response, taken = self.response.sample(cycle)
        if taken and (not self.is_reader or response["last"]):
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
        base = self.world.base
        assert beats <= config.burst, f"{at}: a burst of {beats} beats"
        assert base <= address and last < base + _SIZE, f"{at}: {address:#x} leaves the region"
        assert address % config.beat_bytes == 0, f"{at}: misaligned burst {address:#x}"
        assert address // PAGE_BYTES == last // PAGE_BYTES, f"{at}: {address:#x} crosses a page"
        self.bursts.append((address, beats))


_READ_SIGNALS = ("araddr", "arlen", "arvalid", "arready", "rdata", "rresp", "rlast", "rvalid")
_WRITE_SIGNALS = ("awaddr", "awlen", "awvalid", "awready")
_WRITE_SIGNALS += ("wdata", "wstrb", "wlast", "wvalid", "wready", "bresp", "bvalid")


class _Responder:
    """Memory on one bus: ideal, with a latency and one beat per cycle, or with bad responses.

    `responses` gives the response of a beat (read) or burst (write) at an address; with `answers`
    False there are no responses.
    """

    def __init__(self, world: _World, unit: str) -> None:
        self.config = world.config
        self.is_reader = unit == "reader"
        self.memory = world.memory
        self.responses: dict[int, int] = {}
        self.answers = True
        signals = _READ_SIGNALS if self.is_reader else _WRITE_SIGNALS
        self.bus = {name: world.port(unit, f"axi__{name}") for name in signals}
        # Cycle from which it may be given, response, and for reads data and whether it is the last.
        self.pending: deque[tuple[int, int, int, bool]] = deque()
        self.bursts: deque[tuple[int, int]] = deque()
        self.beats: deque[tuple[int, int, int]] = deque()
        for name in ("arready",) if self.is_reader else ("awready", "wready"):
            self.bus[name].value = 1

    def step(self, cycle: int) -> None:
        if self.is_reader:
            self._accept_read(cycle)
        else:
            self._accept_write(cycle)
        give = self.answers and self.pending and self.pending[0][0] <= cycle + 1
        if self.is_reader:
            self.bus["rvalid"].value = bool(give)
        else:
            self.bus["bvalid"].value = bool(give)
        if give:
            _, response, data, last = self.pending.popleft()
            if self.is_reader:
                self.bus["rresp"].value = response
                self.bus["rdata"].value = data
                self.bus["rlast"].value = last
            else:
                self.bus["bresp"].value = response

    def _accept_read(self, cycle: int) -> None:
        bus, size = self.bus, self.config.beat_bytes
        if int(bus["arvalid"].value):
            address, beats = int(bus["araddr"].value), int(bus["arlen"].value) + 1
            for i in range(beats):
                place = address + i * size
                data = int.from_bytes(_load(self.memory, place, size), "little")
                response = self.responses.get(place, 0)
                self.pending.append((cycle + _LATENCY, response, data, i == beats - 1))

    def _accept_write(self, cycle: int) -> None:
        bus, size = self.bus, self.config.beat_bytes
        if int(bus["awvalid"].value):
            self.bursts.append((int(bus["awaddr"].value), int(bus["awlen"].value) + 1))
        if int(bus["wvalid"].value):
            self.beats.append(tuple(int(bus[n].value) for n in ("wdata", "wstrb", "wlast")))
        while self.bursts and len(self.beats) >= self.bursts[0][1]:
            address, beats = self.bursts.popleft()
            for i in range(beats):
                data, strobe, last = self.beats.popleft()
                assert last == (i == beats - 1), f"wlast in beat {i} of {beats}"
                _store(self.memory, address + i * size, data, strobe, size)
            self.pending.append((cycle + _LATENCY, self.responses.get(address, 0), 0, True))


def _load(memory: bytearray, address: int, size: int) -> bytearray:
    """Bytes of memory."""
    return memory[address % _SIZE : address % _SIZE + size]


def _store(memory: bytearray, address: int, data: int, strobe: int, size: int) -> None:
    """Write the bytes of a beat that the strobe marks."""
    for i, byte in enumerate(data.to_bytes(size, "little")):
        if strobe >> i & 1:
            memory[(address + i) % _SIZE] = byte


@dataclass
class _Unit:
    """The reader or the writer and what is around it."""

    command: Source
    data: Sink | Source
    monitor: _Monitor
    done: list[int]


_INPUTS = {
    "reader": ("clear", "axi__arready", "axi__rid", "axi__rvalid", "axi__rlast"),
    "writer": ("clear", "axi__awready", "axi__wready", "axi__bid", "axi__bvalid"),
}


class _World:
    """The design under test and its surroundings."""

    def __init__(self, dut: object, index: int) -> None:
        self.dut = dut
        self.index = index
        self.config = _CONFIGS[index]
        self.rng = np.random.default_rng(seed())
        self.cycle = 0
        self.memory = bytearray(self.rng.bytes(_SIZE))
        # Neither the first nor the last place that such a region can have.
        regions = (1 << self.config.address_bits) // _SIZE
        self.base = int(self.rng.integers(1, regions - 1)) * _SIZE
        self.responders: dict[str, _Responder] = {}
        self.models: tuple[AxiSlaveRead, AxiSlaveWrite] | None = None
        dut._log.info(f"seed {seed()}, {self.config}")

    @classmethod
    async def start(
        cls, dut: object, index: int, *, independent: bool = False, pause: float = 0.0
    ) -> _World:
        """After a reset, with cocotbext-axi's memory models or with the responder."""
        world = cls(dut, index)
        Clock(dut.clk, 2, "ns").start()
        world.set_region(world.base)
        for unit, names in _INPUTS.items():
            for name in names:
                world.port(unit, name).value = 0
        if independent:
            world._connect_models(pause)
        await world.reset()
        for unit in (world.reader, world.writer):
            unit.command.pause = unit.data.pause = pause
        return world

    def port(self, unit: str, name: str) -> object:
        """A port of the reader or the writer."""
        return getattr(self.dut, f"{unit}_{self.index}__{name}")

    def set_region(self, base: int) -> None:
        """Let both units' region begin at `base`."""
        self.base = base
        for unit in ("reader", "writer"):
            self.port(unit, "base").value = base
            self.port(unit, "limit").value = base + _SIZE - 1

    def _connect_models(self, pause: float) -> None:
        dut = self.dut
        self.target = _Failing(self.memory)
        read = AxiSlaveRead(
            AxiReadBus.from_prefix(dut, f"reader_{self.index}__axi_"),
            dut.clk,
            dut.rst,
            target=self.target,
        )
        write = AxiSlaveWrite(
            AxiWriteBus.from_prefix(dut, f"writer_{self.index}__axi_"),
            dut.clk,
            dut.rst,
            target=self.target,
        )
        self.models = read, write
        for model in self.models:
            model.log.setLevel(logging.ERROR)  # else it tells of every burst
        if pause:
            channels = read.ar_channel, read.r_channel
            channels += write.aw_channel, write.w_channel, write.b_channel
            for channel in channels:
                channel.set_pause_generator(self._pauses())

    def _pauses(self) -> Iterator[bool]:
        rng = np.random.default_rng(self.rng.integers(1 << 32))
        return (bool(rng.random() < _PAUSE) for _ in itertools.count())

    async def reset(self) -> None:
        """Reset everything; commands and beats on their way are forgotten."""
        dut, rng = self.dut, self.rng
        dut.rst.value = 1
        for _ in range(3):
            await RisingEdge(dut.clk)
        dut.rst.value = 0
        self.reader = _Unit(
            Source(self._stream("reader", "command"), rng),
            Sink(self._stream("reader", "data"), rng),
            _Monitor(self, "reader"),
            [],
        )
        self.writer = _Unit(
            Source(self._stream("writer", "command"), rng),
            Source(self._stream("writer", "data"), rng),
            _Monitor(self, "writer"),
            [],
        )
        if self.models is None:
            self.responders = {unit: _Responder(self, unit) for unit in ("reader", "writer")}
            self.port("reader", "axi__rvalid").value = 0
            self.port("writer", "axi__bvalid").value = 0
        await RisingEdge(dut.clk)

    def _stream(self, unit: str, name: str) -> tuple[object, object, object]:
        """Ports of a stream."""
        parts = ("valid", "ready", "payload")
        return tuple(self.port(unit, f"{name}__{part}") for part in parts)

    async def step(self, cycles: int = 1) -> None:
        """Let clock cycles pass."""
        for _ in range(cycles):
            await RisingEdge(self.dut.clk)
            self.cycle += 1
            for unit in (self.reader, self.writer):
                unit.command.step(self.cycle)
                unit.data.step(self.cycle)
                unit.monitor.step(self.cycle)
            for responder in self.responders.values():
                responder.step(self.cycle)
            if self.get("writer", "done"):
                self.writer.done.append(self.cycle)

    async def until(self, what: str, condition: Callable[[], bool]) -> None:
        """Let clock cycles pass until something is so."""
        for _ in range(_PATIENCE):
            if condition():
                return
            await self.step()
        raise AssertionError(f"cycle {self.cycle}: not within {_PATIENCE} cycles: {what}")

    def get(self, unit: str, name: str) -> int:
        """Value of a port."""
        return int(self.port(unit, name).value)

    def idle(self) -> bool:
        """Whether both units have nothing to do."""
        return not any(
            unit.command.queue
            or self.get(name, "busy")
            # It is busy from the next cycle on.
            or unit.command.taken[-1:] == [self.cycle]
            for name, unit in (("reader", self.reader), ("writer", self.writer))
        )

    async def clear(self, unit: str) -> None:
        """Clear a unit for a cycle and wait until it is idle.

        What has not been taken of its streams is forgotten.
        """
        port = self.port(unit, "clear")
        agents = getattr(self, unit)
        agents.command.withdraw()
        if isinstance(agents.data, Source):
            agents.data.withdraw()
        port.value = 1
        await self.step()
        port.value = 0
        if isinstance(agents.data, Sink):
            agents.data.offer = None  # the clear withdraws it
        await self.step()
        await self.until(f"{unit} is cleared", self.idle)

    def command(self, beats: int, *, half: int | None = None) -> _Command:
        """A random command in the region, or in its lower (0) or upper (1) half."""
        size = self.config.beat_bytes
        words = _SIZE // size // (1 if half is None else 2)
        first = int(self.rng.integers(0, words - beats + 1)) + (half or 0) * words
        return self.base + first * size, beats

    def commands(self, number: int, *, half: int | None = None) -> list[_Command]:
        """Random commands, many of them short, some over several bursts and pages."""
        words = _SIZE // 2 // self.config.beat_bytes
        longest = min(words, 3 * self.config.burst_beats + 2)
        lengths = [
            int(self.rng.integers(1, limit + 1))
            for limit in self.rng.choice([2, self.config.burst_beats + 1, longest], number)
        ]
        return [self.command(beats, half=half) for beats in lengths]

    def pack(self, command: _Command) -> int:
        """A command as its stream's payload."""
        address, beats = command
        return beats << self.config.address_bits | address

    def read(self, command: _Command) -> list[int]:
        """The beats of memory that a command covers."""
        address, beats = command
        size = self.config.beat_bytes
        return [
            int.from_bytes(_load(self.memory, address + i * size, size), "little")
            for i in range(beats)
        ]

    def write_beats(self, commands: list[_Command], golden: bytearray) -> list[int]:
        """Random beats for commands as the stream's payloads; what they write goes to `golden`."""
        size = self.config.beat_bytes
        payloads = []
        for address, beats in commands:
            for i in range(beats):
                data = int.from_bytes(self.rng.bytes(size), "little")
                strobe = int.from_bytes(self.rng.bytes(size // 8), "little")
                if self.rng.random() < 0.5:
                    strobe = (1 << size) - 1
                _store(golden, address + i * size, data, strobe, size)
                payloads.append(strobe << self.config.data_bits | data)
        return payloads

    def check_beats(self, expected: list[int], first: int = 0) -> None:
        """Compare what the reader gave from its beat `first` on with what it should have."""
        sink = self.reader.data
        got = sink.items[first:]
        assert len(got) == len(expected), f"reader: {len(got)} beats, expected {len(expected)}"
        assert_equal_bits(
            "reader.data",
            expected=np.array(expected, dtype=object),
            got=np.array(got, dtype=object),
            cycles=np.array(sink.cycles[first:]),
        )

    def check_memory(self, golden: bytearray) -> None:
        """Compare the memory with what it should hold."""
        assert_equal_bits(
            "writer: memory (by byte)",
            expected=np.frombuffer(bytes(golden), np.uint8),
            got=np.frombuffer(bytes(self.memory), np.uint8),
        )

    def check_error(self, unit: str, error: int, address: int) -> None:
        """Compare the report of an error with what it should be."""
        for output, expected in (("error", error), ("error_address", address)):
            got = self.get(unit, output)
            assert got == expected, (
                f"{unit}.{output}: cycle {self.cycle}: expected {expected:#x}, got {got:#x}"
            )

    def check_bursts(self, unit: str, commands: list[_Command], first: int = 0) -> None:
        """Compare the bursts on a bus from burst `first` on with what commands are split into."""
        monitor = getattr(self, unit).monitor
        expected = expected_bursts(self.config, commands)
        got = monitor.bursts[first:]
        assert len(got) == len(expected), f"{unit}: {len(got)} bursts, expected {len(expected)}"
        for part, name in enumerate(("address", "beats")):
            assert_equal_bits(
                f"{unit}: {name} of bursts",
                expected=np.array([burst[part] for burst in expected], dtype=object),
                got=np.array([burst[part] for burst in got], dtype=object),
                cycles=np.array(monitor.requested[first:]),
            )
        if unit == "writer":
            assert monitor.lasts[first:] == [beats for _, beats in expected], "writer: wlast"

    async def transfer(self, number: int) -> None:
        """Random reads and writes at the same time, from disjoint halves of the memory."""
        reads, writes = self.commands(number, half=0), self.commands(number, half=1)
        golden = bytearray(self.memory)
        first = {
            "beats": len(self.reader.data.items),
            "reads": len(self.reader.monitor.bursts),
            "writes": len(self.writer.monitor.bursts),
            "done": len(self.writer.done),
        }
        self.reader.command.queue.extend(map(self.pack, reads))
        self.writer.command.queue.extend(map(self.pack, writes))
        self.writer.data.queue.extend(self.write_beats(writes, golden))
        await self.until("transfers are finished", self.idle)
        assert self.get("reader", "error") == self.get("writer", "error") == Fault.NONE.value
        self.check_beats([beat for each in reads for beat in self.read(each)], first["beats"])
        self.check_memory(golden)
        self.check_bursts("reader", reads, first["reads"])
        self.check_bursts("writer", writes, first["writes"])
        counts = itertools.accumulate(len(expected_bursts(self.config, [each])) for each in writes)
        answered = self.writer.monitor.answered[first["writes"] :]
        assert self.writer.done[first["done"] :] == [answered[count - 1] for count in counts]


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def transfers_without_pauses(dut: object, index: int) -> None:
    """Random transfers with an independent model of memory at full speed."""
    world = await _World.start(dut, index, independent=True)
    await world.transfer(24)


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def transfers_with_pauses(dut: object, index: int) -> None:
    """Random transfers with random pauses on all channels and streams."""
    world = await _World.start(dut, index, independent=True, pause=_PAUSE)
    await world.transfer(24)


@cocotb.test()
@cocotb.parametrize(index=_SUSTAINING)
async def throughput(dut: object, index: int) -> None:
    """With ideal memory there is a beat in 98 % of the cycles, latencies included."""
    world = await _World.start(dut, index)
    words = _SIZE // world.config.beat_bytes
    for name, unit in (("reader", world.reader), ("writer", world.writer)):
        commands = []
        while sum(beats for _, beats in commands) < _THROUGHPUT_BEATS:
            commands.append(world.command(int(world.rng.integers(words // 4, words // 2))))
        golden = bytearray(world.memory)
        expected = [beat for each in commands for beat in world.read(each)]
        if name == "writer":
            unit.data.queue.extend(world.write_beats(commands, golden))
        unit.command.queue.extend(map(world.pack, commands))
        await world.until("transfers are finished", world.idle)
        if name == "reader":
            start, end = unit.command.taken[0], unit.data.cycles[-1]
        else:
            # The first whole burst is held back until its beats are there.
            start, end = unit.data.taken[0] + world.config.burst_beats, unit.done[-1]
        rate = len(expected) / (end - start)
        dut._log.info(f"{name}: {len(expected)} beats in {end - start} cycles: {rate:.2%}")
        if name == "reader":
            world.check_beats(expected)
        world.check_memory(golden)
        assert rate >= _MIN_THROUGHPUT, f"{name}: a beat in {rate:.2%} of the cycles"


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def latencies(dut: object, index: int) -> None:
    """Requests and beats come as many cycles after their causes as the units say."""
    world = await _World.start(dut, index)
    reader, writer = world.reader, world.writer
    await world.step(3)
    reader.command.queue.append(world.pack((world.base, 1)))
    await world.until("the read is finished", world.idle)
    request = reader.command.taken[0] + MemoryReader.LATENCY
    assert reader.monitor.requested == [request]
    assert reader.data.cycles == [request + _LATENCY + RamFifo.LATENCY]

    command = (world.base, world.config.burst_beats)
    beats = world.write_beats([command], bytearray(world.memory))
    writer.data.queue.extend(beats)
    await world.step(len(beats) + 5)
    writer.command.queue.append(world.pack(command))
    await world.until("the first write is finished", world.idle)
    assert writer.monitor.requested == [writer.command.taken[0] + MemoryWriter.LATENCY]
    writer.command.queue.append(world.pack(command))
    await world.step(10)
    writer.data.queue.extend(beats)
    await world.until("the second write is finished", world.idle)
    assert writer.monitor.requested[1] == writer.data.taken[-1] + MemoryWriter.DATA_LATENCY


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def bad_read_responses(dut: object, index: int) -> None:
    """The beats before a bad response are given, nothing after; then the reader goes on."""
    world = await _World.start(dut, index)
    config, reader = world.config, world.reader
    for _ in range(_ROUNDS):
        reader.data.pause = float(world.rng.choice([0, _PAUSE]))
        commands = world.commands(8)
        beats = [(a + i * config.beat_bytes, n) for a, n in commands for i in range(n)]
        bad = beats[int(world.rng.integers(len(beats)))][0]
        response = Fault(int(world.rng.choice([2, 3])))
        # The beats after it are bad in another way, which must not be reported.
        world.responders["reader"].responses = {
            bad + i * config.beat_bytes: response.value ^ (i > 0) for i in range(40)
        }
        responses = world.responders["reader"].responses
        index = next(i for i, (address, _) in enumerate(beats) if address in responses)
        bursts = expected_bursts(config, commands)
        ends = list(itertools.accumulate(length for _, length in bursts))
        failed = next(i for i, end in enumerate(ends) if end > index)

        first = {"beats": len(reader.data.items), "bursts": len(reader.monitor.bursts)}
        reader.command.queue.extend(map(world.pack, commands))
        await world.until("an error", lambda: world.get("reader", "error") != Fault.NONE.value)
        # Nothing is requested after the error but what was on the bus.
        requested = len(reader.monitor.requested)
        await world.step(100 + _LATENCY + config.depth + config.outstanding * config.burst_beats)
        assert len(reader.monitor.requested) == len(reader.monitor.answered) == requested
        assert reader.monitor.bursts[first["bursts"] :] == bursts[: requested - first["bursts"]]
        world.check_error("reader", responses[beats[index][0]], bursts[failed][0])
        golden = [beat for each in commands for beat in world.read(each)]
        world.check_beats(golden[:index], first["beats"])
        world.responders["reader"].responses = {}
        await world.clear("reader")
        await world.transfer(3)


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def bad_write_responses(dut: object, index: int) -> None:
    """A bad response ends its command without `done`; then the writer goes on."""
    world = await _World.start(dut, index)
    config, writer = world.config, world.writer
    for _ in range(_ROUNDS):
        commands = world.commands(8)
        bursts = expected_bursts(config, commands)
        bad = bursts[int(world.rng.integers(len(bursts)))][0]
        response = Fault(int(world.rng.choice([2, 3])))
        world.responders["writer"].responses = {
            address: response.value ^ (address != bad) for address, _ in bursts if address >= bad
        }
        responses = world.responders["writer"].responses
        failed = next(i for i, (address, _) in enumerate(bursts) if address in responses)
        counts = itertools.accumulate(len(expected_bursts(config, [each])) for each in commands)
        finished = sum(count <= failed for count in counts)

        first = {"done": len(writer.done), "bursts": len(writer.monitor.bursts)}
        beats = world.write_beats(commands, bytearray(_SIZE))
        golden = bytearray(world.memory)
        writer.data.queue.extend(beats)
        writer.command.queue.extend(map(world.pack, commands))
        await world.until("an error", lambda: world.get("writer", "error") != Fault.NONE.value)
        requested = len(writer.monitor.requested)
        await world.step(100 + _LATENCY + config.outstanding * config.burst_beats)
        assert len(writer.monitor.requested) == len(writer.monitor.answered) == requested
        sent = bursts[: requested - first["bursts"]]
        assert writer.monitor.bursts[first["bursts"] :] == sent
        world.check_error("writer", responses[bursts[failed][0]], bursts[failed][0])
        assert len(writer.done) - first["done"] == finished
        # Exactly the bursts that were on the bus have been written.
        beat = iter(beats)
        mask = (1 << config.data_bits) - 1
        for address, length in sent:
            for i in range(length):
                value = next(beat)
                place, strobe = address + i * config.beat_bytes, value >> config.data_bits
                _store(golden, place, value & mask, strobe, config.beat_bytes)
        world.check_memory(golden)
        world.responders["writer"].responses = {}
        await world.clear("writer")
        await world.transfer(3)


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def errors_of_the_independent_model(dut: object, index: int) -> None:
    """Errors, as cocotbext-axi's models answer them, with pauses on all channels."""
    world = await _World.start(dut, index, independent=True, pause=_PAUSE)
    config = world.config
    for name, unit in (("reader", world.reader), ("writer", world.writer)):
        command = world.command(2 * config.burst_beats + 1)
        bursts = expected_bursts(config, [command])
        bad = bursts[1][0]
        world.target.bad = set(range(bad, bad + config.beat_bytes))
        if name == "writer":
            data = [(1 << config.data_bits + config.beat_bytes) - 1] * command[1]
            unit.data.queue.extend(data)
        first = len(unit.data.items) if name == "reader" else len(unit.done)
        unit.command.queue.append(world.pack(command))
        await world.until("an error", lambda n=name: world.get(n, "error") != Fault.NONE.value)
        world.check_error(name, Fault.SLAVE.value, bad)
        await world.step(200)
        if name == "reader":
            world.check_beats(world.read(command)[: bursts[0][1]], first)
        else:
            assert len(unit.done) == first
        world.target.bad = set()
        await world.clear(name)
        await world.transfer(3)


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def refused_commands(dut: object, index: int) -> None:
    """What leaves the region or is malformed never reaches the bus; what came before is done."""
    world = await _World.start(dut, index)
    config = world.config
    size, top = config.beat_bytes, 1 << config.address_bits
    most = (1 << BEATS_BITS) - 1
    end = world.base + _SIZE
    refused = [
        (world.base - size, 1),
        (world.base - size, 2),
        (end, 1),
        (end - size, 2),
        (world.base, _SIZE // size + 1),
        (world.base, most),
        (world.base, 0),
        (world.base + 1, 1),
        (world.base + size // 2, 1),
        (0, 1),
        (top - size, 1),
        # Around the end of the address space, back into the region.
        (top - size, 2 + world.base // size),
        (world.base, min(most, top // size + 1)),
    ]
    for name, unit in (("reader", world.reader), ("writer", world.writer)):
        for address, beats in refused:
            before = world.commands(2)
            first = len(unit.monitor.bursts)
            if name == "writer":
                count = sum(beats for _, beats in before) + 1
                unit.data.queue.extend(world.write_beats([(world.base, count)], bytearray(_SIZE)))
                done = len(unit.done)
            else:
                received = len(unit.data.items)
            queued = [*before, (address % top, beats & most), world.command(1)]
            unit.command.queue.extend(map(world.pack, queued))
            await world.until("a refusal", lambda n=name: world.get(n, "error"))
            world.check_error(name, Fault.REFUSED.value, address % top)
            await world.step(100 + 2 * _LATENCY + sum(beats for _, beats in before))
            world.check_bursts(name, before, first)
            if name == "reader":
                world.check_beats([b for each in before for b in world.read(each)], received)
            else:
                assert len(unit.done) - done == len(before)
            await world.clear(name)
    await world.transfer(3)


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def region_up_to_its_last_byte(dut: object, index: int) -> None:
    """A command that fills the region is allowed, also at the end of the address space."""
    world = await _World.start(dut, index)
    for base in (0, (1 << world.config.address_bits) - _SIZE):
        world.set_region(base)
        command = base, _SIZE // world.config.beat_bytes
        first = len(world.reader.data.items)
        world.reader.command.queue.append(world.pack(command))
        await world.until("the read is finished", world.idle)
        world.check_beats(world.read(command), first)
        golden = bytearray(world.memory)
        world.writer.data.queue.extend(world.write_beats([command], golden))
        world.writer.command.queue.append(world.pack(command))
        await world.until("the write is finished", world.idle)
        world.check_memory(golden)


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def limits_of_what_is_outstanding(dut: object, index: int) -> None:
    """Without answers, requests stop at the limit; without a consumer, at the buffer's depth."""
    world = await _World.start(dut, index)
    config = world.config
    long = world.base, _SIZE // config.beat_bytes
    short = world.base, 1
    for responder in world.responders.values():
        responder.answers = False
    for name, unit in (("reader", world.reader), ("writer", world.writer)):
        number = config.outstanding + 4
        unit.command.queue.extend([world.pack(short)] * number)
        if name == "writer":
            unit.data.queue.extend(world.write_beats([short] * number, bytearray(_SIZE)))
        await world.step(20 * config.outstanding)
        allowed = config.outstanding if name == "writer" else min(config.outstanding, config.depth)
        assert len(unit.monitor.requested) == allowed, name
    for responder in world.responders.values():
        responder.answers = True
    await world.until("the transfers are finished", world.idle)

    # Nobody takes the beats: all that was requested is received nevertheless.
    reader = world.reader
    reader.data.pause = 1.0
    await world.step()
    first = {"beats": len(reader.data.items), "bursts": len(reader.monitor.bursts)}
    reader.command.queue.append(world.pack(long))
    await world.step(500 + 3 * config.depth)
    bursts = reader.monitor.bursts[first["bursts"] :]
    assert len(reader.monitor.requested) == len(reader.monitor.answered)
    assert config.depth - config.burst_beats < sum(n for _, n in bursts) <= config.depth
    reader.data.pause = 0.0
    await world.until("the read is finished", world.idle)
    world.check_beats(world.read(long), first["beats"])

    # A burst is not requested before its last beat is there.
    writer = world.writer
    command = world.base, config.burst_beats
    beats = world.write_beats([command], bytearray(_SIZE))
    requested = len(writer.monitor.requested)
    writer.command.queue.append(world.pack(command))
    writer.data.queue.extend(beats[:-1])
    await world.step(len(beats) + 50)
    assert len(writer.monitor.requested) == requested
    writer.data.queue.append(beats[-1])
    await world.until("the write is finished", world.idle)


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def reset_in_a_burst(dut: object, index: int) -> None:
    """A reset in mid-transfer leaves nothing behind."""
    world = await _World.start(dut, index, independent=True, pause=_PAUSE)
    for _ in range(_ROUNDS):
        for name, unit in (("reader", world.reader), ("writer", world.writer)):
            commands = world.commands(20)
            unit.command.queue.extend(map(world.pack, commands))
            if name == "writer":
                unit.data.queue.extend(world.write_beats(commands, bytearray(_SIZE)))
        await world.step(int(world.rng.integers(10, 200)))
        await world.reset()
        for name in ("reader", "writer"):
            assert not world.get(name, "busy") and not world.get(name, "error"), name
        await world.transfer(3)


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def clear_without_an_error(dut: object, index: int) -> None:
    """A clear at any time aborts, finishes what is on the bus, and leaves nothing behind."""
    world = await _World.start(dut, index, independent=True, pause=_PAUSE)
    for _ in range(_ROUNDS):
        for name, unit in (("reader", world.reader), ("writer", world.writer)):
            commands = world.commands(20)
            unit.command.queue.extend(map(world.pack, commands))
            if name == "writer":
                unit.data.queue.extend(world.write_beats(commands, bytearray(_SIZE)))
            unit.data.pause = 0.9 if name == "reader" else _PAUSE  # so that beats are left over
            await world.step(int(world.rng.integers(10, 200)))
            await world.clear(name)
            unit.data.pause = _PAUSE
            requested = len(unit.monitor.requested)
            assert requested == len(unit.monitor.answered)
            await world.step(50)
            assert len(unit.monitor.requested) == requested, name
        await world.transfer(3)
