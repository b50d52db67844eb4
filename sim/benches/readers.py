# SPDX-License-Identifier: Apache-2.0
"""Testbench of the readers of weights, group bytes and activations.

The readers run against cocotbext-axi's memory model, which was written independently, with random
pauses on all channels; exact timing and bad responses come from a responder. Expected words are cut
out of the random contents of that memory with numpy, and both planes of an encoded tensor are
joined by the number format's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import cocotb
import numpy as np
from amaranth.lib import data

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.common.ram import RAM_VERILOG
from speq.hw.engine_config import DRAFT_LANES, EngineConfig, Mode
from speq.hw.memory.activation_reader import ActivationReader, activation_command_layout
from speq.hw.memory.axi import AxiConfig, Fault
from speq.hw.memory.group_reader import GroupReader, group_command_layout
from speq.hw.memory.weight_reader import (
    RESIDUAL_WORDS,
    WeightReader,
    chunk_words,
    weight_command_layout,
)
from speq.hw.verilog import convert_unit
from speq.model.format import EncodedTensor
from speq.model.number_format import FormatConfig
from speq.sim.benches.axi import Transfer
from speq.sim.benches.reader_world import MEMORY_SIZE, ReaderJob, ReaderWorld
from speq.sim.benches.world import SideBySide
from speq.sim.runner import seed, simulate

_TOP = "readers_tb"
#: Words as wide as beats, wider, and narrower; ports as wide as the array and narrower.
_CONFIGS = (
    AcceleratorConfig(EngineConfig(rows=4, cols=8)),
    AcceleratorConfig(
        EngineConfig(rows=2, cols=4, draft_rows=2, format=FormatConfig(group=32)),
        weights=AxiConfig(data_bits=64, address_bits=32, burst=32, depth=64),
        data=AxiConfig(data_bits=64, address_bits=32, burst=4, depth=32, outstanding=13),
    ),
    AcceleratorConfig(
        EngineConfig(rows=4, cols=16, format=FormatConfig(group=128), max_k=1000),
        weights=AxiConfig(data_bits=64, address_bits=20),
        data=AxiConfig(data_bits=256, address_bits=20),
    ),
)
_READERS = {"weights": WeightReader, "groups": GroupReader, "activations": ActivationReader}
#: Share of cycles in which a paused channel pauses.
_PAUSE = 0.4
#: Rounds of tests of faults and aborts, each with other jobs.
_ROUNDS = 2
_MIN_RATE = 0.98
_WORD_BYTES = 2


def run() -> None:
    """Check the readers with several parameters."""
    units = {
        f"{name}_{i}": reader(config)
        for i, config in enumerate(_CONFIGS)
        for name, reader in _READERS.items()
    }
    simulate(convert_unit(SideBySide(units), _TOP) + RAM_VERILOG, _TOP, __name__)


class _World(ReaderWorld):
    """A reader of the datapath."""

    def __init__(self, dut: Any, index: int, reader: str, *, independent: bool) -> None:
        self.reader = reader
        config = _CONFIGS[index]
        super().__init__(
            dut,
            f"{reader}_{index}",
            reader,
            config,
            config.weights if reader == "weights" else config.data,
            np.random.default_rng([seed(), index, *reader.encode()]),
            independent=independent,
        )

    @classmethod
    async def start(
        cls,
        dut: Any,
        index: int,
        reader: str,
        *,
        independent: bool = False,
        pause: float = 0.0,
    ) -> _World:
        """After a reset, with cocotbext-axi's memory model or with a responder."""
        world = cls(dut, index, reader, independent=independent)
        await world.begin(pause)
        return world

    def array(self, address: int, shape: tuple[int, ...], dtype: type, stride: int) -> np.ndarray:
        """An array of tiles in memory, `stride` bytes apart."""
        size = int(np.prod(shape[1:])) * np.dtype(dtype).itemsize
        tiles = [self.memory.load(address + i * stride, size) for i in range(shape[0])]
        return np.frombuffer(b"".join(tiles), dtype).reshape(shape)

    def job(self, **sizes: object) -> ReaderJob:
        """A random job of the reader, with the sizes given."""
        longest = int(self.rng.choice([5, 40, 2 * self.config.engine.format.group + 2]))
        given = {
            "mode": Mode(int(self.rng.integers(0, 3))),
            "k": int(self.rng.integers(1, longest + 1)),
            "tiles": int(self.rng.integers(1, 5)),
            "gap": int(self.rng.integers(0, 3)),
        } | sizes
        return getattr(self, f"_job_of_{self.reader}")(**given)

    def jobs(self, number: int) -> list[ReaderJob]:
        """Random jobs."""
        return [self.job() for _ in range(number)]

    def _job_of_weights(self, mode: Mode, k: int, tiles: int, gap: int) -> ReaderJob:
        config, columns = self.config, self.config.engine.cols
        draft_words = -(-k // DRAFT_LANES)
        words = k if mode is Mode.BYPASS else draft_words
        residual_words = RESIDUAL_WORDS * draft_words
        size = words * columns * _WORD_BYTES
        residual_size = residual_words * columns * _WORD_BYTES
        stride = size + gap * config.alignment
        plane = self.place(tiles * stride)
        residual = self.place(tiles * residual_size)
        content = self.array(plane, (tiles, words, columns), np.uint16, stride)
        # In verify mode chunks of both planes alternate.
        chunk = chunk_words(config) * columns * _WORD_BYTES if mode is Mode.VERIFY else size
        transfers = {"plane": self._transfers(plane, tiles, stride, size, chunk)}
        if mode is Mode.VERIFY:
            form = config.engine.format
            content = EncodedTensor(
                "random",
                (tiles * columns, k),
                form,
                columns,
                content,
                self.array(residual, (tiles, residual_words, columns), np.uint16, residual_size),
                np.zeros((tiles, -(-k // form.group), columns), np.uint8),
            ).verify_words()
            chunk *= RESIDUAL_WORDS
            transfers["residual"] = self._transfers(
                residual, tiles, residual_size, residual_size, chunk
            )
        fields = {
            "mode": mode,
            "k": k,
            "tiles": tiles,
            "plane": plane,
            "residual": residual,
            "stride": stride if gap else 0,
        }
        return self._finish(weight_command_layout(config), fields, content, transfers)

    def _job_of_groups(self, mode: Mode, k: int, tiles: int, gap: int) -> ReaderJob:
        columns, beat = self.config.engine.cols, self.port_config.beat_bytes
        groups = -(-k // self.config.engine.format.group)
        stride = -(-groups * columns // beat) * beat
        address = self.place(tiles * stride)
        content = self.array(address, (tiles, groups, columns), np.uint8, stride)
        transfers = {"groups": self._transfers(address, tiles, stride, stride, stride)}
        fields = {"k": k, "tiles": tiles, "groups": address}
        return self._finish(group_command_layout(self.config), fields, content, transfers)

    def _job_of_activations(self, mode: Mode, k: int, tiles: int, gap: int) -> ReaderJob:
        words = -(-k // DRAFT_LANES) if mode is Mode.DRAFT else k
        size, beat = self.config.activation_bytes, self.port_config.beat_bytes
        stride = -(-words * size // beat) * beat
        address = self.place(stride)
        content = self.array(address, (1, words, size), np.uint8, stride)
        transfers = {"activations": self._transfers(address, 1, stride, stride, stride)}
        fields = {"mode": mode, "k": k, "address": address}
        return self._finish(activation_command_layout(self.config), fields, content, transfers)

    def _transfers(
        self, address: int, tiles: int, stride: int, size: int, chunk: int
    ) -> list[Transfer]:
        """Addresses and beats that tiles are read in, `chunk` bytes at a time."""
        return [
            (address + i * stride + start, min(chunk, size - start) // self.port_config.beat_bytes)
            for i in range(tiles)
            for start in range(0, size, chunk)
        ]

    def _finish(
        self,
        layout: data.Layout,
        fields: Mapping[str, object],
        content: np.ndarray,
        transfers: dict[str, list[Transfer]],
    ) -> ReaderJob:
        """The job with these words, [tiles, words, bytes or columns]."""
        mask = (1 << len(self.words.payload)) - 1
        flat = content.reshape(-1, content.shape[-1])
        words = [int.from_bytes(word.tobytes(), "little") & mask for word in flat]
        return ReaderJob(layout.const(fields).as_bits(), words, transfers)


def _each(test: Callable) -> object:
    """The test for each reader of each configuration."""
    indices = range(len(_CONFIGS))
    return cocotb.test()(cocotb.parametrize(index=indices, reader=tuple(_READERS))(test))


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)), reader=tuple(_READERS), pause=(0.0, _PAUSE))
async def random_jobs(dut: Any, index: int, reader: str, pause: float) -> None:
    """The right words with and without pauses, from an independent memory model."""
    world = await _World.start(dut, index, reader, independent=True, pause=pause)
    await world.do(world.jobs(25))


@_each
async def clear_at_any_time(dut: Any, index: int, reader: str) -> None:
    """A clear drops everything, and the reader can be used again."""
    world = await _World.start(dut, index, reader, independent=True, pause=_PAUSE)
    for _ in range(_ROUNDS):
        world.command.queue.extend(job.command for job in world.jobs(20))
        world.words.pause = float(world.rng.choice([_PAUSE, 0.95]))
        await world.step(int(world.rng.integers(5, 150)))
        await world.clear(int(world.rng.integers(1, 4)))
        world.words.pause = _PAUSE
        await world.do(world.jobs(4))


@_each
async def bad_responses(dut: Any, index: int, reader: str) -> None:
    """A bad response is reported with its burst's address; only words before it are given."""
    world = await _World.start(dut, index, reader)
    for response in (Fault.SLAVE, Fault.DECODE) * _ROUNDS:
        world.responder.responses.clear()
        mode = Mode.VERIFY if reader == "weights" else Mode.DRAFT
        k = DRAFT_LANES * int(world.rng.integers(1, 30))  # no padding, whose bits do not matter
        job = world.job(mode=mode, k=k)
        plane = str(world.rng.choice(list(job.transfers)))
        transfer = int(world.rng.integers(0, len(job.transfers[plane])))
        address = world.spoil(job.transfers[plane][transfer], response.value)
        first = len(world.words.items)
        world.command.queue.append(job.command)
        await world.until("an error", world.has_error)
        world.check_error(response, address)
        await world.step(100)
        world.check_error(response, address)
        received = len(world.words.items) - first
        assert received < len(job.words)
        world.words.check(job.words[:received], first)
        world.responder.responses.clear()
        await world.clear()
        await world.do(world.jobs(3))


@_each
async def commands_outside_the_region(dut: Any, index: int, reader: str) -> None:
    """A transfer that would leave the region is refused, with its address; those before it are
    finished."""
    world = await _World.start(dut, index, reader)
    mode = Mode.BYPASS if reader == "weights" else Mode.VERIFY
    for tile in (0, 0, 2):
        job = world.job(mode=mode, k=9, tiles=4)
        (transfers,) = job.transfers.values()
        tile = min(tile, len(transfers) - 1)
        address, beats = transfers[tile]
        # The last beat of the tile is the first one outside.
        limit = address + (beats - 1) * world.port_config.beat_bytes - 1
        world.set_limit(limit)
        first = len(world.words.items)
        world.command.queue.append(job.command)
        await world.until("an error", world.has_error)
        await world.step(200)
        world.check_error(Fault.REFUSED, address)
        world.words.check(job.words[: len(job.words) // len(transfers) * tile], first)
        world.set_limit(world.memory.base + MEMORY_SIZE - 1)
        await world.clear()
        await world.do(world.jobs(3))


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)), mode=tuple(Mode), k=(64, 65, 256))
async def rate_of_weights(dut: Any, index: int, mode: Mode, k: int) -> None:
    """A word in each cycle in which the port can give one, across tiles and commands."""
    world = await _World.start(dut, index, "weights")
    engine, port = world.config.engine, world.port_config
    possible = port.data_bits / (16 * engine.cols)
    if mode is Mode.VERIFY:
        possible *= k / (DRAFT_LANES * -(-k // DRAFT_LANES))
    steps = -(-k // DRAFT_LANES) if mode is Mode.DRAFT else k
    tiles = -(-512 // steps)
    jobs = [world.job(mode=mode, k=k, tiles=tiles, gap=gap) for gap in (0, 0, 1)]
    rate = await world.rate(jobs)
    dut._log.info(f"rate of {world.ports.unit}, {mode.name}, k {k}: {rate:.4f} of {possible:.4f}")
    assert rate >= _MIN_RATE * possible


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)), reader=("groups", "activations"))
async def rate_of_the_others(dut: Any, index: int, reader: str) -> None:
    """A word per cycle, or a beat per cycle where words are wider."""
    world = await _World.start(dut, index, reader)
    config = world.config
    if reader == "groups":
        bits, k, tiles = 8 * config.engine.cols, 7 * config.engine.format.group, 100
    else:
        bits, k, tiles = 8 * config.activation_bytes, 512, 1
    possible = min(1.0, world.port_config.data_bits / bits)
    rate = await world.rate([world.job(mode=Mode.VERIFY, k=k, tiles=tiles) for _ in range(3)])
    dut._log.info(f"rate of {world.ports.unit}: {rate:.4f} of {possible:.4f}")
    assert rate >= _MIN_RATE * possible
