# SPDX-License-Identifier: Apache-2.0
"""Testbench of the writer of the vector unit's results, with the quantiser of draft activations,
mux and writer, to a model of memory.

The memory is cocotbext-axi's, which was written independently. Afterwards it must be what a few
lines of NumPy have made of the text of `speq.hw.control.descriptor.Target`, byte for byte.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cocotb
import numpy as np
import torch
from amaranth.hdl import Elaboratable, Module, ResetInserter
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from speq.host.layout import draft_activation_words
from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.common.ram import RAM_VERILOG
from speq.hw.control.descriptor import Target
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig, Fault
from speq.hw.memory.memory_writer import MemoryWriter, write_layout
from speq.hw.memory.write_mux import WriteMux
from speq.hw.vector.activation_quantizer import ActivationQuantizer, quantizer_command_layout
from speq.hw.vector.command import result_word_layout
from speq.hw.vector.run_planner import writer_command_layout
from speq.hw.vector.vector_writer import VectorWriter
from speq.hw.verilog import convert_unit
from speq.model.arith import quantize_activations
from speq.sim.benches.world import SideBySide
from speq.sim.benches.writer_world import MEMORY_BASE, MEMORY_SIZE, WriterWorld
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed, simulate

_TOP = "vector_writer_tb"
#: Bytes of the memory that are the other source's.
_OTHER = 1 << 12
_PAUSE = 0.4
_COMMANDS = 2  # of each target
_CLEARS = 6
_MAX_SEGMENTS = 4


def _system(
    rows: int, cols: int, lanes: int, data: AxiConfig, draft_rows: int = 1
) -> AcceleratorConfig:
    engine = EngineConfig(rows=rows, cols=cols, draft_rows=draft_rows, max_k=6 * cols)
    weights = AxiConfig(data_bits=64, address_bits=data.address_bits)
    return AcceleratorConfig(engine, weights, data, lanes=lanes)


#: Those under test. A line of rows is as wide as a beat, narrower, wider, has bytes behind it that
#: nothing is for; there are more lines in a beat than lanes; lanes are
#: all columns or few of them; the data port is as wide as the array or narrower.
_CONFIGS = (
    _system(3, 4, 4, AxiConfig(data_bits=64, address_bits=32)),
    _system(5, 8, 4, AxiConfig(data_bits=128, address_bits=40, burst=4, outstanding=2, depth=8)),
    _system(8, 16, 8, AxiConfig(data_bits=64, address_bits=32, burst=1, depth=4)),
    _system(4, 32, 8, AxiConfig(data_bits=512, address_bits=32)),
    _system(2, 32, 4, AxiConfig(data_bits=256, address_bits=32)),
    _system(6, 16, 16, AxiConfig(data_bits=128, address_bits=32), draft_rows=4),
    _system(1, 8, 4, AxiConfig(data_bits=128, address_bits=32)),
)


class _Writers(wiring.Component):
    """The unit, beside another source, and what its writes go through."""

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        address = config.address_bits
        super().__init__(
            {
                "command": In(stream.Signature(writer_command_layout(config))),
                "words": In(stream.Signature(result_word_layout(config))),
                "drafts": In(stream.Signature(quantizer_command_layout(config))),
                "other_command": In(stream.Signature(config.data.command_layout)),
                "other_data": In(stream.Signature(write_layout(config.data))),
                "axi": Out(config.data.write_signature),
                "busy": Out(1),
                "writer_busy": Out(1),
                "error": Out(Fault),
                "base": In(address),
                "limit": In(address),
                "clear": In(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config = self.config
        m.submodules.unit = unit = VectorWriter(config)
        m.submodules.quantizer = quantizer = ActivationQuantizer(config)
        mux = WriteMux(config.data, 2)
        m.submodules.mux = ResetInserter(self.clear)(mux)
        m.submodules.writer = writer = MemoryWriter(config.data)
        outside = wiring.flipped
        wiring.connect(m, outside(self.command), unit.command)
        wiring.connect(m, outside(self.words), unit.words)
        wiring.connect(m, outside(self.drafts), quantizer.command)
        wiring.connect(m, unit.drafts, quantizer.results)
        wiring.connect(m, quantizer.pieces, unit.pieces)
        wiring.connect(m, unit.writes, mux.sources[0])
        wiring.connect(m, outside(self.other_command), mux.sources[1].command)
        wiring.connect(m, outside(self.other_data), mux.sources[1].data)
        wiring.connect(m, mux.command, writer.command)
        wiring.connect(m, mux.data, writer.data)
        wiring.connect(m, writer.axi, outside(self.axi))
        m.d.comb += [
            mux.done_in.eq(writer.done),
            self.busy.eq(unit.busy | quantizer.busy),
            self.writer_busy.eq(writer.busy),
            self.error.eq(writer.error),
            writer.base.eq(self.base),
            writer.limit.eq(self.limit),
            writer.clear.eq(self.clear),
            unit.clear.eq(self.clear),
            quantizer.clear.eq(self.clear),
        ]
        return m


def run() -> None:
    """Check the writer with several configurations."""
    units = {f"u{i}": _Writers(config) for i, config in enumerate(_CONFIGS)}
    simulate(convert_unit(SideBySide(units), _TOP) + RAM_VERILOG, _TOP, __name__)


class Command(NamedTuple):
    """A command of the writer, with distances in bytes from the memory's first byte.

    `sizes` are the rows of each segment.
    """

    target: Target
    k: int
    sizes: tuple[int, ...]
    rows: int
    position: int
    sharing: int
    results: int
    outer: int
    inner: int


def element_addresses(config: AcceleratorConfig, command: Command) -> np.ndarray:
    """Where elements go, by the text of `Target`: int64 [segments][most rows][k]. Segments that
    have fewer rows are filled up with -1."""
    cols, rows, size = config.engine.cols, config.engine.rows, config.activation_bytes
    target, k, sizes, tokens, position, sharing, results, outer, inner = command
    addresses = np.full((len(sizes), max(sizes), k), -1)
    e = np.arange(k)
    i, c = e // cols, e % cols
    for s, row_count in enumerate(sizes):
        for t in range(row_count):
            p = position + t
            match target:
                case Target.TILES:
                    # Rows of all tiles and segments before, and in this tile.
                    before = (s * -(-k // cols) + i) * row_count + t
                    place = 4 * (before * cols + c)
                case Target.ACTIVATIONS | Target.DRAFT_ACTIVATIONS:
                    place = e * size + 2 * t  # of drafts before they are quantised
                case Target.QUERIES:
                    n = s % sharing * tokens + t
                    place = s // sharing * outer + n // rows * inner + e * size + 2 * (n % rows)
                case Target.KEYS:
                    place = s * outer + p // cols * inner + 2 * cols * e + 2 * (p % cols)
                case Target.VALUES:
                    place = s * outer + i * inner + 2 * cols * p + 2 * c
                case Target.WEIGHTS:
                    place = s * inner + e * size + 2 * t
                case Target.CONTEXT:
                    n = s * rows + t
                    place = n // tokens * outer + e * size + 2 * (n % tokens)
            addresses[s, t] = results + place
    return addresses


def random_command(
    config: AcceleratorConfig, target: Target, rng: np.random.Generator, size: int
) -> Command:
    """A command that writes within so many bytes."""
    engine, a, beat = config.engine, config.activation_bytes, config.data.beat_bytes
    cols, most = engine.cols, engine.rows
    while True:
        rows = int(rng.choice((1, most, int(rng.integers(1, most + 1)))))
        k = int(rng.choice((cols, 2 * cols, int(rng.integers(1, 3 * cols)))))
        position = int(rng.integers(engine.max_k - most))
        position = int(rng.choice((position, position // cols * cols)))
        sharing = int(rng.choice((1, 2, 3, 4)))
        heads = int(rng.integers(1, _MAX_SEGMENTS + 1))
        sizes: tuple[int, ...] = (rows,) * heads
        slack = a * int(rng.integers(4))
        whole = -(-k // cols) * cols
        outer, inner = whole * a + slack, whole * a + a * int(rng.integers(4))
        match target:
            case Target.ACTIVATIONS:
                sizes = (rows,)
            case Target.DRAFT_ACTIVATIONS:
                sizes = (min(rows, engine.draft_rows),)
            case Target.QUERIES:
                outer = -(-sharing * rows // most) * inner + slack
            case Target.KEYS:
                outer = whole * 2 * cols + slack
                inner = len(sizes) * outer + a * int(rng.integers(4))
            case Target.VALUES:
                k = whole
                inner = 2 * cols * engine.max_k + beat * int(rng.integers(4))
                outer = whole // cols * inner + beat * int(rng.integers(4))
            case Target.TILES:
                k = whole
            case Target.WEIGHTS | Target.CONTEXT:
                n = rows * sharing
                sizes = tuple(min(most, n - start) for start in range(0, n, most))
                if target is Target.CONTEXT:
                    # Only of the places that belong to a head.
                    outer = k * a + slack
        command = Command(target, k, sizes, rows, position, sharing, 0, outer, inner)
        end = int(element_addresses(config, command).max()) + 4
        if target is Target.KEYS:
            end = -(-end // (2 * cols)) * 2 * cols
        if end < size:
            results = int(rng.integers((size - end) // beat + 1)) * beat
            return command._replace(results=results)


class Results(NamedTuple):
    """Random results of a command, [segment][row][element], whole tiles, and as the unit takes them
    word by word."""

    singles: np.ndarray
    halves: np.ndarray
    words: list[dict[str, list[int]]]


def random_results(
    config: AcceleratorConfig, command: Command, rng: np.random.Generator
) -> Results:
    """Results whose FP32 and FP16 numbers have nothing to do with each other."""
    cols, lanes = config.engine.cols, config.lanes
    tiles = -(-command.k // cols)
    shape = (len(command.sizes), max(command.sizes), tiles * cols)
    singles = rng.integers(1 << 32, size=shape, dtype=np.uint32)
    halves = rng.integers(1 << 16, size=shape, dtype=np.uint16)
    words = []
    for segment, rows in enumerate(command.sizes):
        for tile in range(tiles):
            for row in range(rows):
                for first in range(tile * cols, (tile + 1) * cols, lanes):
                    place = segment, row, slice(first, first + lanes)
                    fp32, fp16 = singles[place].tolist(), halves[place].tolist()
                    words.append({"fp32": fp32, "fp16": fp16})
    return Results(singles, halves, words)


def command_fields(config: AcceleratorConfig, command: Command, base: int) -> dict[str, Any]:
    """The fields of the unit's command."""
    sweep = {
        "segments": len(command.sizes),
        "tiles": -(-command.k // config.engine.cols),
        "rows": command.sizes[0],
        "last_rows": command.sizes[-1],
    }
    same = ("target", "k", "outer", "inner", "rows", "position", "sharing")
    fields = {name: getattr(command, name) for name in same}
    return fields | {"sweep": sweep, "results": base + command.results}


def store(
    memory: np.ndarray, config: AcceleratorConfig, command: Command, results: Results
) -> None:
    """Write results into a memory, uint8 [bytes]."""
    if command.target is Target.DRAFT_ACTIVATIONS:
        rows = torch.from_numpy(results.halves[0, :, : command.k].view(np.float16))
        blocks = quantize_activations(rows, config.engine.format.group)
        content = draft_activation_words(blocks, config).ravel()
        memory[command.results :][: len(content)] = content
        return
    addresses = element_addresses(config, command)
    numbers = results.singles if command.target is Target.TILES else results.halves
    chosen = addresses >= 0
    first, values = addresses[chosen], numbers[..., : command.k][chosen]
    for i in range(numbers.itemsize):
        memory[first + i] = values >> 8 * i & 0xFF


class _World(WriterWorld):
    """The units of one configuration, their memory, and what should be in it."""

    def __init__(self, dut: Any, index: int, pause: float) -> None:
        config = _CONFIGS[index]
        layouts = {
            "command": writer_command_layout(config),
            "words": result_word_layout(config),
            "drafts": quantizer_command_layout(config),
            "other_command": config.data.command_layout,
            "other_data": write_layout(config.data),
        }
        super().__init__(dut, index, "vector writer", config, layouts, pause)
        self.golden = np.frombuffer(bytearray(self.memory.content), np.uint8)

    def random_target(self) -> Target:
        """Any of them."""
        return Target(int(self.rng.integers(len(Target))))

    def add_command(self, target: Target) -> Command:
        """Queue a random command and its results."""
        command = random_command(self.config, target, self.rng, MEMORY_SIZE - _OTHER)
        results = random_results(self.config, command, self.rng)
        fields = command_fields(self.config, command, MEMORY_BASE)
        self.add("command", **fields)
        if command.target is Target.DRAFT_ACTIVATIONS:
            shape = {"k": command.k, "rows": command.sizes[0], "results": fields["results"]}
            self.add("drafts", **shape, from_results=1)
        for word in results.words:
            self.add("words", **word)
        store(self.golden, self.config, command, results)
        return command

    def add_other(self) -> None:
        """Queue a random transfer of the other source."""
        rng, size = self.rng, self.config.data.beat_bytes
        beats = int(rng.integers(1, 8))
        place = MEMORY_SIZE - _OTHER + int(rng.integers(_OTHER // size - beats)) * size
        self.add("other_command", address=MEMORY_BASE + place, beats=beats)
        for i in range(beats):
            content = rng.bytes(size)
            self.add("other_data", data=int.from_bytes(content, "little"), strobe=(1 << size) - 1)
            start = place + i * size
            self.golden[start : start + size] = np.frombuffer(content, np.uint8)

    def is_idle(self) -> bool:
        """Whether everything has been taken and written."""
        taken = all(source.is_done(self.cycle) for source in self.sources.values())
        return taken and not self.ports.get("busy") and not self.ports.get("writer_busy")

    async def until_written(self, what: str) -> None:
        """Wait until everything has been written, and compare the memory."""
        await self.until(what, self.is_idle)
        self.ports.check(self.cycle, error=Fault.NONE.value)
        assert_equal_bits(
            f"{self.name}: seed {seed()}: memory after {what} (by byte)",
            expected=self.golden,
            got=self.contents(),
        )

    def contents(self) -> np.ndarray:
        """The memory's bytes, uint8 [bytes]."""
        return np.frombuffer(bytes(self.memory.content), np.uint8)


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)), pause=(0.0, _PAUSE))
async def writes(dut: Any, index: int, pause: float) -> None:
    """Random commands of all targets, next to writes of another source."""
    world = await _World.start(dut, index, pause)
    for _ in range(_COMMANDS):
        for number in world.rng.permutation(len(Target)):
            command = world.add_command(Target(int(number)))
            for _ in range(int(world.rng.integers(3))):
                world.add_other()
            await world.until_written(str(command))


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def clear_at_any_time(dut: Any, index: int) -> None:
    """A clear drops everything and leaves nothing behind; nothing else has been written."""
    world = await _World.start(dut, index, _PAUSE)
    for _ in range(_CLEARS):
        before = world.golden.copy()
        world.add_command(world.random_target())
        world.add_other()
        await world.step(int(world.rng.integers(1, 300)))
        for source in world.sources.values():
            source.withdraw()
        world.ports["clear"].value = 1
        await world.step()
        world.ports["clear"].value = 0
        await world.step()
        await world.until("cleared", lambda: not world.ports.get("writer_busy"))
        assert not world.ports.get("busy")
        # Every byte is the old one or the new one.
        got = world.contents()
        assert_equal_bits(
            f"{world.name}: seed {seed()}: memory after a clear (by byte)",
            expected=np.where(got == world.golden, world.golden, before),
            got=got,
        )
        world.golden = got.copy()
        await world.until_written(str(world.add_command(world.random_target())))
