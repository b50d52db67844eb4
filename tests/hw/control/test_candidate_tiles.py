# SPDX-License-Identifier: Apache-2.0
"""The tiles of candidates against their definition."""

from __future__ import annotations

import random

import pytest
from amaranth.sim import Simulator

from speq.hw.accelerator_config import TOKEN_BITS, AcceleratorConfig
from speq.hw.control.candidate_tiles import CandidateTiles
from speq.hw.engine_config import EngineConfig
from speq.hw.memory.axi import AxiConfig
from speq.model.number_format import FormatConfig, draft_words, residual_words
from speq.sim.runner import seed
from tests.hw.streams import Sink

_FORMAT = FormatConfig()
_PATIENCE = 400
_FIELDS = ("tile", "columns", "keep", "plane", "residual", "groups")


def system(cols: int, choices: int) -> AcceleratorConfig:
    axi = AxiConfig(data_bits=64, address_bits=40)
    engine = EngineConfig(rows=2, cols=cols)
    return AcceleratorConfig(engine, weights=axi, data=axi, choices=choices)


def expected_tiles(
    config: AcceleratorConfig, tokens: list[int], layer: dict[str, int]
) -> list[dict[str, int]]:
    """The tiles that hold the tokens, and where they lie."""
    cols, k = config.engine.cols, layer["k"]
    groups = -(-k // _FORMAT.group) * cols
    sizes = {
        "plane": draft_words(k) * cols * 2,
        "residual": residual_words(k) * cols * 2,
        "groups": -(-groups // config.data.beat_bytes) * config.data.beat_bytes,
    }
    tiles = sorted({token // cols for token in tokens})
    return [
        {
            "tile": tile,
            "columns": sum(1 << t % cols for t in set(tokens) if t // cols == tile),
            "keep": int(i > 0),
        }
        | {name: (layer[name] + tile * size) % 2**40 for name, size in sizes.items()}
        for i, tile in enumerate(tiles)
    ]


@pytest.mark.parametrize(("cols", "choices"), [(4, 8), (16, 8), (8, 4)])
def test_tiles_of_random_rankings(cols, choices):
    """Tokens that share tiles, far apart, none at all; fewer entries than are asked for, and
    more."""
    config = system(cols, choices)
    dut = CandidateTiles(config)
    rng = random.Random(f"{seed()} {cols} {choices}")
    sink = Sink(dut.tiles, rng, 0.3)

    async def bench(ctx):
        for trial in range(60):
            limit = rng.choice([cols, 3 * cols, 40 * cols, 2**TOKEN_BITS])
            tokens = [rng.randrange(limit) for _ in range(choices)]
            entries, count = rng.randint(0, choices), rng.randint(1, choices)
            layer = {name: rng.randrange(2**20) * 64 for name in ("plane", "residual", "groups")}
            layer["k"] = rng.randint(1, config.engine.max_k)
            for i, token in enumerate(tokens):
                ctx.set(dut.entries[i].token, token)
                ctx.set(dut.entries[i].valid, i < entries)
            ctx.set(dut.layer, layer)
            ctx.set(dut.candidates, count)
            ctx.set(dut.start, 1)
            await ctx.tick()
            ctx.set(dut.start, 0)
            for i in range(choices):
                ctx.set(dut.entries[i].token, rng.randrange(2**TOKEN_BITS))
            cycles = 0
            while ctx.get(dut.busy):
                await ctx.tick()
                cycles += 1
                assert cycles < _PATIENCE, f"trial {trial}: it does not end"
            expected = expected_tiles(config, tokens[: min(entries, count)], layer)
            got = [{name: int(tile[name]) for name in _FIELDS} for tile in sink.items]
            assert got == expected, f"seed {seed()}, trial {trial}: tokens {tokens}"
            sink.items.clear()

    simulator = Simulator(dut)
    simulator.add_clock(1e-9)
    simulator.add_testbench(bench)
    simulator.add_testbench(sink.run, background=True)
    simulator.run()
