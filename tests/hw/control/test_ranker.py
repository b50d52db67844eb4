# SPDX-License-Identifier: Apache-2.0
"""The ranker against a sort, with ties, NaN, infinities, pauses and resets."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterable

import pytest
from amaranth.hdl import ResetInserter, Signal
from amaranth.sim import Simulator, SimulatorContext

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.control.ranker import Ranker
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig
from speq.sim.runner import seed

_INFINITY, _NAN = 0x7F800000, 0x7FC00000
_NEGATIVE = 0x80000000
_CORNERS = (
    *(0, 1, 0x007FFFFF, 0x00800000, 0x3F800000, 0x3F800001, 0x7F7FFFFF, _INFINITY),
    *(_NAN, 0x7F800001, 0x7FFFFFFF),
)
_PATIENCE = 200_000
#: Rows, columns, entries of a ranking.
_SHAPES = ((2, 4, 4), (3, 8, 8), (1, 16, 4), (8, 4, 4))

#: FP32 bits of the outputs of each row.
Logits = list[list[int]]
#: Token and FP32 bits.
Entry = tuple[int, int]

pytestmark = pytest.mark.usefixtures("simulable_ram")
each_shape = pytest.mark.parametrize("shape", _SHAPES, ids=str)


def system(rows: int, cols: int, choices: int) -> AcceleratorConfig:
    axi = AxiConfig(data_bits=64)
    engine = EngineConfig(rows=rows, cols=cols)
    return AcceleratorConfig(engine, weights=axi, data=axi, choices=choices)


def value(bits: int) -> float:
    """The number that a logit is ranked by."""
    number = struct.unpack("<f", struct.pack("<I", bits))[0]
    return float("-inf") if number != number else number


def golden(logits: Logits, rows: int, choices: int) -> list[list[Entry | None]]:
    """The entries of all rows; None for those that are not valid."""
    none: list[Entry | None] = [None] * choices
    ranking = [none] * rows
    for i, row in enumerate(logits):
        order = sorted(range(len(row)), key=lambda j, row=row: (-value(row[j]), j))
        ranking[i] = ([(j, row[j]) for j in order] + none)[:choices]
    return ranking


def beats(logits: Logits, cols: int, rng: random.Random) -> list[dict]:
    """The result beats of a GEMM; what is not strobed is random."""
    outputs = len(logits[0])
    items = []
    for first in range(0, outputs, cols):
        columns = min(cols, outputs - first)
        for row, values in enumerate(logits):
            padding = [rng.choice((rng.getrandbits(32), _INFINITY)) for _ in range(cols - columns)]
            items.append(
                {
                    "data": values[first : first + columns] + padding,
                    "strobe": (1 << columns) - 1,
                    "row": row,
                    "last": first + cols >= outputs and row + 1 == len(logits),
                }
            )
    return items


class Bench:
    """A ranker in the simulator, and the cycles of the current GEMM in which beats were taken."""

    def __init__(self, config: AcceleratorConfig, pause: float = 0) -> None:
        self.dut, self.clear = Ranker(config), Signal()
        self.rows, self.cols = config.engine.rows, config.engine.cols
        self.choices = config.choices
        self.rng = random.Random(f"{seed()} {self.rows} {self.cols} {pause}")
        self.pause = pause
        self.taken: list[int] = []

    def run(self, testbench: Callable) -> None:
        simulator = Simulator(ResetInserter(self.clear)(self.dut))
        simulator.add_clock(1e-6)
        simulator.add_testbench(testbench)
        simulator.run()

    async def feed(
        self,
        ctx: SimulatorContext,
        logits: Logits,
        cycles: int = _PATIENCE,
        *,
        tile: int = 0,
        columns: int = -1,
        keep: bool = False,
    ) -> bool:
        """Give a GEMM's start and beats for at most so many cycles; whether it has ended."""
        dut, rng = self.dut, self.rng
        items = beats(logits, self.cols, rng)
        self.taken = []
        is_started = False
        start = {"tokens": len(logits), "tile": tile, "keep": keep}
        ctx.set(dut.start.payload, start | {"columns": columns & (1 << self.cols) - 1})
        for cycle in range(cycles):
            if not is_started and rng.random() >= self.pause:
                ctx.set(dut.start.valid, 1)
            if items and rng.random() >= self.pause:
                ctx.set(dut.results.payload, items[0])
                ctx.set(dut.results.valid, 1)
            *_, busy, start, offered, ready = await ctx.tick().sample(
                dut.busy, dut.start.valid & dut.start.ready, dut.results.valid, dut.results.ready
            )
            if start:
                is_started = True
                ctx.set(dut.start.valid, 0)
            if offered and ready:
                self.taken.append(cycle)
                del items[0]
                ctx.set(dut.results.valid, 0)
            if is_started and not start and not busy:
                assert not items, f"the ranker ended {len(items)} beats too early"
                return True
        return False

    async def check(
        self, ctx: SimulatorContext, logits: Logits, expected: list | None = None
    ) -> None:
        """Read all rows and compare them, with all outputs' ranking unless another is given."""
        dut, rng = self.dut, self.rng
        expected = expected or golden(logits, self.rows, self.choices)
        order = list(range(self.rows))
        rng.shuffle(order)
        for row in order:
            ctx.set(dut.row, row)
            await ctx.tick()
            # The answer is to the row of the cycle before.
            ctx.set(dut.row, rng.randrange(self.rows))
            got = [(e.token, e.logit) if e.valid else None for e in ctx.get(dut.entries)]
            assert got == expected[row], (
                f"ranker: seed {seed()}, row {row}, logits "
                f"{[hex(bits) for bits in (logits[row] if row < len(logits) else [])]}: "
                f"expected {shown(expected[row])}, got {shown(got)}"
            )

    def rank(self, gemms: Iterable[Logits]) -> None:
        """Rank GEMMs one after the other and compare."""

        async def testbench(ctx: SimulatorContext) -> None:
            for logits in gemms:
                assert await self.feed(ctx, logits), f"not within {_PATIENCE} cycles"
                await self.check(ctx, logits)

        self.run(testbench)


def shown(entries: list[Entry | None]) -> list[tuple[int, str] | None]:
    """Entries for a message."""
    return [entry and (entry[0], hex(entry[1])) for entry in entries]


def random_logits(rng: random.Random, tokens: int, outputs: int) -> Logits:
    """Of one of several kinds: all corners, many ties, any bits, rising, or close to each other."""
    kinds = (
        lambda i: rng.choice(_CORNERS) | rng.choice((0, _NEGATIVE)),
        lambda i: rng.choice((0xBF800000, _NEGATIVE, 0, 0x3F800000)),
        lambda i: rng.getrandbits(32),
        lambda i: 0x3F800000 + i,
        lambda i: 0xC0000000 + rng.getrandbits(3),
        lambda i: rng.choice((_INFINITY, _NAN)) | _NEGATIVE,
    )
    return [[kind(i) for i in range(outputs)] for kind in rng.choices(kinds, k=tokens)]


@each_shape
@pytest.mark.parametrize("pause", [0, 0.4])
def test_rankings_are_those_of_a_sort(shape: tuple[int, int, int], pause: float) -> None:
    bench = Bench(system(*shape), pause)
    rows, cols, choices = shape
    rng = bench.rng
    sizes = [1, 2, choices - 1, choices, cols - 1, cols, cols + 1, 7 * cols, 11 * cols - 3]
    sizes += [rng.randint(1, 20 * cols) for _ in range(6)]
    gemms = []
    for outputs in sizes:
        tokens = rng.choice((1, rows, rng.randint(1, rows)))
        gemms.append(random_logits(rng, tokens, outputs))
    bench.rank(gemms)


@each_shape
def test_corners_rank_against_each_other(shape: tuple[int, int, int]) -> None:
    bench = Bench(system(*shape))
    corners = [bits | sign for bits in _CORNERS for sign in (0, _NEGATIVE)]
    pairs = [[a, b] for a in corners for b in corners]
    rows = bench.rows
    bench.rank([pairs[i : i + rows] for i in range(0, len(pairs), rows)])


def test_many_tiles() -> None:
    bench = Bench(system(1, 4, 4))
    outputs = 4 * 300
    bench.rank([[[0x3F800000 + i for i in range(outputs)]], [[_NAN] * outputs]])


def tiles_of(outputs: list[int], cols: int) -> list[tuple[int, int]]:
    """Numbers of the tiles that hold these outputs, rising, and their columns."""
    numbers = sorted({output // cols for output in outputs})
    return [(n, sum(1 << o % cols for o in outputs if o // cols == n)) for n in numbers]


@each_shape
@pytest.mark.parametrize("shift", [0, 1])
def test_candidates_are_ranked_anew(shape: tuple[int, int, int], shift: int) -> None:
    """Any number of outputs of row 0, tile by tile, with ties across tiles: nothing else counts,
    and columns that are wrong by one are found."""
    bench = Bench(system(*shape), 0.2)
    rows, cols, choices = shape
    rng = bench.rng
    wrong = 0

    async def testbench(ctx: SimulatorContext) -> None:
        nonlocal wrong
        for count in [*range(1, choices + 1), choices]:
            outputs = rng.choice((cols, 2 * cols, 9 * cols))
            first = random_logits(rng, rows, outputs)
            assert await bench.feed(ctx, first)
            exact = random_logits(rng, 1, outputs)[0]
            candidates = rng.sample(range(outputs), min(count, outputs))
            for i, (tile, columns) in enumerate(tiles_of(candidates, cols)):
                columns = (columns << shift | columns >> cols - shift) & (1 << cols) - 1
                part = [exact[tile * cols : (tile + 1) * cols]]
                assert await bench.feed(ctx, part, tile=tile, columns=columns, keep=i > 0)
            order = sorted(candidates, key=lambda j, exact=exact: (-value(exact[j]), j))
            none: list[Entry | None] = [None] * choices
            expected = [none] * rows
            expected[0] = ([(j, exact[j]) for j in order] + none)[:choices]
            try:
                await bench.check(ctx, [exact], expected)
            except AssertionError:
                wrong += 1

    bench.run(testbench)
    assert bool(wrong) == bool(shift)


@each_shape
def test_cycles(shape: tuple[int, int, int]) -> None:
    """A beat without an entry takes `CYCLES`, others `INSERT_CYCLES` and one for each."""
    bench = Bench(system(*shape))
    rows, cols, choices = shape
    logits = [[0x40000000 + i for i in range(cols)] for _ in range(rows)]
    tiles = 6
    for values in logits:
        last = values[-choices]  # ties are not inserted
        values.extend([last] * (tiles - 3) * cols)
        values.extend([0x4F800000] + [last] * (cols - 1))  # the first column
        values.extend([0x5F800000 + i for i in range(cols)])  # all

    async def testbench(ctx: SimulatorContext) -> None:
        assert await bench.feed(ctx, logits)
        cycles = [b - a for a, b in zip(bench.taken, bench.taken[1:], strict=False)]
        idle, full = Ranker.CYCLES, Ranker.INSERT_CYCLES + cols
        expected = [full] * (rows - 1) + [idle] * 3 * rows
        expected += [Ranker.INSERT_CYCLES + 1] * rows + [full] * rows
        assert cycles == expected
        assert idle <= 3

    bench.run(testbench)


@each_shape
def test_a_reset_at_any_time_leaves_nothing_behind(shape: tuple[int, int, int]) -> None:
    bench = Bench(system(*shape), 0.2)
    rows, cols, _ = shape

    async def testbench(ctx: SimulatorContext) -> None:
        for cycles in range(1, 40):
            bench.pause = bench.rng.choice((0, 0.3))
            await bench.feed(ctx, random_logits(bench.rng, rows, 20 * cols), cycles)
            ctx.set(bench.dut.start.valid, 0)
            ctx.set(bench.dut.results.valid, 0)
            ctx.set(bench.clear, 1)
            await ctx.tick()
            ctx.set(bench.clear, 0)
            assert not ctx.get(bench.dut.busy)
            await bench.check(ctx, [])
            logits = random_logits(bench.rng, bench.rng.randint(1, rows), 2 * cols)
            assert await bench.feed(ctx, logits)
            await bench.check(ctx, logits)

    bench.run(testbench)
