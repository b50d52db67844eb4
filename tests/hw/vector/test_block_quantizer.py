# SPDX-License-Identifier: Apache-2.0
"""Quantisation of blocks against the golden model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from amaranth.sim import Simulator, SimulatorContext

from speq.hw.vector.block_quantizer import BlockQuantizer
from speq.model.arith import quantize_activations
from speq.sim.compare import assert_equal_bits
from speq.sim.runner import seed
from tests.hw.streams import Sink, Source, simulate

BLOCK = 64
LANES = (4, 8, 16, 32, 64)
NONFINITE = (0x7C00, 0xFC00, 0x7C01, 0xFE00)

pytestmark = pytest.mark.usefixtures("simulable_ram")


def word_items(rows: list[np.ndarray], lanes: int) -> Iterator[dict]:
    """The stream's items of rows of FP16 bit patterns."""
    for row in rows:
        words = np.pad(row, (0, -len(row) % lanes)).reshape(-1, lanes).tolist()
        for i, values in enumerate(words):
            yield {"values": values, "last": i == len(words) - 1}


def expected_words(rows: list[np.ndarray], lanes: int) -> list[int]:
    """The stream's words for rows of FP16 bit patterns, by the golden model."""
    words = []
    for row in rows:
        padded = np.pad(row, (0, -len(row) % lanes)).view(np.float16)
        golden = quantize_activations(torch.from_numpy(padded[None]), BLOCK)
        mantissas = golden.mantissa[0].numpy().astype(int).reshape(-1, lanes)
        exponents = golden.exponent[0].tolist()
        for i, lane in enumerate(mantissas):
            end = (i + 1) * lanes % BLOCK == 0 or i == len(mantissas) - 1
            word = exponents[i * lanes // BLOCK] << 8 * lanes | int(end) << 8 * lanes + 5
            for place, mantissa in enumerate(lane.tolist()):
                word |= (abs(mantissa) | (mantissa < 0) << 7) << 8 * place
            words.append(word)
    return words


def run(unit: BlockQuantizer, rows: list[np.ndarray], pause: float) -> tuple[Source, Sink]:
    """All rows through the unit, compared with the golden model."""
    rng = np.random.default_rng(seed())
    source = Source(unit.activations, word_items(rows, unit.lanes), rng, pause)
    sink = Sink(unit.blocks, rng, pause)
    expected = expected_words(rows, unit.lanes)
    simulate(unit, [source], [sink], lambda: len(sink.bits) >= len(expected))
    print(f"seed {seed()}, {unit.lanes} lanes: {len(expected)} words")
    words = [list(item["values"]) for item in word_items(rows, unit.lanes)]
    assert_equal_bits(
        f"BlockQuantizer({unit.lanes}).blocks",
        expected=np.array(expected, object),
        got=np.array(sink.bits, object),
        operands={
            f"activation {i}": np.array([word[i] for word in words]) for i in range(unit.lanes)
        },
        cycles=np.array(sink.cycles),
    )
    return source, sink


def random_rows(rng: np.random.Generator, rows: int) -> list[np.ndarray]:
    """Rows of any length, blocks of any magnitude, some with an infinity or a NaN, some zero."""
    result = []
    for length in rng.integers(1, 4 * BLOCK, rows):
        blocks = -(-int(length) // BLOCK)
        top = rng.integers(0, 31, (blocks, 1))
        exponents = np.maximum(top - rng.integers(0, 12, (blocks, BLOCK)), 0)
        patterns = exponents << 10 | rng.integers(0, 1 << 10, exponents.shape)
        patterns |= rng.integers(0, 2, exponents.shape) << 15
        patterns[rng.random(exponents.shape) < 0.05] &= 0x8000
        patterns[rng.random(blocks) < 0.1] = 0
        patterns[rng.random(exponents.shape) < 0.002] = rng.choice(NONFINITE)
        result.append(patterns.astype(np.uint16).ravel()[: int(length)])
    return result


@pytest.mark.parametrize(
    ("lanes", "pause"), [*((lanes, 0.4) for lanes in LANES), (4, 0.0), (16, 0.0)]
)
def test_rows_are_as_in_the_golden_model(lanes: int, pause: float) -> None:
    run(BlockQuantizer(lanes, BLOCK), random_rows(np.random.default_rng(seed()), 24), pause)


def test_every_activation_at_every_distance_from_the_blocks_exponent() -> None:
    """All significands, 0 to 12 below the block's exponent, and all 2^16 patterns."""
    rng = np.random.default_rng(seed())
    every = rng.permutation(1 << 16).astype(np.uint16).reshape(-1, BLOCK)
    distance, fraction = (
        part.ravel() for part in np.meshgrid(np.arange(13), np.arange(1 << 10), indexing="ij")
    )
    order = rng.permutation(len(distance))
    others = BLOCK - 1  # one activation gives the block its exponent
    blocks = []
    for start in range(0, len(order), others):
        chosen = order[start : start + others]
        top = int(rng.integers(13, 31))
        patterns = (top - distance[chosen]) << 10 | fraction[chosen]
        patterns |= rng.integers(0, 2, len(chosen)) << 15
        blocks.append(np.append(patterns, top << 10).astype(np.uint16))
    run(BlockQuantizer(BLOCK, BLOCK), [*every, *blocks], 0)


@pytest.mark.parametrize("lanes", LANES)
def test_there_are_no_gaps_and_the_latency_is_constant(lanes: int) -> None:
    unit = BlockQuantizer(lanes, BLOCK)
    row = np.random.default_rng(seed()).integers(0, 0x7C00, 12 * BLOCK).astype(np.uint16)
    source, sink = run(unit, [row], 0)
    assert np.all(np.diff(source.taken) == 1)
    assert np.all(np.diff(sink.cycles) == 1)
    assert sink.cycles[0] - source.taken[BLOCK // lanes - 1] == unit.latency


@pytest.mark.parametrize("when", range(1, 24, 3))
def test_a_clear_leaves_nothing_behind(when: int) -> None:
    unit = BlockQuantizer(16, BLOCK)
    rng = np.random.default_rng(seed())
    # What is left behind would show: no exponent is as large as those that are dropped.
    dropped = rng.integers(0x7800, 0x7C00, 6 * BLOCK).astype(np.uint16)
    row = rng.integers(0, 0x4000, 6 * BLOCK).astype(np.uint16)
    source = Source(unit.activations, word_items([row], unit.lanes), rng)
    sink = Sink(unit.blocks, rng)
    expected = expected_words([row], unit.lanes)

    async def drive(ctx: SimulatorContext) -> None:
        ctx.set(unit.activations.valid, 1)
        for item in list(word_items([dropped], unit.lanes))[:when]:
            ctx.set(unit.activations.payload, item)
            await ctx.tick()
        ctx.set(unit.activations.valid, 0)
        ctx.set(unit.clear, 1)
        await ctx.tick()
        ctx.set(unit.clear, 0)
        await source.run(ctx)
        await ctx.tick().repeat(40)

    async def collect(ctx: SimulatorContext) -> None:
        await ctx.tick().repeat(when + 1)
        await sink.run(ctx)

    simulator = Simulator(unit)
    simulator.add_clock(1e-6)
    simulator.add_testbench(drive)
    simulator.add_testbench(collect, background=True)
    simulator.run()
    assert sink.bits == expected


@pytest.mark.parametrize(("lanes", "block"), [(2, 64), (12, 64), (128, 128), (16, 8), (16, 72)])
def test_other_sizes_are_refused(lanes: int, block: int) -> None:
    BlockQuantizer._MustUse__silence = True  # else Amaranth warns that it is never elaborated
    with pytest.raises(ValueError, match=r"lanes is|block is"):
        BlockQuantizer(lanes, block)
