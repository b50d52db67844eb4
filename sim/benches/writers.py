# SPDX-License-Identifier: Apache-2.0
"""Testbench of all that writes: results, rankings and a further source, to a model of memory.

The memory is cocotbext-axi's, which was written independently. All units are connected as in the
accelerator's datapath. Afterwards the memory must be what Python has computed, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cocotb
import numpy as np
from amaranth.hdl import Elaboratable, Module, Mux, ResetInserter, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.array.gemm_engine import result_layout
from speq.hw.common.ram import RAM_VERILOG
from speq.hw.control.ranker import Ranker, rank_start_layout
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig, Fault
from speq.hw.memory.memory_writer import MemoryWriter, write_layout
from speq.hw.memory.ranking_writer import RankingWriter, ranking_command_layout
from speq.hw.memory.result_writer import ResultWriter, result_command_layout
from speq.hw.memory.write_mux import WriteMux
from speq.hw.verilog import convert_unit
from speq.sim.benches.world import SideBySide
from speq.sim.benches.writer_world import MEMORY_BASE, MEMORY_SIZE, WriterWorld
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed, simulate

_TOP = "writers_tb"
_RESULTS, _RANKING, _OTHER = range(3)
_PAUSE = 0.4
_ROUNDS = 8
_LEAST = 0xFF80_0000


def _system(rows: int, cols: int, choices: int, axi: AxiConfig) -> AcceleratorConfig:
    weights = AxiConfig(data_bits=64, address_bits=axi.address_bits)
    engine = EngineConfig(rows=rows, cols=cols)
    return AcceleratorConfig(engine, weights=weights, data=axi, choices=choices)


#: Those under test: beats narrower than a row's ranking, as wide, and wider.
_CONFIGS = (
    _system(3, 4, 8, AxiConfig(data_bits=64, address_bits=32)),
    _system(4, 16, 4, AxiConfig(data_bits=256, address_bits=40, burst=4, outstanding=2, depth=8)),
    _system(5, 32, 4, AxiConfig(data_bits=512, address_bits=32)),
)


class _Writers(wiring.Component):
    """The units between the array's results and memory."""

    def __init__(self, config: AcceleratorConfig) -> None:
        self.config = config
        address = config.address_bits
        super().__init__(
            {
                "command": In(stream.Signature(result_command_layout(config))),
                "results": In(stream.Signature(result_layout(config.engine))),
                "start": In(stream.Signature(rank_start_layout(config))),
                "rank_command": In(stream.Signature(ranking_command_layout(config))),
                "other_command": In(stream.Signature(config.data.command_layout)),
                "other_data": In(stream.Signature(write_layout(config.data))),
                "axi": Out(config.data.write_signature),
                "done": Out(1),
                "ranker_busy": Out(1),
                "written": Out(3),
                "busy": Out(1),
                "error": Out(Fault),
                "base": In(address),
                "limit": In(address),
                "clear": In(1),
            }
        )

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        config = self.config
        units = {
            "results": (results := ResultWriter(config)),
            "mux": (mux := WriteMux(config.data, 3)),
            "ranker": (ranker := Ranker(config)),
            "ranking": (ranking := RankingWriter(config)),
        }
        for name, unit in units.items():
            m.submodules[name] = ResetInserter(self.clear)(unit)
        m.submodules.writer = writer = MemoryWriter(config.data)
        outside = wiring.flipped
        wiring.connect(m, outside(self.command), results.command)
        wiring.connect(m, outside(self.results), results.results)
        wiring.connect(m, outside(self.start), ranker.start)
        wiring.connect(m, outside(self.rank_command), ranking.command)
        wiring.connect(m, results.ranked, ranker.results)
        wiring.connect(m, results.write_command, mux.sources[_RESULTS].command)
        wiring.connect(m, results.write_data, mux.sources[_RESULTS].data)
        wiring.connect(m, ranking.write_command, mux.sources[_RANKING].command)
        wiring.connect(m, ranking.write_data, mux.sources[_RANKING].data)
        wiring.connect(m, outside(self.other_command), mux.sources[_OTHER].command)
        wiring.connect(m, outside(self.other_data), mux.sources[_OTHER].data)
        wiring.connect(m, mux.command, writer.command)
        wiring.connect(m, mux.data, writer.data)
        wiring.connect(m, writer.axi, outside(self.axi))
        # While no ranking is read its rows change, which must not matter.
        noise = Signal(config.engine.row_bits)
        m.d.sync += noise.eq(noise + 1)
        m.d.comb += [
            ranker.row.eq(Mux(ranking.busy, ranking.row, noise)),
            ranking.entries.eq(ranker.entries),
            mux.done_in.eq(writer.done),
            self.done.eq(results.done),
            self.ranker_busy.eq(ranker.busy),
            self.busy.eq(writer.busy),
            self.error.eq(writer.error),
            writer.base.eq(self.base),
            writer.limit.eq(self.limit),
            writer.clear.eq(self.clear),
        ]
        for i, source in enumerate(mux.sources):
            m.d.comb += self.written[i].eq(source.done)
        return m


def run() -> None:
    """Check the writers with several configurations."""
    units = {f"u{i}": _Writers(config) for i, config in enumerate(_CONFIGS)}
    simulate(convert_unit(SideBySide(units), _TOP) + RAM_VERILOG, _TOP, __name__)


class _World(WriterWorld):
    """The units of one configuration, their memory, and what should be in it."""

    def __init__(self, dut: Any, index: int, pause: float) -> None:
        config = _CONFIGS[index]
        layouts = {
            "command": result_command_layout(config),
            "results": result_layout(config.engine),
            "start": rank_start_layout(config),
            "rank_command": ranking_command_layout(config),
            "other_command": config.data.command_layout,
            "other_data": write_layout(config.data),
        }
        super().__init__(dut, index, "writers", config, layouts, pause)
        self.done = 0
        self.written = [0, 0, 0]
        self.golden = bytearray(self.memory.content)

    def connect(self) -> list[Callable[[int], None]]:
        return [*super().connect(), self._count]

    def _count(self, cycle: int) -> None:
        self.done += self.ports.get("done")
        written = self.ports.get("written")
        for i in range(len(self.written)):
            self.written[i] += written >> i & 1

    def is_idle(self) -> bool:
        """Whether nothing is being written."""
        return not self.ports.get("busy")

    async def until_written(self, done: int, written: list[int]) -> None:
        """Wait until so many result commands and write commands have ended, and no more."""
        expected = done, written
        await self.until(
            lambda: f"(done, written) {expected}, but {(self.done, self.written)}",
            lambda: (self.done, self.written) == expected and self.is_idle(),
        )
        await self.step(20)
        assert (self.done, self.written) == expected
        self.ports.check(self.cycle, error=Fault.NONE.value)

    def place(self, size: int, lane: int) -> int:
        """Random place in the memory for `size` bytes; the lanes 0 to 3 are disjoint."""
        step = self.config.alignment
        return (
            lane * (MEMORY_SIZE // 4)
            + int(self.rng.integers((MEMORY_SIZE // 4 - size) // step + 1)) * step
        )

    def contents(self) -> np.ndarray:
        """The memory's bytes, uint8 [bytes]."""
        return np.frombuffer(bytes(self.memory.content), np.uint8)

    def check_memory(self) -> None:
        """Compare the memory with what it should hold."""
        assert_equal_bits(
            f"writers: seed {seed()}: memory (by byte)",
            expected=np.frombuffer(bytes(self.golden), np.uint8),
            got=self.contents(),
        )

    def add_gemm(self, lane: int, *, rank: bool) -> tuple[int, np.ndarray]:
        """Queue a random GEMM; the number of its write commands, and its results [T, O]."""
        rng, engine = self.rng, self.config.engine
        tiles, tokens = int(rng.integers(1, 8)), int(rng.integers(1, engine.rows + 1))
        outputs = tiles * engine.cols - int(rng.integers(engine.cols))
        half = not rank and bool(rng.integers(2))
        discard = bool(rng.random() < 0.3)
        bits, kind = (16, "<u2") if half else (32, "<u4")
        results = rng.integers(1 << bits, size=(tokens, tiles * engine.cols), dtype=np.uint32)
        if rank:
            # Few different ones, infinities and NaN among them, so that many tie.
            some = rng.integers(1 << 32, size=6, dtype=np.uint32)
            some = np.append(some, np.array([0x7F800000, 0x7FC00000, _LEAST], np.uint32))
            results = rng.choice(some, size=results.shape)
            every_column = (1 << engine.cols) - 1
            self.add("start", tokens=tokens, tile=0, columns=every_column, keep=0)
        columns = np.arange(tiles * engine.cols).reshape(tiles, engine.cols)
        for tile in range(tiles):
            for row in range(tokens):
                self.add(
                    "results",
                    data=[int(value) for value in results[row, columns[tile]]],
                    strobe=int(sum(int(i < outputs) << n for n, i in enumerate(columns[tile]))),
                    row=row,
                    last=tile + 1 == tiles and row + 1 == tokens,
                )
        kept = np.where(np.arange(tiles * engine.cols) < outputs, results, 0)
        by_tile = kept.reshape(tokens, tiles, engine.cols).transpose(1, 0, 2)
        content = by_tile.astype(kind).tobytes()
        place = self.place(len(content), lane)
        self.add(
            "command",
            tiles=tiles,
            tokens=tokens,
            half=half,
            discard=discard,
            rank=rank,
            address=MEMORY_BASE + place,
        )
        if not discard:
            self.golden[place : place + len(content)] = content
        return 0 if discard else tiles, results[:, :outputs]

    def add_other(self, lane: int) -> None:
        """Queue a random transfer of the further source."""
        rng, size = self.rng, self.config.data.beat_bytes
        beats = int(rng.integers(1, 20))
        place = self.place(beats * size, lane)
        self.add("other_command", address=MEMORY_BASE + place, beats=beats)
        for _ in range(beats):
            content, marks = rng.bytes(size), rng.integers(2, size=size)
            self.add(
                "other_data",
                data=int.from_bytes(content, "little"),
                strobe=int(sum(int(mark) << i for i, mark in enumerate(marks))),
            )
            for i in np.flatnonzero(marks):
                self.golden[place + i] = content[i]
            place += size

    def add_ranking(self, lane: int, results: np.ndarray) -> None:
        """Queue the transfer of the ranking of FP32 results [T, O]."""
        content = _ranking(results, self.config.choices).astype("<u4").tobytes()
        place = self.place(len(content), lane)
        self.add("rank_command", address=MEMORY_BASE + place, tokens=len(results))
        self.golden[place : place + len(content)] = content


def _ranking(results: np.ndarray, choices: int) -> np.ndarray:
    """Index and bits of the largest of FP32 results [T, O] as they are written: [T, choices, 2]."""
    values = results.view(np.float32).astype(np.float64)
    values = np.where(np.isnan(values), -np.inf, values)
    order = np.argsort(-values, axis=1, kind="stable")[:, :choices]
    ranking = np.empty((len(results), choices, 2), np.uint32)
    ranking[:] = 0xFFFFFFFF, _LEAST
    ranking[:, : order.shape[1], 0] = order
    ranking[:, : order.shape[1], 1] = np.take_along_axis(results, order, axis=1)
    return ranking


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)), pause=(0.0, _PAUSE))
async def writes(dut: Any, index: int, pause: float) -> None:
    """Random GEMMs, one in each round ranked, next to other writes, and then the ranking."""
    world = await _World.start(dut, index, pause)
    done, written = 0, [0, 0, 0]
    for _ in range(_ROUNDS):
        number = int(world.rng.integers(1, 5))
        # Writes that may overtake each other are to different places.
        gemms = [world.add_gemm(i % 2, rank=i + 1 == number) for i in range(number)]
        written[_RESULTS] += sum(tiles for tiles, _ in gemms)
        others = int(world.rng.integers(0, 6))
        for _ in range(others):
            world.add_other(2)
        done += number
        written[_OTHER] += others
        await world.until_written(done, written)
        assert not world.ports.get("ranker_busy")
        _, results = gemms[-1]
        world.add_ranking(3, results)
        written[_RANKING] += 1
        await world.until_written(done, written)
        world.check_memory()


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def clear_at_any_time(dut: Any, index: int) -> None:
    """A clear drops everything and leaves nothing behind; nothing else has been written."""
    world = await _World.start(dut, index, _PAUSE)
    for _ in range(2 * _ROUNDS):
        before = bytes(world.golden)
        for i in range(3):
            world.add_gemm(i, rank=i == 2)
        world.add_other(3)
        expected = np.frombuffer(bytes(world.golden), np.uint8)
        await world.step(int(world.rng.integers(1, 300)))
        for source in world.sources.values():
            source.withdraw()
        world.ports["clear"].value = 1
        await world.step()
        world.ports["clear"].value = 0
        await world.step()
        await world.until("cleared", world.is_idle)
        # Every byte is the old one or the new one.
        got = world.contents()
        old = np.frombuffer(before, np.uint8)
        assert_equal_bits(
            f"writers: seed {seed()}: memory after a clear (by byte)",
            expected=np.where(got == expected, expected, old),
            got=got,
        )
        world.golden = bytearray(got.tobytes())
        world.done, world.written = 0, [0, 0, 0]
        tiles, results = world.add_gemm(0, rank=True)
        world.add_other(1)
        await world.until_written(1, [tiles, 0, 1])
        world.add_ranking(2, results)
        await world.until_written(1, [tiles, 1, 1])
        world.check_memory()
