# SPDX-License-Identifier: Apache-2.0
"""The ranker against a sort, with ties, NaN, infinities, pauses and resets."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from amaranth.hdl import ResetInserter, Signal
from amaranth.sim import Simulator, SimulatorContext

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.control.ranker import Ranker
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig
from speq.model.loaders import load_model
from speq.model.settings import Sampling
from speq.model.speculation import with_noise
from speq.model.transformer import KVCache, forward
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
    return AcceleratorConfig(engine, weights=axi, data=axi, choices=choices, lanes=0)


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
        whole: bool = False,
        cuts: list[dict] | None = None,
    ) -> bool:
        """Give a GEMM's start and beats for at most so many cycles; whether it has ended. With
        `cuts`, `logits` are what is ranked, and with each beat come logits and a cut-off."""
        dut, rng = self.dut, self.rng
        items = beats(logits, self.cols, rng)
        ctx.set(dut.truncate, cuts is not None)
        self.taken = []
        is_started = False
        start = {"tokens": len(logits), "tile": tile, "keep": keep, "whole": whole}
        ctx.set(dut.start.payload, start | {"columns": columns & (1 << self.cols) - 1})
        for cycle in range(cycles):
            if not is_started and rng.random() >= self.pause:
                ctx.set(dut.start.valid, 1)
            if items and rng.random() >= self.pause:
                ctx.set(dut.results.payload, items[0])
                if cuts is not None:
                    ctx.set(dut.logits, cuts[-len(items)]["logits"])
                    ctx.set(dut.cutoff, cuts[-len(items)]["cutoff"])
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


@dataclass
class Truncated:
    """A GEMM whose outputs count if their logit is at most `distance` below the row's largest.

    Attributes
    ----------
    logits, values : FP32 numbers of each row
        What decides whether an output counts, and what it is ranked by.
    distance : float
    whole : bool
        Whether all entries of all rows are wanted.
    cols, choices : int
        Of the ranker.
    """

    logits: list[list[float]]
    values: list[list[float]]
    distance: float
    whole: bool
    cols: int
    choices: int

    @property
    def bits(self) -> Logits:
        """What is ranked."""
        return [[fp32(value) for value in row] for row in self.values]

    def cuts(self, rng: random.Random, *, known: bool) -> list[dict]:
        """What goes with each beat; with `known` the last cut-offs from the start."""
        result = []
        for first in range(0, len(self.logits[0]), self.cols):
            for row in self.logits:
                seen = row if known else row[: first + self.cols]
                part = [fp32(logit) for logit in row[first : first + self.cols]]
                part += [rng.getrandbits(32) for _ in range(self.cols - len(part))]
                result.append({"logits": part, "cutoff": key(fp32(max(seen) - self.distance))})
        return result

    def _entries(self, values: list[float], outputs: list[int]) -> list[Entry | None]:
        none: list[Entry | None] = [None] * self.choices
        return ([(i, fp32(values[i])) for i in outputs] + none)[: self.choices]

    def ranking(self, row: int) -> list[Entry | None]:
        """The entries of a row, by definition."""
        logits, values = self.logits[row], self.values[row]
        least = max(logits) - self.distance
        kept = [i for i in range(len(logits)) if logits[i] >= least]
        return self._entries(values, sorted(kept, key=lambda i: (-values[i], i)))

    def listed(self, row: int) -> tuple[list[Entry | None], bool]:
        """The list that one product makes of a row, and whether a wanted entry may be wrong, by
        the rule of lost outputs."""
        logits, values = self.logits[row], self.values[row]
        entries: list[int] = []
        nothing = float("-inf")
        largest = least = lost = floor = nothing
        strict = False
        for first in range(0, len(logits), self.cols):
            part = range(first, min(first + self.cols, len(logits)))
            largest = max([largest, *(logits[i] for i in part)])
            least = largest - self.distance
            if lost < least:
                lost = floor = nothing
            reach = [i for i in entries if logits[i] >= least]
            strict |= len(reach) < len(entries)
            entries, dropped = reach, False
            for i in part:
                if logits[i] >= least:
                    entries = sorted([*entries, i], key=lambda i: (-values[i], i))
                    if len(entries) > self.choices:
                        lost, dropped = max(lost, logits[entries.pop()]), True
            if dropped and values[entries[-1]] > floor:
                floor, strict = values[entries[-1]], False
        place = self.wanted(row) - 1
        judged = values[entries[place]] if place < len(entries) else nothing
        is_right = judged > floor or (judged == floor > nothing and not strict)
        return self._entries(values, entries), lost >= least and not is_right

    def wanted(self, row: int) -> int:
        """Entries of a row that are wanted."""
        return self.choices if self.whole or row == 0 else 1

    def is_right(self, row: int) -> bool:
        """Whether the list that one product makes has the wanted entries of a row."""
        return self.listed(row)[0][: self.wanted(row)] == self.ranking(row)[: self.wanted(row)]

    def missed(self) -> bool:
        """Whether a wanted entry of any row may be wrong."""
        return any(self.listed(row)[1] for row in range(len(self.logits)))


def random_truncated(bench: Bench) -> Truncated:
    """Multiples of a number, so that there are ties. In some the largest logits come late, when
    others have been lost."""
    rng = bench.rng
    tokens = rng.choice((1, bench.rows))
    outputs = rng.randint(1, 4 * bench.cols + 6 * bench.choices)
    distance = rng.choice((0, 2, 4, 8))
    rise = rng.choice((0, 1, 1.5, 2)) * distance / outputs
    spread, noise = rng.choice((0.25, 1)), rng.choice((1, 8))
    logits = [
        [round(4 * (rng.gauss(0, spread) + rise * i)) / 4 for i in range(outputs)]
        for _ in range(tokens)
    ]
    values = [[round(4 * (logit + rng.gauss(0, noise))) / 4 for logit in row] for row in logits]
    whole = rng.random() < 0.5
    return Truncated(logits, values, distance, whole, bench.cols, bench.choices)


def fp32(number: float) -> int:
    """The bits of a number."""
    return struct.unpack("<I", struct.pack("<f", number))[0]


def key(bits: int) -> int:
    """The order key of FP32 bits that are no NaN."""
    bits = 0 if bits == _NEGATIVE else bits
    return bits ^ (0xFFFFFFFF if bits & _NEGATIVE else _NEGATIVE)


@each_shape
@pytest.mark.parametrize("pause", [0, 0.3])
def test_what_is_below_the_cutoff_is_left_out(shape: tuple[int, int, int], pause: float) -> None:
    """What is wanted is right unless something may have been missed, which is said by the rule and
    not otherwise; with the last cut-offs known everything is right."""
    bench = Bench(system(*shape), pause)
    kinds = ((False, True), (True, True), (True, False))  # whether right, and missed

    def of_kind(right: bool, missed: bool) -> Truncated:
        while True:
            gemm = random_truncated(bench)
            is_right = all(gemm.is_right(row) for row in range(len(gemm.logits)))
            assert is_right or gemm.missed(), "the rule is wrong"
            if (is_right, gemm.missed()) == (right, missed):
                return gemm

    async def testbench(ctx: SimulatorContext) -> None:
        for right, missed in 4 * kinds:
            gemm = of_kind(right, missed)
            rows = range(len(gemm.logits))
            none: list[Entry | None] = [None] * bench.choices
            others = [none] * (bench.rows - len(rows))
            assert await bench.feed(
                ctx, gemm.bits, whole=gemm.whole, cuts=gemm.cuts(bench.rng, known=False)
            )
            assert ctx.get(bench.dut.missed) == missed, f"ranker: seed {seed()}"
            await bench.check(ctx, gemm.bits, [gemm.listed(row)[0] for row in rows] + others)
            assert await bench.feed(
                ctx, gemm.bits, whole=gemm.whole, cuts=gemm.cuts(bench.rng, known=True)
            )
            assert not ctx.get(bench.dut.missed)
            await bench.check(ctx, gemm.bits, [gemm.ranking(row) for row in rows] + others)

    bench.run(testbench)


@pytest.mark.slow
def test_smollm2_seldom_misses() -> None:
    """How often a head has to be carried out a second time, at the positions of two prompts: for
    all entries of a row, and for its first alone."""
    model = load_model("smollm2")
    texts = ("Write a story about a dog.", "What is 15 percent of 24?")
    prompts = [model.tokenizer.encode_chat(text) for text in texts]
    logits = torch.cat([forward(model, p, KVCache(model.config, len(p))) for p in prompts])
    rows = len(logits)
    for temperature, min_p in ((0.5, 0.02), (0.8, 0.05), (1.0, 0.05), (1.0, 0.1), (1.2, 0.02)):
        distance = -Sampling(temperature, min_p=min_p).cutoff
        values = with_noise(logits, range(rows), np.float32(1 / temperature), seed())
        counts = [0, 0]
        for row in zip(logits.tolist(), values.tolist(), strict=True):
            # All entries are wanted of row 0, and the first of row 1.
            gemm = Truncated([row[0]] * 2, [row[1]] * 2, distance, False, cols=64, choices=8)
            for i in (0, 1):
                missed = gemm.listed(i)[1]
                assert gemm.is_right(i) or missed
                counts[i] += missed
        shares = [100 * count / rows for count in counts]
        print(
            f"\nT = {temperature}, min-p = {min_p}, {rows} rows: all entries may be missed in "
            f"{shares[0]:.1f} %, the first in {shares[1]:.1f} %"
        )
        assert shares[0] < 10
        assert shares[1] < 2


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
