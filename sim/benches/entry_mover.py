# SPDX-License-Identifier: Apache-2.0
"""Testbench of `EntryMover`: random moves in a model of memory, written as the datapath writes.

The memory is cocotbext-axi's, which was written independently. Afterwards it must be what NumPy
makes of it, byte for byte, from the key and value arrays as the memory layout has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cocotb
import numpy as np
from amaranth.hdl import Elaboratable, Module, ResetInserter
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.common.ram import RAM_VERILOG
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig, Fault, guarded_members
from speq.hw.memory.memory_writer import MemoryWriter
from speq.hw.memory.write_mux import WriteMux
from speq.hw.vector.entry_mover import EntryMover, entry_command_layout
from speq.hw.verilog import convert_unit
from speq.sim.benches.axi import Memory, serve_reads, serve_writes
from speq.sim.benches.streams import Source
from speq.sim.benches.world import Ports, SideBySide, World
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed, simulate

_TOP = "entry_mover_tb"
#: Bytes of the memory, which fills a region that begins at a multiple of its size.
_SIZE = 1 << 17
_BASE = 3 * _SIZE
_PAUSE = 0.4
_PATIENCE = 60_000
_ROUNDS = 6
_FP16_BYTES = 2


def _system(cols: int, data_bits: int, **axi: int) -> AcceleratorConfig:
    data = AxiConfig(data_bits=data_bits, address_bits=32, **axi)
    weights = AxiConfig(data_bits=64, address_bits=32)
    return AcceleratorConfig(EngineConfig(rows=4, cols=cols), weights, data, lanes=4)


#: Those under test: lines of one beat, of two and of eight.
_CONFIGS = (
    _system(8, 128),
    _system(16, 128, burst=4, outstanding=2, depth=8),
    _system(32, 64),
)


class _Mover(wiring.Component):
    """The unit, and what writes for it."""

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        halves = config.data.read_signature, config.data.write_signature
        bus = {name: member for half in halves for name, member in half.members.items()}
        super().__init__(
            {
                "axi": Out(wiring.Signature(bus)),
                "command": In(stream.Signature(entry_command_layout(config))),
                "writer_error": Out(Fault),
                "drained": Out(1),
            }
            | guarded_members(config.address_bits)
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config = self.config
        m.submodules.mover = mover = EntryMover(config)
        mux = WriteMux(config.data, 1)
        m.submodules.mux = ResetInserter(self.clear)(mux)
        m.submodules.writer = writer = MemoryWriter(config.data)
        wiring.connect(m, wiring.flipped(self.command), mover.command)
        wiring.connect(m, mover.write, mux.sources[0])
        wiring.connect(m, mux.command, writer.command)
        wiring.connect(m, mux.data, writer.data)
        for inner in (mover.axi, writer.axi):
            for name, member in inner.signature.members.items():
                ends = getattr(self.axi, name), getattr(inner, name)
                target, source = ends if member.flow == Out else reversed(ends)
                m.d.comb += target.eq(source)
        for unit in (mover, writer):
            m.d.comb += [
                unit.base.eq(self.base),
                unit.limit.eq(self.limit),
                unit.clear.eq(self.clear),
            ]
        m.d.comb += [
            mux.done_in.eq(writer.done),
            self.busy.eq(mover.busy),
            self.error.eq(mover.error),
            self.error_address.eq(mover.error_address),
            self.writer_error.eq(writer.error),
            self.drained.eq(~writer.busy),
        ]
        return m


def run() -> None:
    """Check the unit with several configurations."""
    units = {f"u{i}": _Mover(config) for i, config in enumerate(_CONFIGS)}
    simulate(convert_unit(SideBySide(units), _TOP) + RAM_VERILOG, _TOP, __name__)


class _World(World):
    """The unit of one configuration, its memory, and what should be in it."""

    def __init__(self, dut: Any, index: int) -> None:
        self.config = _CONFIGS[index]
        rng = np.random.default_rng([seed(), index])
        super().__init__(dut, f"EntryMover, {self.config}", rng, _PATIENCE)
        self.ports = Ports(dut, f"u{index}")
        self.memory = Memory(self.rng.bytes(_SIZE), _BASE)
        self.golden = np.frombuffer(bytes(self.memory.content), "<u2").copy()

    @classmethod
    async def start(cls, dut: Any, index: int, pause: float) -> _World:
        """After a reset."""
        world = cls(dut, index)
        world.start_clock()
        world.ports["base"].value = _BASE
        world.ports["limit"].value = _BASE + _SIZE - 1
        world.ports["clear"].value = 0
        serve_reads(world.ports, world.memory, world.rng, pause)
        serve_writes(world.ports, world.memory, world.rng, pause)
        await world.reset()
        world.command.pause = pause
        return world

    def connect(self) -> list[Callable[[int], None]]:
        self.command = Source(self.ports, "command", self.rng)
        return [self.command.step]

    def is_idle(self) -> bool:
        """Whether everything has been moved."""
        return (
            self.command.is_done(self.cycle)
            and not self.ports.get("busy")
            and bool(self.ports.get("drained"))
        )

    def random_move(self) -> dict[str, int]:
        """A move within a random block whose keys and values do not overlap."""
        rng, cols = self.rng, self.config.engine.cols
        line, multiple = cols * _FP16_BYTES, self.config.alignment
        heads = int(rng.integers(1, 4))
        size = int(rng.choice([1, cols - 1, cols, cols + 1, int(rng.integers(1, 3 * cols))]))
        tiles = int(rng.integers(1, 7))  # of entries
        gap = int(rng.integers(3)) * multiple
        key_stride = -(-heads * size * line // multiple) * multiple + gap
        value_stride = -(-tiles * cols * line // multiple) * multiple + gap
        value_tiles = heads * -(-size // cols)
        keys, values = tiles * key_stride, value_tiles * value_stride
        assert keys + values <= _SIZE
        first = int(rng.integers((_SIZE - keys - values) // multiple + 1)) * multiple
        source = int(rng.integers(tiles * cols))
        near = source // cols * cols + int(rng.integers(cols))
        return {
            "k": size,
            "o": heads,
            "first": _BASE + first,
            "second": _BASE + first + keys,
            "inner": key_stride,
            "outer": value_stride,
            "source": source,
            "position": int(rng.choice([near, int(rng.integers(tiles * cols))])),
        }

    def add(self, move: dict[str, int]) -> None:
        """Queue a move, and make it in the copy of the memory."""
        self.command.queue.append(entry_command_layout(self.config).const(move).as_bits())
        cols = self.config.engine.cols
        places = []
        for entry in (move["source"], move["position"]):
            tile = move["first"] + entry // cols * move["inner"] - _BASE
            lines = np.arange(move["o"] * move["k"]) * cols
            keys = tile // _FP16_BYTES + lines + entry % cols
            starts = np.arange(move["o"] * -(-move["k"] // cols)) * move["outer"]
            starts = (move["second"] - _BASE + starts) // _FP16_BYTES + entry * cols
            values = starts[:, None] + np.arange(cols)
            places.append(np.concatenate([keys, values.reshape(-1)]))
        self.golden[places[1]] = self.golden[places[0]]

    async def until_moved(self) -> None:
        """Wait for the end of all moves, and compare the memory."""
        await self.until("all has been moved", self.is_idle)
        await self.step(10)
        self.ports.check(self.cycle, error=Fault.NONE.value, writer_error=Fault.NONE.value)
        self.check_memory()

    def check_memory(self) -> None:
        """Compare the memory with what it should hold."""
        assert_equal_bits(
            f"EntryMover: seed {seed()}: memory (by element)",
            expected=self.golden,
            got=np.frombuffer(bytes(self.memory.content), "<u2"),
        )

    async def clear(self) -> None:
        """Abort everything, and wait until all transactions are over."""
        self.command.withdraw()
        self.ports["clear"].value = 1
        await self.step()
        self.ports["clear"].value = 0
        await self.step(2)
        await self.until("cleared", self.is_idle)
        self.ports.check(self.cycle, error=Fault.NONE.value, writer_error=Fault.NONE.value)


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)), pause=(0.0, _PAUSE))
async def moves(dut: Any, index: int, pause: float) -> None:
    """Random moves one after the other, within a tile and from tile to tile."""
    world = await _World.start(dut, index, pause)
    for _ in range(_ROUNDS):
        for _ in range(int(world.rng.integers(1, 4))):
            world.add(world.random_move())
        await world.until_moved()


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def beats_follow_each_other(dut: Any, index: int) -> None:
    """A large move takes few more cycles than it has beats."""
    world = await _World.start(dut, index, 0.0)
    cols, beat = world.config.engine.cols, world.config.data.beat_bytes
    move = world.random_move() | {"k": 2 * cols, "o": 3, "source": 5, "position": 2}
    stride = 3 * 2 * cols * cols * _FP16_BYTES
    move |= {"first": _BASE, "inner": stride, "second": _BASE + stride}
    move["outer"] = cols * cols * _FP16_BYTES
    world.add(move)
    begun = world.cycle
    await world.until("all has been moved", world.is_idle)
    beats = 3 * (2 * cols + 2) * cols * _FP16_BYTES // beat
    slack = 200 if world.config.data.outstanding > 2 else 4 * beats
    assert world.cycle - begun <= 1.25 * beats + slack, f"{world.cycle - begun} for {beats} beats"
    await world.until_moved()


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def clear_at_any_time(dut: Any, index: int) -> None:
    """A clear drops everything; only places of the target have been written, with what is right."""
    world = await _World.start(dut, index, _PAUSE)
    for _ in range(_ROUNDS):
        before = world.golden.copy()
        world.add(world.random_move())
        await world.step(int(world.rng.integers(1, 200)))
        await world.clear()
        got = np.frombuffer(bytes(world.memory.content), "<u2")
        assert np.all((got == before) | (got == world.golden))
        world.golden = got.copy()
        world.add(world.random_move())
        await world.until_moved()


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def faults(dut: Any, index: int) -> None:
    """Reads that leave the region and bad responses are reported; a clear makes it usable."""
    world = await _World.start(dut, index, _PAUSE)
    for _ in range(_ROUNDS):
        move = world.random_move() | {"source": 0, "position": 1}
        bad = move["first"] if world.rng.random() < 0.5 else move["second"]
        refused = world.rng.random() < 0.5
        if refused:
            name = "first" if bad == move["first"] else "second"
            bad = move[name] = _BASE + _SIZE
        else:
            world.memory.bad = {bad}
        golden = world.golden.copy()
        world.add(move) if not refused else world.command.queue.append(
            entry_command_layout(world.config).const(move).as_bits()
        )
        await world.until("an error", lambda: bool(world.ports.get("error")))
        error = Fault.REFUSED if refused else Fault.SLAVE
        world.ports.check(world.cycle, error=error.value, error_address=bad)
        await world.clear()
        world.memory.bad = set()
        got = np.frombuffer(bytes(world.memory.content), "<u2")
        assert refused or np.all((got == golden) | (got == world.golden))
        world.golden = got.copy()
        world.add(world.random_move())
        await world.until_moved()
