# SPDX-License-Identifier: Apache-2.0
"""Testbench of the memory reader and writer.

Transfers run against cocotbext-axi's memory models, which were written independently, with random
pauses on all channels; exact timing and bad responses come from responders. In all tests a monitor
checks the rules of AXI4, and that the bursts on the bus are the expected ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import cocotb
import numpy as np

from speq.hw.common.ram import RAM_VERILOG
from speq.hw.common.ram_fifo import RamFifo
from speq.hw.memory.axi import BEATS_BITS, AxiConfig, Fault
from speq.hw.memory.memory_reader import MemoryReader
from speq.hw.memory.memory_writer import MemoryWriter
from speq.hw.verilog import convert_unit
from speq.sim.benches.axi import (
    LATENCY,
    Memory,
    Monitor,
    ReadResponder,
    Responder,
    Transfer,
    WriteResponder,
    expected_bursts,
    serve_reads,
    serve_writes,
)
from speq.sim.benches.streams import Sink, Source
from speq.sim.benches.world import Ports, SideBySide, World
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
#: Cycles after which a test gives up waiting.
_PATIENCE = 20_000
#: Share of cycles in which a paused channel pauses.
_PAUSE = 0.4
#: Rounds of tests of faults, each with other commands.
_ROUNDS = 3
_THROUGHPUT_BEATS = 2048
_MIN_THROUGHPUT = 0.98


def run() -> None:
    """Check readers and writers with several parameters."""
    units = {}
    for i, config in enumerate(_CONFIGS):
        units |= {f"reader_{i}": MemoryReader(config), f"writer_{i}": MemoryWriter(config)}
    simulate(convert_unit(SideBySide(units), _TOP) + RAM_VERILOG, _TOP, __name__)


#: The other end of a unit's stream of data.
_End = TypeVar("_End", Sink, Source)


@dataclass
class _Unit(Generic[_End]):
    """The reader or the writer and what is around it, but for what answers on the bus."""

    ports: Ports
    command: Source
    data: _End
    monitor: Monitor
    done: list[int]  # cycles

    def agents(self) -> list[Callable[[int], None]]:
        """What has to be done in each cycle, but for what answers on the bus."""
        return [self.command.step, self.data.step, self.monitor.step]

    def is_idle(self, cycle: int) -> bool:
        """Whether it has nothing to do."""
        return self.command.is_done(cycle) and not self.ports.get("busy")


_INPUTS = {
    "reader": ("clear", "axi__arready", "axi__rid", "axi__rvalid", "axi__rlast"),
    "writer": ("clear", "axi__awready", "axi__wready", "axi__bid", "axi__bvalid"),
}


class _World(World):
    """A reader and a writer, and their surroundings."""

    def __init__(self, dut: Any, index: int, independent: bool) -> None:
        self.config = _CONFIGS[index]
        super().__init__(dut, str(self.config), np.random.default_rng(seed()), _PATIENCE)
        self.ports = {unit: Ports(dut, f"{unit}_{index}") for unit in _INPUTS}
        self.independent = independent
        content = self.rng.bytes(_SIZE)
        # Neither the first nor the last place that such a region can have.
        regions = (1 << self.config.address_bits) // _SIZE
        self.memory = Memory(content, int(self.rng.integers(1, regions - 1)) * _SIZE)

    @classmethod
    async def start(
        cls, dut: Any, index: int, *, independent: bool = False, pause: float = 0.0
    ) -> _World:
        """After a reset, with cocotbext-axi's memory models or with responders."""
        world = cls(dut, index, independent)
        world.start_clock()
        world.set_region(world.base)
        for unit, names in _INPUTS.items():
            for name in names:
                world.ports[unit][name].value = 0
        if independent:
            serve_reads(world.ports["reader"], world.memory, world.rng, pause)
            serve_writes(world.ports["writer"], world.memory, world.rng, pause)
        await world.reset()
        for unit in (world.reader, world.writer):
            unit.command.pause = unit.data.pause = pause
        return world

    @property
    def base(self) -> int:
        """Address of the region's first byte."""
        return self.memory.base

    def set_region(self, base: int) -> None:
        """Let both units' region begin at `base`."""
        self.memory.base = base
        for ports in self.ports.values():
            ports["base"].value = base
            ports["limit"].value = base + _SIZE - 1

    def connect(self) -> list[Callable[[int], None]]:
        def unit(name: str, end: type[_End]) -> _Unit[_End]:
            ports = self.ports[name]
            return _Unit(
                ports,
                Source(ports, "command", self.rng),
                end(ports, "data", self.rng),
                Monitor(ports, self.config, self.memory, writes=name == "writer"),
                [],
            )

        self.reader, self.writer = unit("reader", Sink), unit("writer", Source)
        self.responders: dict[str, Responder] = {}
        if not self.independent:  # else slaves serve the bus
            kinds = {"reader": ReadResponder, "writer": WriteResponder}
            for name, kind in kinds.items():
                self.responders[name] = kind(self.ports[name], self.config, self.memory)
        responders = [responder.step for responder in self.responders.values()]
        return [*self.reader.agents(), *self.writer.agents(), *responders, self._watch_done]

    def _watch_done(self, cycle: int) -> None:
        if self.writer.ports.get("done"):
            self.writer.done.append(cycle)

    def idle(self) -> bool:
        """Whether both units have nothing to do."""
        return self.reader.is_idle(self.cycle) and self.writer.is_idle(self.cycle)

    async def clear(self, name: str) -> None:
        """Clear a unit for a cycle and wait until it is idle.

        What has not been taken of its streams is forgotten.
        """
        unit = getattr(self, name)
        unit.command.withdraw()
        if isinstance(unit.data, Source):
            unit.data.withdraw()
        unit.ports["clear"].value = 1
        await self.step()
        unit.ports["clear"].value = 0
        if isinstance(unit.data, Sink):
            unit.data.forget_offer()
        await self.step()
        await self.until(f"{name} is cleared", self.idle)

    def command(self, beats: int, *, half: int | None = None) -> Transfer:
        """A random command in the region, or in its lower (0) or upper (1) half."""
        size = self.config.beat_bytes
        words = _SIZE // size // (1 if half is None else 2)
        first = int(self.rng.integers(0, words - beats + 1)) + (half or 0) * words
        return self.base + first * size, beats

    def commands(self, number: int, *, half: int | None = None) -> list[Transfer]:
        """Random commands, many of them short, some over several bursts and pages."""
        words = _SIZE // 2 // self.config.beat_bytes
        longest = min(words, 3 * self.config.burst_beats + 2)
        lengths = [
            int(self.rng.integers(1, limit + 1))
            for limit in self.rng.choice([2, self.config.burst_beats + 1, longest], number)
        ]
        return [self.command(beats, half=half) for beats in lengths]

    def pack(self, command: Transfer) -> int:
        """A command as its stream's payload."""
        address, beats = command
        return beats << self.config.address_bits | address

    def read(self, command: Transfer) -> list[int]:
        """The beats of memory that a command covers."""
        address, beats = command
        size = self.config.beat_bytes
        return [self.memory.load_beat(address + i * size, size) for i in range(beats)]

    def write_beats(self, commands: list[Transfer], golden: Memory | None = None) -> list[int]:
        """Random beats for commands as the stream's payloads; what they write goes to `golden`."""
        size = self.config.beat_bytes
        payloads = []
        for address, beats in commands:
            for i in range(beats):
                data = int.from_bytes(self.rng.bytes(size), "little")
                strobe = int.from_bytes(self.rng.bytes(size // 8), "little")
                if self.rng.random() < 0.5:
                    strobe = (1 << size) - 1
                if golden is not None:
                    golden.store_beat(address + i * size, size, data, strobe)
                payloads.append(strobe << self.config.data_bits | data)
        return payloads

    def queue(self, name: str, commands: list[Transfer]) -> None:
        """Give a unit commands, and if it writes, random beats for them."""
        unit = getattr(self, name)
        unit.command.queue.extend(map(self.pack, commands))
        if name == "writer":
            self.writer.data.queue.extend(self.write_beats(commands))

    def check_memory(self, golden: Memory) -> None:
        """Compare the memory with what it should hold."""
        assert_equal_bits(
            "writer: memory (by byte)",
            expected=np.frombuffer(golden.content, np.uint8),
            got=np.frombuffer(self.memory.content, np.uint8),
        )

    def check_error(self, name: str, error: int, address: int) -> None:
        """Compare the report of an error with what it should be."""
        self.ports[name].check(self.cycle, error=error, error_address=address)

    def has_error(self, name: str) -> bool:
        """Whether a unit reports an error."""
        return self.ports[name].get("error") != Fault.NONE.value

    def check_bursts(self, name: str, commands: list[Transfer], first: int = 0) -> None:
        """Compare the bursts on a bus from burst `first` on with what commands are split into."""
        monitor = getattr(self, name).monitor
        expected = expected_bursts(self.config, commands)
        got = monitor.bursts[first:]
        assert len(got) == len(expected), f"{name}: {len(got)} bursts, expected {len(expected)}"
        for i, part in enumerate(("address", "beats")):
            assert_equal_bits(
                f"{name}: {part} of bursts",
                expected=np.array([burst[i] for burst in expected], dtype=object),
                got=np.array([burst[i] for burst in got], dtype=object),
                cycles=np.array(monitor.requested[first:]),
            )
        if name == "writer":
            assert monitor.lasts[first:] == [beats for _, beats in expected], "writer: wlast"

    async def transfer(self, number: int) -> None:
        """Random reads and writes at the same time, from disjoint halves of the memory."""
        reads, writes = self.commands(number, half=0), self.commands(number, half=1)
        golden = self.memory.copy()
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
        for ports in self.ports.values():
            ports.check(self.cycle, error=Fault.NONE.value)
        self.reader.data.check([beat for each in reads for beat in self.read(each)], first["beats"])
        self.check_memory(golden)
        self.check_bursts("reader", reads, first["reads"])
        self.check_bursts("writer", writes, first["writes"])
        counts = itertools.accumulate(len(expected_bursts(self.config, [each])) for each in writes)
        answered = self.writer.monitor.answered[first["writes"] :]
        assert self.writer.done[first["done"] :] == [answered[count - 1] for count in counts]


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def transfers_without_pauses(dut: Any, index: int) -> None:
    """Random transfers with an independent model of memory at full speed."""
    world = await _World.start(dut, index, independent=True)
    await world.transfer(24)


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def transfers_with_pauses(dut: Any, index: int) -> None:
    """Random transfers with random pauses on all channels and streams."""
    world = await _World.start(dut, index, independent=True, pause=_PAUSE)
    await world.transfer(24)


@cocotb.test()
@cocotb.parametrize(index=_SUSTAINING)
async def throughput(dut: Any, index: int) -> None:
    """With ideal memory there is a beat in 98 % of the cycles, latencies included."""
    world = await _World.start(dut, index)
    words = _SIZE // world.config.beat_bytes
    for name, unit in (("reader", world.reader), ("writer", world.writer)):
        commands = []
        while sum(beats for _, beats in commands) < _THROUGHPUT_BEATS:
            commands.append(world.command(int(world.rng.integers(words // 4, words // 2))))
        golden = world.memory.copy()
        expected = [beat for each in commands for beat in world.read(each)]
        if name == "writer":
            world.writer.data.queue.extend(world.write_beats(commands, golden))
        unit.command.queue.extend(map(world.pack, commands))
        await world.until("transfers are finished", world.idle)
        if name == "reader":
            start, end = unit.command.taken[0], world.reader.data.cycles[-1]
        else:
            # The first whole burst is held back until its beats are there.
            first = world.writer.data.taken[0]
            start, end = first + world.config.burst_beats, unit.done[-1]
        rate = len(expected) / (end - start)
        dut._log.info(f"{name}: {len(expected)} beats in {end - start} cycles: {rate:.2%}")
        if name == "reader":
            world.reader.data.check(expected)
        world.check_memory(golden)
        assert rate >= _MIN_THROUGHPUT, f"{name}: a beat in {rate:.2%} of the cycles"


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def latencies(dut: Any, index: int) -> None:
    """Requests and beats come as many cycles after their causes as the units say."""
    world = await _World.start(dut, index)
    reader, writer = world.reader, world.writer
    await world.step(3)
    reader.command.queue.append(world.pack((world.base, 1)))
    await world.until("the read is finished", world.idle)
    request = reader.command.taken[0] + MemoryReader.LATENCY
    assert reader.monitor.requested == [request]
    assert reader.data.cycles == [request + LATENCY + RamFifo.LATENCY]

    command = (world.base, world.config.burst_beats)
    beats = world.write_beats([command], world.memory.copy())
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
async def bad_read_responses(dut: Any, index: int) -> None:
    """The beats before a bad response are given, nothing after; then the reader goes on."""
    world = await _World.start(dut, index)
    config, reader, responder = world.config, world.reader, world.responders["reader"]
    for _ in range(_ROUNDS):
        reader.data.pause = float(world.rng.choice([0, _PAUSE]))
        commands = world.commands(8)
        beats = [(a + i * config.beat_bytes, n) for a, n in commands for i in range(n)]
        bad = beats[int(world.rng.integers(len(beats)))][0]
        response = Fault(int(world.rng.choice([2, 3])))
        # The beats after it are bad in another way, which must not be reported.
        responder.responses = {
            bad + i * config.beat_bytes: response.value ^ (i > 0) for i in range(40)
        }
        responses = responder.responses
        index = next(i for i, (address, _) in enumerate(beats) if address in responses)
        bursts = expected_bursts(config, commands)
        ends = list(itertools.accumulate(length for _, length in bursts))
        failed = next(i for i, end in enumerate(ends) if end > index)

        first = {"beats": len(reader.data.items), "bursts": len(reader.monitor.bursts)}
        reader.command.queue.extend(map(world.pack, commands))
        await world.until("an error", lambda: world.has_error("reader"))
        # Nothing is requested after the error but what was on the bus.
        requested = len(reader.monitor.requested)
        await world.step(100 + LATENCY + config.depth + config.outstanding * config.burst_beats)
        assert len(reader.monitor.requested) == len(reader.monitor.answered) == requested
        assert reader.monitor.bursts[first["bursts"] :] == bursts[: requested - first["bursts"]]
        world.check_error("reader", responses[beats[index][0]], bursts[failed][0])
        golden = [beat for each in commands for beat in world.read(each)]
        world.reader.data.check(golden[:index], first["beats"])
        responder.responses = {}
        await world.clear("reader")
        await world.transfer(3)


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def bad_write_responses(dut: Any, index: int) -> None:
    """A bad response ends its command without `done`; then the writer goes on."""
    world = await _World.start(dut, index)
    config, writer, responder = world.config, world.writer, world.responders["writer"]
    for _ in range(_ROUNDS):
        commands = world.commands(8)
        bursts = expected_bursts(config, commands)
        bad = bursts[int(world.rng.integers(len(bursts)))][0]
        response = Fault(int(world.rng.choice([2, 3])))
        responder.responses = {
            address: response.value ^ (address != bad) for address, _ in bursts if address >= bad
        }
        responses = responder.responses
        failed = next(i for i, (address, _) in enumerate(bursts) if address in responses)
        counts = itertools.accumulate(len(expected_bursts(config, [each])) for each in commands)
        finished = sum(count <= failed for count in counts)

        first = {"done": len(writer.done), "bursts": len(writer.monitor.bursts)}
        beats = world.write_beats(commands)
        golden = world.memory.copy()
        writer.data.queue.extend(beats)
        writer.command.queue.extend(map(world.pack, commands))
        await world.until("an error", lambda: world.has_error("writer"))
        requested = len(writer.monitor.requested)
        await world.step(100 + LATENCY + config.outstanding * config.burst_beats)
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
                golden.store_beat(place, config.beat_bytes, value & mask, strobe)
        world.check_memory(golden)
        responder.responses = {}
        await world.clear("writer")
        await world.transfer(3)


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def errors_of_the_independent_model(dut: Any, index: int) -> None:
    """Errors, as cocotbext-axi's models answer them, with pauses on all channels."""
    world = await _World.start(dut, index, independent=True, pause=_PAUSE)
    config = world.config
    for name, unit in (("reader", world.reader), ("writer", world.writer)):
        command = world.command(2 * config.burst_beats + 1)
        bursts = expected_bursts(config, [command])
        bad = bursts[1][0]
        world.memory.bad = set(range(bad, bad + config.beat_bytes))
        if name == "writer":
            data = [(1 << config.data_bits + config.beat_bytes) - 1] * command[1]
            world.writer.data.queue.extend(data)
        first = len(world.reader.data.items) if name == "reader" else len(unit.done)
        unit.command.queue.append(world.pack(command))
        await world.until("an error", lambda n=name: world.has_error(n))
        world.check_error(name, Fault.SLAVE.value, bad)
        await world.step(200)
        if name == "reader":
            world.reader.data.check(world.read(command)[: bursts[0][1]], first)
        else:
            assert len(unit.done) == first
        world.memory.bad = set()
        await world.clear(name)
        await world.transfer(3)


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def refused_commands(dut: Any, index: int) -> None:
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
            received, done = len(world.reader.data.items), len(world.writer.done)
            if name == "writer":
                count = sum(beats for _, beats in before) + 1
                world.writer.data.queue.extend(world.write_beats([(world.base, count)]))
            queued = [*before, (address % top, beats & most), world.command(1)]
            unit.command.queue.extend(map(world.pack, queued))
            await world.until("a refusal", lambda n=name: world.has_error(n))
            world.check_error(name, Fault.REFUSED.value, address % top)
            await world.step(100 + 2 * LATENCY + sum(beats for _, beats in before))
            world.check_bursts(name, before, first)
            if name == "reader":
                world.reader.data.check([b for each in before for b in world.read(each)], received)
            else:
                assert len(unit.done) - done == len(before)
            await world.clear(name)
    await world.transfer(3)


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def region_up_to_its_last_byte(dut: Any, index: int) -> None:
    """A command that fills the region is allowed, also at the end of the address space."""
    world = await _World.start(dut, index)
    for base in (0, (1 << world.config.address_bits) - _SIZE):
        world.set_region(base)
        command = base, _SIZE // world.config.beat_bytes
        first = len(world.reader.data.items)
        world.reader.command.queue.append(world.pack(command))
        await world.until("the read is finished", world.idle)
        world.reader.data.check(world.read(command), first)
        golden = world.memory.copy()
        world.writer.data.queue.extend(world.write_beats([command], golden))
        world.writer.command.queue.append(world.pack(command))
        await world.until("the write is finished", world.idle)
        world.check_memory(golden)


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def limits_of_what_is_outstanding(dut: Any, index: int) -> None:
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
            world.writer.data.queue.extend(world.write_beats([short] * number))
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
    world.reader.data.check(world.read(long), first["beats"])

    # A burst is not requested before its last beat is there.
    writer = world.writer
    command = world.base, config.burst_beats
    beats = world.write_beats([command])
    requested = len(writer.monitor.requested)
    writer.command.queue.append(world.pack(command))
    writer.data.queue.extend(beats[:-1])
    await world.step(len(beats) + 50)
    assert len(writer.monitor.requested) == requested
    writer.data.queue.append(beats[-1])
    await world.until("the write is finished", world.idle)


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def reset_in_a_burst(dut: Any, index: int) -> None:
    """A reset in mid-transfer leaves nothing behind."""
    world = await _World.start(dut, index, independent=True, pause=_PAUSE)
    for _ in range(_ROUNDS):
        for name in ("reader", "writer"):
            world.queue(name, world.commands(20))
        await world.step(int(world.rng.integers(10, 200)))
        await world.reset()
        for name in ("reader", "writer"):
            world.ports[name].check(world.cycle, busy=0, error=Fault.NONE.value)
        await world.transfer(3)


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def clear_without_an_error(dut: Any, index: int) -> None:
    """A clear at any time aborts, finishes what is on the bus, and leaves nothing behind."""
    world = await _World.start(dut, index, independent=True, pause=_PAUSE)
    for _ in range(_ROUNDS):
        for name, unit in (("reader", world.reader), ("writer", world.writer)):
            world.queue(name, world.commands(20))
            unit.data.pause = 0.9 if name == "reader" else _PAUSE  # so that beats are left over
            await world.step(int(world.rng.integers(10, 200)))
            await world.clear(name)
            unit.data.pause = _PAUSE
            requested = len(unit.monitor.requested)
            assert requested == len(unit.monitor.answered)
            await world.step(50)
            assert len(unit.monitor.requested) == requested, name
        await world.transfer(3)
