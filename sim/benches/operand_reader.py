# SPDX-License-Identifier: Apache-2.0
"""Testbench of the reader of the vector unit's operands.

It runs against cocotbext-axi's memory model, which was written independently, with random pauses on
all channels; exact timing and bad responses come from a responder. Expected words are cut out of
the random contents of that memory with numpy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cocotb
import numpy as np

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.common.ram import RAM_VERILOG
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig, Fault
from speq.hw.memory.memory_reader import MemoryReader
from speq.hw.vector.operand_reader import OperandReader
from speq.hw.vector.operand_requests import OperandMode, OperandRequests, operand_command_layout
from speq.hw.verilog import convert_unit
from speq.sim.benches.axi import Transfer, expected_bursts
from speq.sim.benches.reader_world import MEMORY_SIZE, ReaderJob, ReaderWorld
from speq.sim.benches.world import SideBySide
from speq.sim.runner import seed, simulate

_TOP = "operand_reader_tb"
#: Words of a row of a tile, beats of a word: 1 and 2; 4 and half of one; 2 and 1, 1 and 8, 2 and 4
#: on narrow ports; a single row.
_CONFIGS = (
    AcceleratorConfig(EngineConfig(rows=4, cols=8), lanes=8),
    AcceleratorConfig(EngineConfig(rows=8, cols=16), lanes=4),
    AcceleratorConfig(EngineConfig(rows=3, cols=8), data=AxiConfig(data_bits=128), lanes=4),
    AcceleratorConfig(
        EngineConfig(rows=4, cols=16),
        data=AxiConfig(data_bits=64, burst=4, depth=32, outstanding=13),
        lanes=16,
    ),
    AcceleratorConfig(
        EngineConfig(rows=1, cols=16, max_k=1000),
        weights=AxiConfig(data_bits=64, address_bits=20),
        data=AxiConfig(data_bits=64, address_bits=20),
        lanes=8,
        query_heads=4,
    ),
)
#: Rows of tables.
_TABLE_ROWS = 40
#: Share of cycles in which a paused channel pauses.
_PAUSE = 0.4
#: Rounds of tests of faults and aborts, each with other jobs.
_ROUNDS = 2
_MIN_RATE = 0.95
_FP32_QUIET_NAN = 0x7FC00000


def run() -> None:
    """Check the reader with several parameters."""
    units = {f"operands_{i}": OperandReader(config) for i, config in enumerate(_CONFIGS)}
    simulate(convert_unit(SideBySide(units), _TOP) + RAM_VERILOG, _TOP, __name__)


@dataclass(frozen=True)
class _Job(ReaderJob):
    """Also the number of words that are read or repeated from each transfer."""

    counts: list[int]


class _World(ReaderWorld):
    """A reader of operands."""

    def __init__(self, dut: Any, index: int, *, independent: bool) -> None:
        config = _CONFIGS[index]
        rng = np.random.default_rng([seed(), index])
        super().__init__(
            dut,
            f"operands_{index}",
            "words",
            config,
            config.data,
            rng,
            independent=independent,
        )
        # Of the rows of every command.
        self.indices = rng.choice(_TABLE_ROWS, config.engine.rows, replace=False)

    @classmethod
    async def start(
        cls, dut: Any, index: int, *, independent: bool = False, pause: float = 0.0
    ) -> _World:
        """After a reset, with cocotbext-axi's memory model or with a responder."""
        world = cls(dut, index, independent=independent)
        await world.begin(pause)
        return world

    def connect(self) -> list[Callable[[int], None]]:
        return [self._give_index, *super().connect()]

    def _give_index(self, cycle: int) -> None:
        """The index of the row that was asked for in the cycle before, as late as may be."""
        row = self.ports.get("index_row")
        self.ports["index"].value = int(self.indices[row]) if row < len(self.indices) else 0

    def job(self, **sizes: Any) -> _Job:
        """A random job, with the sizes given."""
        rng, engine = self.rng, self.config.engine
        rows = sizes.get("rows", int(rng.integers(1, engine.rows + 1)))
        given = {
            "mode": OperandMode(int(rng.integers(0, 3))),
            "half": bool(rng.integers(0, 2)),
            "twice": bool(rng.integers(0, 2)),
            "segments": int(rng.integers(1, 4)),
            "tiles": int(rng.integers(1, 6)),
            "rows": rows,
            "last_rows": int(rng.integers(1, rows + 1)),
        } | sizes
        return self._job(**given)

    def _job(
        self,
        *,
        mode: OperandMode,
        half: bool,
        twice: bool,
        segments: int,
        tiles: int,
        rows: int,
        last_rows: int,
    ) -> _Job:
        chunk = self.config.engine.cols * (2 if half else 4)
        beat = self.port_config.beat_bytes
        heights = [rows] * (segments - 1) + [last_rows]
        gap = int(self.rng.integers(0, 3)) * beat
        row_stride = tiles * chunk + gap if mode is OperandMode.ROWS else 0
        # Chunks of a tile in memory.
        stored = {
            OperandMode.TILES: heights,
            OperandMode.CHANNELS: [1] * segments,
            OperandMode.ROWS: [0] * segments,
        }[mode]
        size = tiles * sum(stored) * chunk + (int(self.indices.max()) + 1) * row_stride
        address = self.place(size)
        places: list[int] = []  # addresses of all chunks, in the order of the words
        transfers: list[Transfer] = []
        start = address  # of the segment
        for height, in_tile in zip(heights, stored, strict=True):
            for _ in range(1 + twice):
                for tile, row in itertools.product(range(tiles), range(height)):
                    if mode is OperandMode.ROWS:
                        place = address + int(self.indices[row]) * row_stride + tile * chunk
                        transfers.append((place, chunk // beat))
                    else:
                        place = start + (tile * in_tile + row % in_tile) * chunk
                    places.append(place)
                if mode is not OperandMode.ROWS:
                    transfers.append((start, tiles * in_tile * chunk // beat))
            start += tiles * in_tile * chunk
        per_chunk = self.config.engine.cols // self.config.lanes
        counts = [
            per_chunk * (1 if mode is OperandMode.ROWS else tiles * height)
            for height in heights
            for _ in range((1 + twice) * (tiles * height if mode is OperandMode.ROWS else 1))
        ]
        layout = operand_command_layout(self.config)
        extent = {"segments": segments, "tiles": tiles, "rows": rows, "last_rows": last_rows}
        fields = {
            "mode": mode,
            "half": half,
            "twice": twice,
            "address": address,
            "row_stride": row_stride,
            "extent": extent,
        }
        words = [word for place in places for word in self._words(place, chunk, half)]
        return _Job(layout.const(fields).as_bits(), words, {"operand": transfers}, counts)

    def _words(self, address: int, size: int, half: bool) -> list[int]:
        """The words of a chunk in memory."""
        content = self.memory.load(address, size)
        if half:
            numbers = np.frombuffer(content, np.float16)
            with np.errstate(invalid="ignore"):
                bits = numbers.astype(np.float32).view(np.uint32)
            content = np.where(np.isnan(numbers), np.uint32(_FP32_QUIET_NAN), bits).tobytes()
        step = self.config.lanes * 4
        return [
            int.from_bytes(content[i : i + step], "little") for i in range(0, len(content), step)
        ]

    async def words_taken(self, number: int) -> None:
        """Wait until so many words have been taken in all."""
        await self.until(f"{number} words", lambda: len(self.words.items) >= number)

    def jobs(self, number: int) -> list[_Job]:
        """Random jobs."""
        return [self.job() for _ in range(number)]


def _each(test: Callable) -> object:
    """The test for each configuration."""
    return cocotb.test()(cocotb.parametrize(index=range(len(_CONFIGS)))(test))


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)), pause=(0.0, _PAUSE))
async def random_jobs(dut: Any, index: int, pause: float) -> None:
    """The right words with and without pauses, from an independent memory model."""
    world = await _World.start(dut, index, independent=True, pause=pause)
    await world.do(world.jobs(12))


@_each
async def all_modes(dut: Any, index: int) -> None:
    """Each mode with each kind of number, in one sweep and in two, and the largest shapes."""
    world = await _World.start(dut, index)
    rows = world.config.engine.rows
    jobs = [
        world.job(mode=mode, half=half, twice=twice, segments=2, tiles=3)
        for mode in OperandMode
        for half in (False, True)
        for twice in (False, True)
    ]
    jobs += [world.job(mode=mode, rows=rows, last_rows=rows, segments=1) for mode in OperandMode]
    await world.do(jobs)


@_each
async def transfers_and_latency(dut: Any, index: int) -> None:
    """Each sweep through a segment is one transfer, in mode ROWS each chunk; the first request is
    on the bus as soon as promised."""
    world = await _World.start(dut, index)
    valid, address, length = (world.ports[f"axi__ar{name}"] for name in ("valid", "addr", "len"))
    bursts: list[tuple[int, int, int]] = []

    def watch(cycle: int) -> None:
        if int(valid.value):
            bursts.append((cycle, int(address.value), int(length.value) + 1))

    world.agents.append(watch)
    for mode, segments in itertools.product(OperandMode, (1, 2)):
        bursts.clear()
        job = world.job(mode=mode, segments=segments)
        await world.do([job])
        taken = world.command.taken[-1]
        extent = operand_command_layout(world.config).from_bits(job.command).extent
        factors = {
            OperandMode.TILES: [extent.rows, extent.last_rows],
            OperandMode.CHANNELS: [1, 1],
            OperandMode.ROWS: [int(i) for i in world.indices[: extent.rows]],
        }[mode]
        if mode is not OperandMode.ROWS:
            factors = factors[-segments:]
        products = sum(OperandRequests.PRODUCT_LATENCY + factor.bit_length() for factor in factors)
        latency = OperandRequests.LATENCY + products + MemoryReader.LATENCY
        assert bursts[0][0] - taken == latency, f"{world.name}: {mode}: {bursts[0][0] - taken}"
        expected = expected_bursts(world.port_config, job.transfers["operand"])
        assert [burst[1:] for burst in bursts] == expected, f"{world.name}: {mode}"


@_each
async def clear_at_any_time(dut: Any, index: int) -> None:
    """A clear drops everything, and the reader can be used again."""
    world = await _World.start(dut, index, independent=True, pause=_PAUSE)
    for _ in range(2 * _ROUNDS):
        world.command.queue.extend(job.command for job in world.jobs(5))
        world.words.pause = float(world.rng.choice([_PAUSE, 0.95]))
        await world.step(int(world.rng.integers(5, 250)))
        await world.clear(int(world.rng.integers(1, 4)))
        world.words.pause = _PAUSE
        await world.do(world.jobs(2))


@_each
async def bad_responses(dut: Any, index: int) -> None:
    """A bad response is reported with its burst's address; only words before it are given."""
    world = await _World.start(dut, index)
    for response in (Fault.SLAVE, Fault.DECODE) * _ROUNDS:
        world.responder.responses.clear()
        job = world.job()
        transfers = job.transfers["operand"]
        # Of those that read the same, the first.
        number = transfers.index(transfers[int(world.rng.integers(0, len(transfers)))])
        address = world.spoil(transfers[number], response.value)
        first = len(world.words.items)
        world.command.queue.append(job.command)
        await world.until("an error", world.has_error)
        before = sum(job.counts[:number])
        await world.step(200 + before)
        world.check_error(response, address)
        received = len(world.words.items) - first
        assert before <= received < before + job.counts[number]
        world.words.check(job.words[:received], first)
        world.responder.responses.clear()
        await world.clear()
        await world.do(world.jobs(2))


@_each
async def commands_outside_the_region(dut: Any, index: int) -> None:
    """A transfer that would leave the region is refused, with its address; those before it are
    finished."""
    world = await _World.start(dut, index)
    for mode in (OperandMode.TILES, OperandMode.CHANNELS, OperandMode.ROWS) * 2:
        job = world.job(mode=mode, segments=3, twice=False)
        transfers = job.transfers["operand"]
        refused = max(range(len(transfers)), key=lambda i: transfers[i][0])
        address, beats = transfers[refused]
        # The last beat of the transfer is the first one outside.
        world.set_limit(address + (beats - 1) * world.port_config.beat_bytes - 1)
        first = len(world.words.items)
        world.command.queue.append(job.command)
        await world.until("an error", world.has_error)
        words = job.words[: sum(job.counts[:refused])]
        await world.words_taken(first + len(words))
        await world.step(100)
        world.check_error(Fault.REFUSED, address)
        assert world.ports.get("busy"), f"{world.name}: not busy before the clear"
        world.words.check(words, first)
        world.set_limit(world.memory.base + MEMORY_SIZE - 1)
        await world.clear()
        await world.do(world.jobs(2))


@_each
async def rate(dut: Any, index: int) -> None:
    """A word in each cycle, or as many as come from memory."""
    world = await _World.start(dut, index)
    config = world.config
    rows = config.engine.rows
    for mode in (OperandMode.TILES, OperandMode.CHANNELS):
        for half in (False, True):
            tiles = 40
            job = world.job(
                mode=mode,
                half=half,
                twice=False,
                segments=1,
                tiles=tiles,
                rows=rows,
                last_rows=rows,
            )
            repeats = rows if mode is OperandMode.CHANNELS else 1
            # FP16 numbers come as fast as FP32 numbers where words are wider than beats.
            cycles = max(1.0, config.lanes * 32 / world.port_config.data_bits)  # of a fresh word
            possible = repeats / (cycles + repeats - 1)
            got = await world.rate([job])
            dut._log.info(f"rate of {world.name}, {mode}, {half}: {got:.4f} of {possible:.4f}")
            assert got >= _MIN_RATE * possible
