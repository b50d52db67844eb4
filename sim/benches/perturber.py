# SPDX-License-Identifier: Apache-2.0
"""Testbench of the perturber, noise included, against the golden functions.

Products of random sizes follow each other, with random seeds, positions and scales, with and
without pauses, with and without sampling; some are cut short by a reset.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cocotb
import numpy as np
from amaranth.hdl import Cat, Elaboratable, Module, Mux, ResetInserter
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from speq.hw.accelerator_config import TOKEN_BITS, AcceleratorConfig
from speq.hw.array.gemm_engine import result_layout
from speq.hw.common.ram import RAM_VERILOG
from speq.hw.control.ranker import rank_start_layout
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig
from speq.hw.sampling.noise_source import NoiseSource
from speq.hw.sampling.perturber import Perturber, perturber_start_layout
from speq.hw.verilog import convert_unit
from speq.model.gumbel import philox, transform
from speq.sim.benches.streams import Sink, Source
from speq.sim.benches.world import Ports, SideBySide, World
from speq.sim.runner import seed, simulate

_TOP = "perturber_tb"
_PATIENCE = 100_000
_PRODUCTS = 8
_RATE_TILES = 4


def _system(rows: int, cols: int, head_inputs: int = 512) -> AcceleratorConfig:
    axi = AxiConfig(data_bits=64)
    engine = EngineConfig(rows=rows, cols=cols)
    return AcceleratorConfig(engine, weights=axi, data=axi, head_inputs=head_inputs)


#: With one lane and generators of 1, 2 and 5 rounds, and with several lanes.
_CONFIGS = (_system(2, 4), _system(8, 16), _system(9, 32), _system(8, 16, 32))


def _ranked_layout(config: AcceleratorConfig) -> data.StructLayout:
    """What a ranker sees of a beat."""
    logits = data.ArrayLayout(32, config.engine.cols)
    return data.StructLayout(
        {"beat": result_layout(config.engine), "logits": logits, "row_cutoff": 32}
    )


class _Ranked(wiring.Component):
    """A perturber that can be cleared, and a stream of all that a ranker takes with a beat."""

    def __init__(self, config: AcceleratorConfig) -> None:
        self.unit = Perturber(config)
        members = dict(self.unit.signature.members)
        for name in ("truncates", "logits", "row_cutoff"):
            del members[name]
        ranked = stream.Signature(_ranked_layout(config))
        super().__init__(members | {"clear": In(1), "perturbed": Out(ranked)})

    def elaborate(self, platform: object) -> Elaboratable:
        m = Module()
        unit = self.unit
        m.submodules.unit = ResetInserter(self.clear)(unit)
        for name in ("sample", "truncate", "scale", "cutoff", "seed", "positions"):
            m.d.comb += getattr(unit, name).eq(getattr(self, name))
        for name in ("start", "results"):
            wiring.connect(m, wiring.flipped(getattr(self, name)), getattr(unit, name))
        wiring.connect(m, unit.rank_start, wiring.flipped(self.rank_start))
        beat = unit.perturbed.payload.as_value()
        others = Cat(unit.logits, unit.row_cutoff)
        m.d.comb += [
            self.perturbed.valid.eq(unit.perturbed.valid),
            self.perturbed.payload.eq(Cat(beat, Mux(unit.truncates, others, 0))),
            unit.perturbed.ready.eq(self.perturbed.ready),
        ]
        return m


def run() -> None:
    """Check perturbers of several configurations."""
    units = {f"u{i}": _Ranked(config) for i, config in enumerate(_CONFIGS)}
    simulate(convert_unit(SideBySide(units), _TOP) + RAM_VERILOG, _TOP, __name__)


class _World(World):
    """A perturber, what comes in and what goes out."""

    def __init__(self, dut: Any, index: int, pause: float) -> None:
        self.config = config = _CONFIGS[index]
        rng = np.random.default_rng([seed(), index, int(100 * pause)])
        super().__init__(dut, f"perturber, {config}", rng, _PATIENCE)
        self.ports = Ports(dut, f"u{index}")
        self.pause = pause
        self.layout = result_layout(config.engine)
        self.largest: dict[int, np.float32] = {}  # logit of each row

    @classmethod
    async def start(cls, dut: Any, index: int, pause: float) -> _World:
        """After a reset."""
        world = cls(dut, index, pause)
        world.start_clock()
        world.ports["clear"].value = 0
        await world.reset()
        return world

    def connect(self) -> list[Callable[[int], None]]:
        self.starts = Source(self.ports, "start", self.rng)
        self.results = Source(self.ports, "results", self.rng)
        self.sink = Sink(self.ports, "perturbed", self.rng)
        self.rank_starts = Sink(self.ports, "rank_start", self.rng)
        ends = (self.starts, self.results, self.sink, self.rank_starts)
        for end in ends:
            end.pause = self.pause
        return [end.step for end in ends]

    def begin(
        self,
        tokens: int,
        tiles: int,
        *,
        sample: bool = True,
        truncate: bool = False,
        keep: bool = False,
        again: bool = False,
    ) -> list[int]:
        """Set the registers, queue a product, and say what is to come out."""
        config, rng = self.config, self.rng
        cols, rows = config.engine.cols, config.engine.rows
        key = int(rng.integers(0, 2**64, dtype=np.uint64, endpoint=False))
        positions = rng.integers(0, 2**32, rows)
        positions[:2] = rng.choice([0, 1, 2**32 - 1, 77], 2)
        scale = np.float32(1 / rng.choice([0.3, 0.7, 1.0, 1.5, 1e-6, 1e6]))
        last_tile = 2**TOKEN_BITS // cols
        tile = int(rng.choice([0, int(rng.integers(0, last_tile - tiles)), last_tile - tiles]))
        self.ports["seed"].value = key
        self.ports["scale"].value = int(scale.view(np.uint32))
        self.ports["sample"].value = sample
        self.ports["truncate"].value = truncate
        if not keep and not again:
            self.largest = {}
            self.cutoff = np.float32(rng.choice([0, -0.1, -3.7, -100]))
        cutoff = self.cutoff
        self.ports["cutoff"].value = int(cutoff.view(np.uint32))
        packed = sum(position << 32 * i for i, position in enumerate(positions.tolist()))
        self.ports["positions"].value = packed
        columns = int.from_bytes(rng.bytes(8), "little") & 2**cols - 1
        fields = {"tokens": tokens, "tile": tile, "keep": keep, "columns": columns}
        fields["whole"] = int(rng.integers(2))
        self.rank_start = rank_start_layout(config).const(fields).as_bits()
        start = perturber_start_layout(config).const(fields | {"tiles": tiles, "again": again})
        self.starts.queue.append(start.as_bits())
        expected = []
        for i in range(tiles):
            ids = (tile + i) * cols + np.arange(cols)
            for row in range(tokens):
                logits = rng.normal(0, 10, cols).astype(np.float32)
                logits[rng.random(cols) < 0.05] = rng.choice([0, -0.0, 1e-40, 3e38])
                before = self.largest.get(row)
                if before is not None:  # just at the cut-off, and below it
                    logits[rng.random(cols) < 0.05] = before + cutoff
                    below = np.nextafter(before + cutoff, np.float32(-np.inf))
                    logits[rng.random(cols) < 0.05] = below
                others = {
                    "strobe": int.from_bytes(rng.bytes(8), "little") & 2**cols - 1,
                    "row": row,
                    "last": i == tiles - 1 and row == tokens - 1,
                }
                self.results.queue.append(self._beat(logits, others))
                extra = {}
                if sample and truncate:
                    extra = self._truncated(row, logits, columns, cutoff, others)
                if sample:
                    with np.errstate(over="ignore"):
                        logits = logits * scale + _noise(key, int(positions[row]), ids)
                fields = {"data": logits.view(np.uint32).tolist(), **others}
                ranked = _ranked_layout(config).const({"beat": fields, **extra})
                expected.append(ranked.as_bits())
        return expected

    def _truncated(
        self, row: int, logits: np.ndarray, columns: int, cutoff: np.float32, others: dict
    ) -> dict:
        """What goes with a beat; of its strobe, what reaches the row's cut-off before it."""
        counted = [bool((others["strobe"] & columns) >> i & 1) for i in range(len(logits))]
        before = self.largest.get(row)
        if before is not None:
            bits = (logits >= before + cutoff).tolist()
            others["strobe"] &= sum(bit << i for i, bit in enumerate(bits))
        now = np.float32(max([-np.inf if before is None else before, *logits[counted]]))
        self.largest[row] = now
        words = logits.view(np.uint32).tolist()
        key = _order_key(now + cutoff)
        return {"logits": words, "row_cutoff": key}

    def _beat(self, logits: np.ndarray, others: dict) -> int:
        fields = {"data": logits.view(np.uint32).tolist(), **others}
        return self.layout.const(fields).as_bits()

    async def finish(self, expected: list[int], first: int) -> None:
        """Wait until all beats have come out, and compare them."""
        await self.until(
            lambda: f"{len(self.sink.items) - first} of {len(expected)} beats",
            lambda: len(self.sink.items) - first == len(expected) and not self.results.queue,
        )
        self.sink.check(expected, first)
        # Without sampling results do not wait for it.
        await self.until("no start", lambda: self.rank_starts.items[-1:] == [self.rank_start])


def _order_key(value: np.float32) -> int:
    """An unsigned number that is ordered as FP32 numbers are."""
    bits = int((value + np.float32(0)).view(np.uint32))  # there is one zero
    return bits ^ (0xFFFFFFFF if bits >> 31 else 0x80000000)


def _noise(key: int, position: int, ids: np.ndarray) -> np.ndarray:
    """Noise of single tokens, float32."""
    counter = np.zeros((len(ids), 4), np.uint32)
    counter[:, 0], counter[:, 1] = ids >> 1, position
    words = philox(counter, (key & 0xFFFFFFFF, key >> 32)).astype(np.uint64)
    high, low = (np.take_along_axis(words, 2 * (ids[:, None] & 1) + i, 1)[:, 0] for i in (0, 1))
    return transform(high << np.uint64(32) | low)


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)), pause=[0.0, 0.4])
async def products(dut: Any, index: int, pause: float) -> None:
    """Every column of every beat, with resets in between."""
    world = await _World.start(dut, index, pause)
    rng = world.rng
    for number in range(_PRODUCTS):
        first = len(world.sink.items)
        tokens = int(rng.integers(1, world.config.engine.rows + 1))
        modes = {"sample": number != 3, "truncate": number != 7}
        modes |= {"keep": number == 5, "again": number == 1}
        expected = world.begin(tokens, int(rng.integers(1, 6)), **modes)
        if number % 4 == 2:
            await world.step(int(rng.integers(1, 150)))
            world.starts.withdraw()
            world.results.withdraw()
            world.ports["clear"].value = 1
            await world.step(1)
            world.ports["clear"].value = 0
            world.sink.forget_offer()
            world.rank_starts.forget_offer()
            continue
        await world.finish(expected, first)


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)))
async def rate(dut: Any, index: int) -> None:
    """A tile of all rows in the time of a product of `head_inputs`, the first one apart."""
    world = await _World.start(dut, index, 0.0)
    rows = world.config.engine.rows
    expected = world.begin(rows, _RATE_TILES)
    await world.finish(expected, 0)
    cycles = world.sink.cycles
    assert cycles[-1] - cycles[rows - 1] <= world.config.head_inputs * (_RATE_TILES - 1)
    assert cycles[0] - world.starts.taken[0] <= (
        1
        + NoiseSource(world.config).LATENCY
        + Perturber.LATENCY
        + 5 * world.config.engine.cols // world.config.noise_rounds
    )


@cocotb.test()
@cocotb.parametrize(index=range(len(_CONFIGS)), truncate=[False, True])
async def ahead(dut: Any, index: int, truncate: bool) -> None:
    """While the ranker does not take a start, its noise is made, but no beat is: with that of the
    product before many columns would count."""
    world = await _World.start(dut, index, 0.0)
    for number in range(2):
        world.rank_starts.pause = 1.0
        expected = world.begin(1, 1, truncate=truncate)
        await world.step(200)
        assert len(world.sink.items) == number and not world.rank_starts.items[number:]
        world.rank_starts.pause = 0.0
        await world.finish(expected, number)
        latency = Perturber.LATENCY + truncate * Perturber(world.config).truncate_cycles
        waited = world.sink.cycles[number] - world.rank_starts.cycles[number]
        assert waited <= world.config.engine.cols // world.config.noise_lanes + latency + 1
