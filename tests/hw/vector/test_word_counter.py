# SPDX-License-Identifier: Apache-2.0
"""The order of the words of an operation, against loops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from amaranth.hdl import Value
from amaranth.sim import Simulator, SimulatorContext

from speq.hw.accelerator_config import AcceleratorConfig
from speq.hw.engine_config import EngineConfig
from speq.hw.vector.word_counter import WordCounter, place_layout
from speq.sim.runner import seed

#: 2, 1 and 4 words of a row; a single row.
CONFIGS = {
    "4 x 8, 4 lanes": AcceleratorConfig(EngineConfig(4, 8), lanes=4),
    "3 x 8, 8 lanes": AcceleratorConfig(EngineConfig(3, 8), lanes=8, query_heads=4),
    "6 x 16, 4 lanes": AcceleratorConfig(EngineConfig(6, 16), lanes=4),
    "1 x 4, 4 lanes": AcceleratorConfig(EngineConfig(1, 4, max_k=9), lanes=4, query_heads=4),
}
LEVELS = ("word", "row", "tile", "sweep", "segment")


def places(words: int, shape: dict[str, int], twice: bool) -> Iterator[dict[str, Any]]:
    """The members of `place` of all words, in order."""
    for segment in range(shape["segments"]):
        last_segment = segment == shape["segments"] - 1
        rows = shape["last_rows"] if last_segment else shape["rows"]
        for sweep in range(1 + twice):
            for tile in range(shape["tiles"]):
                for row in range(rows):
                    for word in range(words):
                        first = [word == 0, row == 0, tile == 0, sweep == 0, segment == 0]
                        last = [
                            word == words - 1,
                            row == rows - 1,
                            tile == shape["tiles"] - 1,
                            sweep == int(twice),
                            last_segment,
                        ]
                        spans = ("row", "tile", "sweep", "segment", "operation")
                        yield {
                            "segment": segment,
                            "second": sweep,
                            "tile": tile,
                            "row": row,
                            "word": word,
                            "first": dict(zip(LEVELS, first, strict=True)),
                            "last": dict(zip(LEVELS, last, strict=True)),
                            "begins": {s: all(first[: i + 1]) for i, s in enumerate(spans)},
                            "ends": {s: all(last[: i + 1]) for i, s in enumerate(spans)},
                        }


def random_shape(rng: np.random.Generator, config: AcceleratorConfig) -> dict[str, int]:
    """A small shape, often with a 1 in it."""
    rows = config.engine.rows
    most_tiles = -(-config.engine.max_k // config.engine.cols)
    return {
        "segments": int(rng.integers(1, 4)),
        "tiles": min(int(rng.integers(1, 4)), most_tiles),
        "rows": int(rng.integers(1, rows + 1)),
        "last_rows": int(rng.choice([1, rows, int(rng.integers(1, rows + 1))])),
    }


def simulate(unit: WordCounter, testbench: Any) -> None:
    simulator = Simulator(unit)
    simulator.add_clock(1e-6)
    simulator.add_testbench(testbench)
    simulator.run()


async def begin(ctx: SimulatorContext, unit: WordCounter, shape: dict, twice: bool) -> None:
    """Give it a shape, and come to the first word."""
    ctx.set(unit.start, 1)
    ctx.set(unit.shape, shape)
    ctx.set(unit.twice, twice)
    ctx.set(unit.advance, 1)  # without effect
    await ctx.tick()
    ctx.set(unit.start, 0)
    ctx.set(unit.shape, dict.fromkeys(shape, 0))
    ctx.set(unit.twice, 0)
    for _ in range(WordCounter.LATENCY - 1):
        await ctx.tick()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("single", [False, True], ids=["words", "rows"])
def test_every_place_in_order(config: AcceleratorConfig, single: bool) -> None:
    """With pauses and without, restarted in the middle, and cleared."""
    unit = WordCounter(config, 1) if single else WordCounter(config)
    rng = np.random.default_rng(seed())
    layout = place_layout(config)

    async def testbench(ctx: SimulatorContext) -> None:
        for number in range(30):
            shape, twice = random_shape(rng, config), bool(rng.integers(0, 2))
            pause = float(rng.choice([0, 0.4]))
            expected = [layout.const(p).as_bits() for p in places(unit.words, shape, twice)]
            abandoned = number % 3 == 2  # and begun anew, or cleared
            if abandoned:
                expected = expected[: int(rng.integers(0, len(expected))) + 1]
            await begin(ctx, unit, shape, twice)
            for i, bits in enumerate(expected):
                while True:
                    advance = rng.random() >= pause
                    ctx.set(unit.advance, advance)
                    at = f"seed {seed()}, {shape}, twice {twice}, word {i}"
                    assert ctx.get(unit.active), at
                    got = ctx.get(Value.cast(unit.place))
                    assert got == bits, f"{at}: expected {layout.from_bits(bits)}, got {got:#x}"
                    await ctx.tick()
                    if advance:
                        break
            if abandoned and number % 2:
                ctx.set(unit.clear, 1)
                await ctx.tick()
                ctx.set(unit.clear, 0)
                assert not ctx.get(unit.active)
            elif not abandoned:
                for _ in range(int(rng.integers(0, 3))):
                    assert not ctx.get(unit.active), f"seed {seed()}, {shape}, twice {twice}"
                    await ctx.tick()
            ctx.set(unit.advance, 0)

    simulate(unit, testbench)


def test_a_clear_ends_what_has_just_begun() -> None:
    unit = WordCounter(CONFIGS["4 x 8, 4 lanes"])

    async def testbench(ctx: SimulatorContext) -> None:
        for cycles in range(WordCounter.LATENCY + 1):
            ctx.set(unit.start, 1)
            ctx.set(unit.shape, {"segments": 1, "tiles": 2, "rows": 1, "last_rows": 1})
            ctx.set(unit.clear, cycles == 0)
            await ctx.tick()
            ctx.set(unit.start, 0)
            for _ in range(cycles - 1):
                await ctx.tick()
            ctx.set(unit.clear, 1)
            await ctx.tick()
            ctx.set(unit.clear, 0)
            for _ in range(4):
                assert not ctx.get(unit.active)
                await ctx.tick()

    simulate(unit, testbench)


@pytest.mark.parametrize("words", [0, 3, 4, 8])
def test_numbers_of_words_that_a_row_does_not_have_are_refused(words: int) -> None:
    WordCounter._MustUse__silence = True  # else Amaranth warns that it is never elaborated
    with pytest.raises(ValueError, match=f"words is {words}; allowed are powers of two up to 2"):
        WordCounter(CONFIGS["4 x 8, 4 lanes"], words)


def test_it_needs_lanes() -> None:
    WordCounter._MustUse__silence = True
    with pytest.raises(ValueError, match="lanes is 0"):
        WordCounter(AcceleratorConfig(lanes=0))
